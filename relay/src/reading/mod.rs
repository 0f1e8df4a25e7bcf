//! Which rows come next, and when looking is worthwhile.
//!
//! - [`snapshot`] what a transaction sees: ticks
//! - [`range`] the rows between two ticks, once each, in order; the position of a reader
//! - [`commits`] when the commits that a tick does not see began
//! - [`numbers`] the highest number of any event
//! - [`foreign`] rows with transaction ids of another cluster
//! - [`deleted`] when a deleted backend no longer needs a reader
//! - [`role`] what a reader does with its rows
//! - [`schedule`] which readers read next, and which share a scan
//! - [`pace`] how soon to look again

pub mod commits;
pub mod deleted;
pub mod foreign;
pub mod numbers;
pub mod pace;
pub mod range;
pub mod role;
pub mod schedule;
pub mod snapshot;
