//! Where lanes stood that were given up: `outbox.former_lanes`.

use crate::server::place::here;
use crate::tables::cursors::{self, Standing, lane_number};
use crate::tables::sql::{argument, query_kept, run, run_kept};
use relay::delivery::Cursor;

/// A lane that was given up.
pub(crate) struct FormerLane {
    pub cursor: Cursor,
    pub standing: Standing,
}

/// The columns of `outbox.cursors`. Somebody may have added others.
const COLUMNS: &str = "backend_number, slot, from_snapshot, from_next_xid, from_low_seq, from_high_seq, to_snapshot,
    to_next_xid, to_low_seq, to_high_seq, last_seq, batch_number, epoch, saved_at, state, published_total, failed_total,
    events_per_second, last_published_at, last_error, last_hint, last_error_at, next_attempt_at, healings, address";

/// Moves a lane's saved cursor there.
pub(crate) fn give_up(number: i32, hash_slot: u16) {
    forget(number, hash_slot);
    run_kept(
        &format!(
            "with gone as (delete from outbox.cursors c where c.backend_number = $1 and c.slot = $2 returning c.*)
            insert into outbox.former_lanes ({COLUMNS}) select {COLUMNS} from gone"
        ),
        &[number.into(), lane_number(Some(hash_slot)).into()],
        |_| (),
    );
}

/// Takes a former lane from there, if the hash slot had one. If it has still to carry out an order to take over, a row
/// stays until it has, so that the order survives a restart.
pub(crate) fn take(number: i32, hash_slot: u16) -> Option<FormerLane> {
    let (cursor, standing) = cursors::read("outbox.former_lanes", number, Some(hash_slot))?;
    match owes_take_over(number, hash_slot) {
        // Its totals are the lane's now.
        true => run_kept(
            "update outbox.former_lanes set published_total = 0, failed_total = 0, healings = 0, last_published_at = null
            where backend_number = $1 and slot = $2",
            &[number.into(), lane_number(Some(hash_slot)).into()],
            |_| (),
        ),
        false => forget(number, hash_slot),
    };
    Some(FormerLane { cursor, standing })
}

/// Deletes the row of a lane that has gone on and has carried out its order to take over.
pub(crate) fn forget(number: i32, hash_slot: u16) -> Vec<()> {
    run_kept(
        "delete from outbox.former_lanes f where f.backend_number = $1 and f.slot = $2",
        &[number.into(), lane_number(Some(hash_slot)).into()],
        |_| (),
    )
}

/// Whether a lane has still to carry out an order to take over that was given on this server.
pub(crate) fn owes_take_over(number: i32, hash_slot: u16) -> bool {
    let found = query_kept(
        "select f.take_over_of = $3 as owes from outbox.former_lanes f where f.backend_number = $1 and f.slot = $2",
        &[number.into(), lane_number(Some(hash_slot)).into(), argument(&here())],
        |row| row.value("owes").unwrap_or(false),
    );
    found.contains(&true)
}

/// Notes an order to take over for the lanes that go on later.
pub(crate) fn take_over(number: i32) {
    run(
        "update outbox.former_lanes set take_over_of = $2 where backend_number = $1",
        &[number.into(), argument(&here())],
    );
}

/// Forgets orders to take over: another server has taken over since.
pub(crate) fn forget_take_overs(number: i32) {
    run(
        "update outbox.former_lanes set take_over_of = null where backend_number = $1 and take_over_of is not null",
        &[number.into()],
    );
}
