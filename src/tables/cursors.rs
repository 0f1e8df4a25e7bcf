//! The saved position of each backend: `outbox.cursors`.

use crate::server::error::internal;
use crate::tables::sql::{Assignment, query, query_column, query_kept, upsert, words};
use crate::tables::tick_columns::{FROM, TO};
use pgrx::datum::DatumWithOid;
use relay::delivery::{Cursor, State};
use relay::reading::range::{Position, UnderWay};
use std::collections::BTreeSet;

/// The value of column `slot` for a backend without lanes. For a lane it is its hash slot.
const NO_LANE: i32 = -1;

pub(super) fn lane_number(lane: Option<u16>) -> i32 {
    lane.map_or(NO_LANE, i32::from)
}

/// What is saved of a backend besides its position, and read again after a restart. Times are in microseconds since
/// 1970.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Standing {
    pub accepted_total: i64,
    pub failed_total: i64,
    pub last_accepted_us: Option<i64>,
    pub last_error: Option<String>,
    /// What helps against it.
    pub last_hint: Option<String>,
    pub last_error_us: Option<i64>,
    /// How many times Redis was found to have lost something.
    pub healings: i64,
    /// How many times its guard was claimed.
    pub epoch: i64,
    /// The address that it was last connected to.
    pub address: Option<String>,
}

/// All that is saved of a backend.
pub(crate) struct Saved<'a> {
    pub position: &'a Position,
    pub batch_number: u64,
    pub standing: &'a Standing,
    pub state: State,
    pub events_per_second: f32,
    pub next_attempt_us: Option<i64>,
}

/// The hash slots for which a backend has lanes.
pub(crate) fn lanes(number: i32) -> Vec<u16> {
    let slots: Vec<i32> = query_column(
        "select slot from outbox.cursors where backend_number = $1 and slot >= 0 order by slot",
        &[number.into()],
    );
    slots.into_iter().map(|slot| slot as u16).collect()
}

/// Numbers of the backends that have lanes.
pub(crate) fn with_lanes() -> BTreeSet<i32> {
    let numbers: Vec<i32> = query_column(
        "select distinct backend_number from outbox.cursors where slot >= 0",
        &[],
    );
    numbers.into_iter().collect()
}

/// The saved position and standing of a backend, or of one lane of it.
pub(crate) fn cursor(number: i32, lane: Option<u16>) -> Option<(Cursor, Standing)> {
    read("outbox.cursors", number, lane)
}

/// The same in a table with the same columns.
pub(super) fn read(table: &str, number: i32, lane: Option<u16>) -> Option<(Cursor, Standing)> {
    let sql = format!(
        "select c.from_snapshot::text, c.from_next_xid::text, c.from_low_seq, c.from_high_seq,
            c.to_snapshot::text, c.to_next_xid::text, c.to_low_seq, c.to_high_seq, c.last_seq,
            c.published_total, c.failed_total, (extract(epoch from c.last_published_at) * 1000000)::bigint as last_published_us,
            c.last_error, c.last_hint, (extract(epoch from c.last_error_at) * 1000000)::bigint as last_error_us,
            c.batch_number, c.healings, c.epoch, c.address
        from {table} c where c.backend_number = $1 and c.slot = $2"
    );
    query_kept(&sql, &[number.into(), lane_number(lane).into()], |row| {
        let from = FROM
            .read(row)
            .unwrap_or_else(|| internal("a cursor of outbox.cursors is not readable"));
        let under_way = TO.read(row).map(|to| UnderWay {
            to,
            last_seq: row.value("last_seq").unwrap_or_default(),
        });
        let standing = Standing {
            accepted_total: row.value("published_total").unwrap_or_default(),
            failed_total: row.value("failed_total").unwrap_or_default(),
            last_accepted_us: row.value("last_published_us"),
            last_error: row.text("last_error"),
            last_hint: row.text("last_hint"),
            last_error_us: row.value("last_error_us"),
            healings: row.value("healings").unwrap_or_default(),
            epoch: row.value("epoch").unwrap_or_default(),
            address: row.text("address"),
        };
        let cursor = Cursor {
            position: Position { from, under_way },
            number: row.value::<i64>("batch_number").unwrap_or_default() as u64,
        };
        (cursor, standing)
    })
    .pop()
}

/// The totals of events that a backend has accepted and that have failed, including its lanes, as far as they are
/// saved.
pub(crate) fn totals(number: i32) -> (u64, u64) {
    let found = query(
        "select sum(c.published_total)::bigint as accepted, sum(c.failed_total)::bigint as failed
        from (select k.published_total, k.failed_total from outbox.cursors k where k.backend_number = $1
            union all
            select k.published_total, k.failed_total from outbox.former_lanes k where k.backend_number = $1) c",
        &[number.into()],
        |row| ["accepted", "failed"].map(|column| row.value::<i64>(column).unwrap_or_default().max(0) as u64),
    );
    let [accepted, failed] = found.into_iter().next().unwrap_or_default();
    (accepted, failed)
}

/// Saves the position and standing of a backend or of one of its lanes.
pub(crate) fn save_cursor(number: i32, lane: Option<u16>, saved: &Saved<'_>) {
    /// A time in microseconds since 1970.
    const TIME: &str = "to_timestamp($ / 1000000.0)";
    let (from, to) = (&saved.position.from, saved.position.under_way.as_ref());
    let standing = saved.standing;
    let word = |text: &Option<String>| text.as_deref().map_or_else(DatumWithOid::null::<String>, words);
    upsert(
        "outbox.cursors",
        [
            Assignment::new("backend_number", number),
            Assignment::new("slot", lane_number(lane)),
        ],
        [
            Assignment::by("from_snapshot", "$::pg_snapshot", from.snapshot.to_string()),
            Assignment::by("from_next_xid", "$::xid8", from.next_xid.to_string()),
            Assignment::new("from_low_seq", from.low_seq),
            Assignment::new("from_high_seq", from.high_seq),
            Assignment::by("to_snapshot", "$::pg_snapshot", to.map(|w| w.to.snapshot.to_string())),
            Assignment::by("to_next_xid", "$::xid8", to.map(|w| w.to.next_xid.to_string())),
            Assignment::new("to_low_seq", to.map(|w| w.to.low_seq)),
            Assignment::new("to_high_seq", to.map(|w| w.to.high_seq)),
            Assignment::new("last_seq", to.map_or(0, |w| w.last_seq)),
            Assignment::new("batch_number", saved.batch_number as i64),
            Assignment::computed("saved_at", "clock_timestamp()"),
            Assignment::new("state", saved.state.name()),
            Assignment::new("events_per_second", saved.events_per_second),
            Assignment::by("next_attempt_at", TIME, saved.next_attempt_us),
            Assignment::new("published_total", standing.accepted_total),
            Assignment::new("failed_total", standing.failed_total),
            Assignment::by("last_published_at", TIME, standing.last_accepted_us),
            Assignment::new("last_error", word(&standing.last_error)),
            Assignment::new("last_hint", word(&standing.last_hint)),
            Assignment::by("last_error_at", TIME, standing.last_error_us),
            Assignment::new("healings", standing.healings),
            Assignment::new("epoch", standing.epoch),
            Assignment::new("address", word(&standing.address)),
        ],
    );
}
