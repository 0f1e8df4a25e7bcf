//! All reading and writing of our tables by SQL. Every function needs a transaction with a snapshot, and raises an ERROR when something is
//! wrong. (Events themselves are read in `rows.rs` and inserted in `publish.rs`, without SQL.)

pub mod backends;
pub mod cursors;
pub mod refused;
pub mod restores;
pub mod retention;
pub mod scheduled;
pub mod sql;
