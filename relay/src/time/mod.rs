//! Time is passed in: decisions in this crate read no clock.
//!
//! - [`patience`] when to try again what failed, separately for each task
//! - [`latency`] how long events take

pub mod latency;
pub mod patience;

use std::time::Duration;

/// Time since some fixed point.
pub type Now = Duration;
