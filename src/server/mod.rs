//! Interfaces to a Postgres process. Knows nothing of our tables.
//!
//! - [`guc`] settings; [`pinned`] those that nobody may give a worker
//! - [`shmem`], [`database_slot`], [`meters`], [`questions`], [`shared_text`] shared memory; [`txn`] after a commit:
//!   wake the worker; [`object_access`] extension and databases come and go
//! - [`process`] signals, waiting, transactions, the log
//! - [`error`], [`report`] raising and reporting ERRORs; [`untouched`], [`unguarded`] let other code's ERRORs pass
//!   unchanged; [`reserve`] memory that they need, [`out_of_memory`] if that is gone too
//! - [`silence`] keeps the triggers of others from firing; [`ruled_plans`] knows which plans that would falsify
//! - [`encoding`], [`datum`] texts in the database's encoding; values as Postgres passes them
//! - [`hooks`] Postgres's hooks, and what other libraries had put there; [`query_tree`] statements as hooks see them
//! - [`clock`] clocks for all processes
//! - [`place`], [`standby`] where this process runs, and whether its server was promoted
//! - [`threads`] threads beside the main thread
//! - [`trigger_call`] how a trigger function was called; [`random`], [`uuid`]; [`scoped`] a variable with another value
//!   during a call

pub(crate) mod clock;
pub(crate) mod database_slot;
pub(crate) mod datum;
pub(crate) mod encoding;
pub(crate) mod error;
pub(crate) mod guc;
pub(crate) mod hooks;
pub(crate) mod meters;
pub(crate) mod object_access;
pub(crate) mod out_of_memory;
pub(crate) mod pinned;
pub(crate) mod place;
pub(crate) mod process;
pub(crate) mod query_tree;
pub(crate) mod questions;
pub(crate) mod random;
pub(crate) mod report;
pub(crate) mod reserve;
pub(crate) mod ruled_plans;
pub(crate) mod scoped;
pub(crate) mod shared_text;
pub(crate) mod shmem;
pub(crate) mod silence;
pub(crate) mod standby;
pub(crate) mod threads;
pub(crate) mod trigger_call;
pub(crate) mod txn;
pub(crate) mod unguarded;
pub(crate) mod untouched;
pub(crate) mod uuid;
