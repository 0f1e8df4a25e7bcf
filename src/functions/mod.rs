//! What SQL calls, but for publishing.
//!
//! - [`status`] what the views ask; [`meters`] what was counted
//! - [`role_name`] the type of that name

mod meters;
mod role_name;
pub(crate) mod status;
