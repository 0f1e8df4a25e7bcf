//! Examples for tests of this crate, and of crates that use it with the feature `samples`.

use crate::consumers::group::{EntryId, Group, GroupName};
use crate::guard::Owner;
use crate::sender::orders::{Claim, Order};
use std::time::Duration;

/// The token of [`claim`], and of the guard in [`GUARD`].
pub const TOKEN: &str = "t";

/// All fields of a readable guard.
pub const GUARD: [(&str, &str); 16] = [
    ("token", TOKEN),
    ("incarnation", "i"),
    ("system", "1"),
    ("timeline", "1"),
    ("place", "p"),
    ("interval_ms", "5000"),
    ("beat", "1"),
    ("released", "0"),
    ("number", "1099511627777"),
    ("position", "10:20:10,14/25/7/9"),
    ("previous", "3:3:/3/0/0"),
    ("again", ""),
    ("compares", "0"),
    ("wal", "12345"),
    ("total", "7"),
    ("own_stream", "events"),
];

/// The order to claim a guard under [`TOKEN`], without a new start.
pub fn claim() -> Order {
    let owner = Owner {
        incarnation: "i".into(),
        system: "1".into(),
        timeline: 1,
        place: "here".into(),
        interval: Duration::from_secs(5),
    };
    Order::Claim(Box::new(Claim {
        token: TOKEN.into(),
        owner,
        start: None,
    }))
}

/// A group that has read up to an entry of millisecond 1, and has acknowledged all entries except the oldest pending
/// one.
pub fn group(name: &str, last: u64, oldest_pending: Option<u64>) -> Group {
    let id = |seq| EntryId { ms: 1, seq };
    Group {
        name: GroupName::Known(name.into()),
        consumers: 1,
        pending: i64::from(oldest_pending.is_some()),
        lag: None,
        last_delivered: id(last),
        oldest_pending: oldest_pending.map(id),
        idle: None,
    }
}
