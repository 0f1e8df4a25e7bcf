//! What was counted of a backend already. How it is counted: `metering.rs`.

use crate::server::meters::Meter;

/// The meter of a backend, and what is in it already.
#[derive(Default)]
pub(crate) struct Metered {
    /// `None`: all were taken, or its row is gone.
    pub(super) meter: Option<&'static Meter>,
    /// How many events the delivery had accepted, and how many had failed in all, when that was counted last.
    pub(super) accepted: u64,
    pub(super) failed: i64,
    pub(super) has_connected: bool,
    /// The rows that are read now were committed after this time, see [`relay::reading::commits`].
    pub committed_after_us: i64,
}
