//! What was already counted for a backend. How it is counted: `metering.rs`.

use crate::server::meters::Meter;

/// The meter of a backend, and what it already includes.
#[derive(Default)]
pub(crate) struct Metered {
    /// `None`: all meters were taken, or the backend was deleted.
    pub(super) meter: Option<&'static Meter>,
    /// The delivery's totals of accepted and of failed events when they were last added to the meter.
    pub(super) accepted: u64,
    pub(super) failed: i64,
    pub(super) has_connected: bool,
    /// The rows that are being read were committed after this time, see [`relay::reading::commits`].
    pub committed_after_us: i64,
}
