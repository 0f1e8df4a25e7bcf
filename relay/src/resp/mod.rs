//! The wire, both ways.
//!
//! - [`write`](mod@write) commands as bytes
//! - [`read`] replies, mostly in place
//! - [`bounds`] how large each reply may be

pub mod bounds;
pub mod read;
pub mod write;
