//! From a checked request to a row.

use crate::publish::doubts;
use crate::publish::repeated_id::{self, OnRepeat};
use crate::publish::request::{Request, check};
use crate::server::datum::text_datum;
use crate::server::encoding::to_server;
use crate::server::txn;
use crate::server::uuid;
use crate::tables::catalog::Relations;
use crate::tables::insertion::Insertion;
use crate::tables::missing;
use crate::tables::numbers::draw_numbers;
use crate::tables::row::attribute;
use crate::tables::trusted::{NewRow, RowKey};
use pgrx::pg_sys;

/// Checks an event, and makes a row of it. Returns nothing that needs to be dropped: from here on, other people's code
/// may run.
pub(super) fn prepared(request: &Request<'_>, relations: &Relations) -> NewRow {
    expect_writable();
    let checked = check(request).unwrap_or_else(|e| e.raise());
    doubts::say(request);
    // SAFETY: reads the clock.
    let now = unsafe { pg_sys::GetCurrentTimestamp() };
    let scheduled_at = request.scheduled_at.filter(|at| *at > now);
    if scheduled_at.is_some() && relations.scheduled == pg_sys::InvalidOid {
        missing::table(c"scheduled_events");
    }
    let event_id = request.event_id.unwrap_or_else(|| uuid::new_v7(now));
    if request.event_id.is_some() {
        repeated_id::is_new(relations, &event_id, scheduled_at.is_some(), OnRepeat::Refusing);
    }
    let (xid, seq) = draw_numbers(relations);

    let mut values = [pg_sys::Datum::from(0); attribute::SCHEDULED_AT];
    let mut nulls = [true; attribute::SCHEDULED_AT];
    let mut set = |attribute: usize, datum: pg_sys::Datum| {
        values[attribute - 1] = datum;
        nulls[attribute - 1] = false;
    };
    set(attribute::SEQ, pg_sys::Datum::from(seq));
    set(attribute::XID, pg_sys::Datum::from(xid));
    set(
        attribute::CREATED_AT,
        pg_sys::Datum::from(request.created_at.unwrap_or(now)),
    );
    set(attribute::EVENT_ID, uuid_datum(&event_id));
    set(attribute::BACKEND_NUMBER, pg_sys::Datum::from(checked.backend_number));
    set(attribute::PUBLISHED_BY, pg_sys::Datum::from(publisher()));
    set(attribute::BACKEND, text_datum(&to_server(&checked.backend)));
    let texts = [
        (attribute::EVENT_TYPE, &request.event_type),
        (attribute::SOURCE, &request.source),
        (attribute::DATA, &request.data),
        (attribute::SUBJECT, &request.subject),
        (attribute::STREAM, &request.stream),
        (attribute::DATA_SCHEMA, &request.data_schema),
        (attribute::PUBLISHER_CONFIG, &request.publisher_config),
    ];
    for (attribute, text) in texts {
        if let Some(text) = text {
            set(attribute, text_datum(text));
        }
    }
    if let Some(stream) = &checked.stream {
        set(attribute::STREAM, text_datum(&to_server(stream)));
    }
    if let Some(n) = request.max_retries {
        set(attribute::MAX_RETRIES, pg_sys::Datum::from(n));
    }
    match scheduled_at {
        Some(at) => {
            set(attribute::SCHEDULED_AT, pg_sys::Datum::from(at));
            txn::scheduled();
        }
        None => txn::published(),
    }
    NewRow {
        is_scheduled: scheduled_at.is_some(),
        values,
        nulls,
        key: RowKey {
            xid,
            seq,
            backend_number: checked.backend_number,
            event_id,
        },
    }
}

/// The standard ERROR when the transaction may not write.
fn expect_writable() {
    // SAFETY: each raises an ERROR or does nothing.
    unsafe {
        pg_sys::PreventCommandIfReadOnly(c"outbox.publish_event()".as_ptr());
        pg_sys::PreventCommandDuringRecovery(c"outbox.publish_event()".as_ptr());
        pg_sys::PreventCommandIfParallelMode(c"outbox.publish_event()".as_ptr());
    }
}

/// The role that publishes: the session's, or that of SET ROLE, also within a function that runs with the rights of another.
pub(super) fn publisher() -> pg_sys::Oid {
    // SAFETY: a plain read.
    unsafe { pg_sys::GetOuterUserId() }
}

fn uuid_datum(id: &[u8; 16]) -> pg_sys::Datum {
    // SAFETY: memory of the current context, as large as it must be.
    unsafe {
        let copy = pg_sys::palloc(id.len()).cast::<[u8; 16]>();
        *copy = *id;
        pg_sys::Datum::from(copy)
    }
}

/// The tables that events go into, opened when the first comes.
#[derive(Clone, Copy, Default)]
pub(super) struct Tables {
    events: Option<Insertion>,
    scheduled: Option<Insertion>,
}

impl Tables {
    /// # Safety
    /// As [`Insertion::insert`].
    pub(super) unsafe fn insert(&mut self, relations: &Relations, row: &NewRow) -> bool {
        let table = match row.is_scheduled {
            true => &mut self.scheduled,
            false => &mut self.events,
        };
        // SAFETY: the caller's promise.
        unsafe {
            let opened = match *table {
                Some(opened) => opened,
                None => Insertion::open(relations, row.is_scheduled),
            };
            *table = Some(opened);
            opened.insert(row)
        }
    }

    /// # Safety
    /// As [`Insertion::close`].
    pub(super) unsafe fn close(self) {
        for table in [self.events, self.scheduled].into_iter().flatten() {
            // SAFETY: the caller's promise.
            unsafe { table.close() };
        }
    }
}
