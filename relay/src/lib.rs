//! The relay's logic, without Postgres. Time and randomness are passed in, so that every decision can be reproduced.
//!
//! A folder uses only those below it (`scripts/lint-structure`):
//!
//! ```text
//! recovery   from a guard that was read to a backend that is up, against a trait for the books
//! sender     the thread that owns a backend's connection; what is said on it
//! redis      one Redis and how to reach it
//! delivery   the state machine of a backend: what it does next
//! guard      whose streams they are, and how far they are
//! consumers  who reads the streams, and what may be trimmed
//! event      an event, and its entry          reading    which rows come next
//! resp       the wire, both ways
//! failure    what went wrong, in words that can be shown
//! time       as it is passed in               fault      crash points
//! seal       passwords at rest                statement  what kind of statement a text is
//! ```
//!
//! `samples` has examples for tests, and exists only in test builds.
#![forbid(unsafe_code)]
// The limit is in clippy.toml. A function that is a table may be longer, and says so.
#![warn(clippy::too_many_lines)]

pub mod consumers;
pub mod delivery;
pub mod event;
pub mod failure;
pub mod fault;
pub mod guard;
pub mod reading;
pub mod recovery;
pub mod redis;
pub mod resp;
#[cfg(any(test, feature = "samples"))]
pub mod samples;
pub mod seal;
pub mod sender;
pub mod statement;
pub mod time;
