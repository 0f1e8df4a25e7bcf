//! What an administrator does with events.

use crate::server::report;
use crate::tables::{replays, rights};
use pgrx::datum::TimestampWithTimeZone;
use pgrx::pg_extern;

/// `outbox.replay_events(backend_number, since, until, event_type)`
#[pg_extern(sql = false)]
fn replay_events(
    backend_number: i32,
    since: TimestampWithTimeZone,
    until: TimestampWithTimeZone,
    event_type: Option<String>,
) -> i64 {
    let replay = || replays::replay(backend_number, since, until, event_type.as_deref());
    report::guard(|| rights::of_owner(replay))
}
