//! How far each backend has come: `outbox.cursors`.

use crate::server::error::internal;
use crate::tables::sql::{query, run, text, value, words};
use pgrx::datum::DatumWithOid;
use pgrx::spi::SpiTupleTable;
use relay::delivery::Cursor;
use relay::reading::range::{Position, UnderWay};
use relay::reading::snapshot::{Snapshot, Tick};
use std::sync::Arc;

/// A lane as a column of our tables: its hash slot, or this where there are none.
const NO_LANE: i32 = -1;

pub(super) fn lane_number(lane: Option<u16>) -> i32 {
    lane.map_or(NO_LANE, i32::from)
}

/// What is saved of a backend beside its position.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Standing {
    pub state: String,
    pub published_total: i64,
    pub failed_total: i64,
    pub events_per_second: f32,
    pub last_published_at: Option<i64>,
    pub last_error: Option<String>,
    pub last_error_at: Option<i64>,
    pub next_attempt_at: Option<i64>,
    /// How often Redis was found to have lost something.
    pub healings: i64,
    /// How often its guard was claimed.
    pub epoch: i64,
    /// Where it was connected last.
    pub address: Option<String>,
}

/// Hash slots of which a backend has lanes.
pub fn lanes(number: i32) -> Vec<u16> {
    query(
        "select slot from outbox.cursors where backend_number = $1 and slot >= 0 order by slot",
        &[number.into()],
        |row| value::<i32>(row, 1).unwrap_or_default() as u16,
    )
}

/// The saved position and standing of a backend, or of one lane of it.
pub fn cursor(number: i32, lane: Option<u16>) -> Option<(Cursor, Standing)> {
    query(
        "select from_snapshot::text, from_next_xid::text, from_low_seq, from_high_seq,
            to_snapshot::text, to_next_xid::text, to_low_seq, to_high_seq, last_seq,
            state, published_total, failed_total,
            (extract(epoch from last_published_at) * 1000000)::bigint, last_error,
            (extract(epoch from last_error_at) * 1000000)::bigint, batch_number, healings, epoch, address
        from outbox.cursors where backend_number = $1 and slot = $2",
        &[number.into(), lane_number(lane).into()],
        |row| {
            let from = tick_at(row, 1).unwrap_or_else(|| internal("a cursor of outbox.cursors is not readable"));
            let under_way = tick_at(row, 5).map(|to| UnderWay {
                to,
                last_seq: value(row, 9).unwrap_or_default(),
            });
            let standing = Standing {
                state: value(row, 10).unwrap_or_default(),
                published_total: value(row, 11).unwrap_or_default(),
                failed_total: value(row, 12).unwrap_or_default(),
                last_published_at: value(row, 13),
                last_error: text(row, 14),
                last_error_at: value(row, 15),
                healings: value(row, 17).unwrap_or_default(),
                epoch: value(row, 18).unwrap_or_default(),
                address: text(row, 19),
                ..Standing::default()
            };
            let cursor = Cursor {
                position: Position { from, under_way },
                number: value::<i64>(row, 16).unwrap_or_default() as u64,
            };
            (cursor, standing)
        },
    )
    .pop()
}

/// A tick in four columns: snapshot and next_xid as text, low_seq, high_seq.
pub(super) fn tick_at(row: &SpiTupleTable<'_>, first: usize) -> Option<Arc<Tick>> {
    let snapshot: Snapshot = value::<String>(row, first)?.parse().ok()?;
    Some(Arc::new(Tick {
        snapshot,
        next_xid: value::<String>(row, first + 1)?.parse().ok()?,
        low_seq: value(row, first + 2)?,
        high_seq: value(row, first + 3)?,
    }))
}

/// Saves position and standing.
pub fn save_cursor(number: i32, lane: Option<u16>, position: &Position, batch_number: u64, standing: &Standing) {
    let (from, to) = (&position.from, position.under_way.as_ref());
    run(
        "insert into outbox.cursors as c (backend_number, from_snapshot, from_next_xid, from_low_seq, from_high_seq,
            to_snapshot, to_next_xid, to_low_seq, to_high_seq, last_seq, saved_at,
            state, published_total, failed_total, events_per_second, last_published_at, last_error, last_error_at, next_attempt_at,
            batch_number, healings, epoch, address, slot)
        values ($1, $2::pg_snapshot, $3::xid8, $4, $5, $6::pg_snapshot, $7::xid8, $8, $9, $10, clock_timestamp(),
            $11, $12, $13, $14, to_timestamp($15 / 1000000.0), $16, to_timestamp($17 / 1000000.0), to_timestamp($18 / 1000000.0),
            $19, $20, $21, $22, $23)
        on conflict (backend_number, slot) do update set
            from_snapshot = excluded.from_snapshot, from_next_xid = excluded.from_next_xid,
            from_low_seq = excluded.from_low_seq, from_high_seq = excluded.from_high_seq,
            to_snapshot = excluded.to_snapshot, to_next_xid = excluded.to_next_xid,
            to_low_seq = excluded.to_low_seq, to_high_seq = excluded.to_high_seq,
            last_seq = excluded.last_seq, saved_at = excluded.saved_at, state = excluded.state,
            published_total = excluded.published_total, failed_total = excluded.failed_total,
            events_per_second = excluded.events_per_second, last_published_at = excluded.last_published_at,
            last_error = excluded.last_error, last_error_at = excluded.last_error_at, next_attempt_at = excluded.next_attempt_at,
            batch_number = excluded.batch_number, healings = excluded.healings, epoch = excluded.epoch,
            address = excluded.address",
        &[
            number.into(),
            from.snapshot.to_string().into(),
            from.next_xid.to_string().into(),
            from.low_seq.into(),
            from.high_seq.into(),
            to.map(|u| u.to.snapshot.to_string()).into(),
            to.map(|u| u.to.next_xid.to_string()).into(),
            to.map(|u| u.to.low_seq).into(),
            to.map(|u| u.to.high_seq).into(),
            to.map_or(0, |u| u.last_seq).into(),
            standing.state.clone().into(),
            standing.published_total.into(),
            standing.failed_total.into(),
            standing.events_per_second.into(),
            standing.last_published_at.into(),
            standing.last_error.as_deref().map_or_else(DatumWithOid::null::<String>, words),
            standing.last_error_at.into(),
            standing.next_attempt_at.into(),
            (batch_number as i64).into(),
            standing.healings.into(),
            standing.epoch.into(),
            standing.address.as_deref().map_or_else(DatumWithOid::null::<String>, words),
            lane_number(lane).into(),
        ],
    );
}
