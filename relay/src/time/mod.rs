//! Time as it is passed in: no clock is read in this crate's decisions.
//!
//! - [`patience`] when to try again what failed, each task by itself
//! - [`latency`] how long events take

pub mod latency;
pub mod patience;

use std::time::Duration;

/// Time since some fixed moment.
pub type Now = Duration;
