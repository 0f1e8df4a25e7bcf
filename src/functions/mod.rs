//! What SQL calls, but for publishing.
//!
//! - [`status`] what the views ask; [`meters`] what was counted
//! - [`health`] what `outbox.health()` asks beside
//! - [`role_name`] the type of that name; [`stream_name`] which streams templates give; [`routes`] patterns and streams of
//!   routes
//! - [`acting`] what an administrator does; [`test_backend`] a question to the worker; [`waiting`] for it

mod acting;
mod health;
mod meters;
mod role_name;
mod routes;
pub(crate) mod status;
mod stream_name;
mod test_backend;
mod waiting;
