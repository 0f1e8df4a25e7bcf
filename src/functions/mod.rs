//! Functions that SQL calls and that belong to no other module. (The others stand beside what they use.)
//!
//! - [`status`] what the views ask; [`meters`] counters
//! - [`health`] what `outbox.health()` asks in addition; [`permitting`] lets a session read views
//! - [`role_name`] input of that type; [`stream_name`] which streams templates give; [`routes`] patterns and streams of
//!   routes
//! - [`room`] how many backends and routes there may be
//! - [`acting`] what an administrator does; [`test_backend`] a question to the worker; [`waiting`] how a session waits
//!   for it; [`published_here`] what the transaction has published

mod acting;
mod health;
mod meters;
mod permitting;
mod published_here;
mod role_name;
mod room;
mod routes;
pub(crate) mod status;
mod stream_name;
mod test_backend;
mod waiting;
