//! Manners of a Postgres process. Knows nothing of events or backends.
//!
//! - [`guc`] settings; [`pinned`] those that nobody may give a worker
//! - [`shmem`], [`database_slot`] shared memory; [`txn`] after a commit: wake the worker; [`object_access`] extension and databases come and go
//! - [`process`] signals, waiting, transactions, the log
//! - [`error`], [`report`] raising ERRORs and saying them; [`untouched`], [`unguarded`] ERRORs of others pass as they are
//! - [`encoding`], [`datum`] texts in the database's encoding; values as Postgres passes them
//! - [`place`], [`standby`] where this server lives, and whether it was promoted
//! - [`trigger_call`] what a trigger function was called with; [`random`], [`uuid`]

pub mod database_slot;
pub mod datum;
pub mod encoding;
pub mod error;
pub mod guc;
pub mod object_access;
pub mod pinned;
pub mod place;
pub mod process;
pub mod random;
pub mod report;
pub mod shmem;
pub mod standby;
pub mod trigger_call;
pub mod txn;
pub mod unguarded;
pub mod untouched;
pub mod uuid;
