//! Time is passed in: decisions in this crate read no clock.
//!
//! - [`patience`] when to try again what failed, separately for each task
//! - [`log_pace`] how many lines may be logged
//! - [`latency`] how long events take

pub mod latency;
pub mod log_pace;
pub mod patience;

use std::time::Duration;

/// Time since some fixed point.
pub type Now = Duration;
