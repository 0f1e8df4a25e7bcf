//! What SQL calls, but for publishing.
//!
//! - [`status`] what the views ask

pub(crate) mod status;
