//! Which rows come next, and when it is worth while to look.
//!
//! - [`snapshot`] what a transaction sees: ticks
//! - [`range`] the rows between two ticks, once each, in order; how far a reader has come
//! - [`commits`] when the rows that a tick does not see began to be committed
//! - [`numbers`] the highest number that was given
//! - [`foreign`] rows of another cluster's transactions
//! - [`deleted`] when a deleted backend needs no reader any more
//! - [`role`] what a reader does with its rows
//! - [`schedule`] who reads next, and which readers share a scan
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
