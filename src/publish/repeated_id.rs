//! Event ids that are used already.

use crate::publish::error::PublishError;
use crate::tables::catalog::Relations;
use crate::tables::missing::{self, Index};
use crate::tables::row::attribute;
use pgrx::pg_sys;

/// An id that a publisher chose must not wait in the other table. (Within one table its unique index decides.)
pub fn refuse_repeated_id(relations: &Relations, event_id: &[u8; 16], scheduled: bool) {
    if relations.scheduled == pg_sys::InvalidOid {
        missing::table(c"scheduled_events");
    }
    for (index, name) in [
        (relations.events_id_key, Index::EventId),
        (relations.scheduled_id_key, Index::ScheduledEventId),
    ] {
        if index == pg_sys::InvalidOid {
            name.refuse();
        }
    }
    let (table, index) = if scheduled {
        (relations.events, relations.events_id_key)
    } else {
        (relations.scheduled, relations.scheduled_id_key)
    };
    // SAFETY: an index look-up by an equality key of the column's type, under the latest snapshot.
    let found = unsafe {
        let lock = pg_sys::AccessShareLock as pg_sys::LOCKMODE;
        let rel = pg_sys::table_open(table, lock);
        let snapshot = pg_sys::RegisterSnapshot(pg_sys::GetLatestSnapshot());
        let mut entry: pg_sys::ScanKeyData = std::mem::zeroed();
        pg_sys::ScanKeyInit(
            &mut entry,
            attribute::EVENT_ID as i16,
            pg_sys::BTEqualStrategyNumber as u16,
            pg_sys::Oid::from(pg_sys::F_UUID_EQ),
            pg_sys::Datum::from(event_id.as_ptr()),
        );
        let scan = pg_sys::systable_beginscan(rel, index, true, snapshot, 1, &mut entry);
        let found = !pg_sys::systable_getnext(scan).is_null();
        pg_sys::systable_endscan(scan);
        pg_sys::UnregisterSnapshot(snapshot);
        pg_sys::table_close(rel, lock);
        found
    };
    if found {
        let id = String::from_utf8_lossy(&relay::event::text::hyphenated(event_id)).into_owned();
        PublishError::RepeatedId(id).raise();
    }
}
