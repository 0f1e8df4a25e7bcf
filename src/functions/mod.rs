//! What SQL calls, but for publishing.
//!
//! - [`status`] what the views ask; [`meters`] what was counted

mod meters;
pub(crate) mod status;
