//! The wire protocol, in both directions.
//!
//! - [`write`](mod@write) commands as bytes
//! - [`read`] replies, mostly read in place; [`place`] where a piece of one stands
//! - [`bounds`] how large each reply may be

pub mod bounds;
pub mod place;
pub mod read;
pub mod write;
