//! One Redis and how to reach it.
//!
//! - [`destination`] where it is and how to log in; [`allowed_hosts`] where it may be; [`server_file`] secrets and
//!   certificates on disk
//! - [`socket`] permission to connect, and the socket; [`connection`] logged in on it; [`deadline`] of a whole reply; [`tls`]
//! - [`topology`] which node of several, [`answers`] what sentinels and nodes say of that; [`hash_slot`] hash slots of
//!   Redis Cluster
//! - [`replicas`] WAIT; [`probe`] whether all that is needed works, [`step`] by step

pub mod allowed_hosts;
pub mod answers;
pub mod connection;
mod deadline;
pub mod destination;
pub mod hash_slot;
pub mod probe;
pub mod replicas;
mod server_file;
mod socket;
pub mod step;
mod tls;
pub mod topology;
