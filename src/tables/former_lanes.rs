//! Where lanes stood that were given up: `outbox.former_lanes`.

use crate::tables::cursors::{self, Standing, lane_number};
use crate::tables::sql::{run, run_returning};
use relay::delivery::Cursor;

/// A lane that was given up.
pub(crate) struct FormerLane {
    pub cursor: Cursor,
    pub standing: Standing,
    /// Whether an administrator has told the backend to take over since.
    pub takes_over: bool,
}

/// Moves a lane's saved cursor there.
pub(crate) fn give_up(number: i32, hash_slot: u16) {
    run(
        "with gone as (delete from outbox.cursors c where c.backend_number = $1 and c.slot = $2 returning c.*)
        insert into outbox.former_lanes select gone.*, false from gone
            on conflict (backend_number, slot) do nothing",
        &[number.into(), lane_number(Some(hash_slot)).into()],
    );
}

/// Takes a former lane from there, if the hash slot had one.
pub(crate) fn take(number: i32, hash_slot: u16) -> Option<FormerLane> {
    let (cursor, standing) = cursors::read("outbox.former_lanes", number, Some(hash_slot))?;
    let takes_over = run_returning(
        "delete from outbox.former_lanes f where f.backend_number = $1 and f.slot = $2 returning f.takes_over",
        &[number.into(), lane_number(Some(hash_slot)).into()],
        |row| row.value("takes_over").unwrap_or(false),
    );
    Some(FormerLane {
        cursor,
        standing,
        takes_over: takes_over.contains(&true),
    })
}

/// Lanes that go on later take over too.
pub(crate) fn take_over(number: i32) {
    run(
        "update outbox.former_lanes set takes_over = true where backend_number = $1",
        &[number.into()],
    );
}
