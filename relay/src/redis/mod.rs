//! One Redis and how to reach it.
//!
//! - [`destination`] where it is and how to log in; [`allowed_hosts`] which hosts are allowed; [`server_file`] secrets
//!   and certificates on disk
//! - [`socket`] permission to connect, and the socket; [`connection`] a connection that is logged in; [`deadline`] of a
//!   whole reply; [`tls`]
//! - [`topology`] finds the node, [`answers`] parses the answers of sentinels and nodes, [`ranges`] of hash slots;
//!   [`hash_slot`] hash slots of Redis Cluster
//! - [`replicas`] WAIT; [`probe`] tests whether everything works that sending needs, [`step`] by step

pub mod allowed_hosts;
pub mod answers;
pub mod connection;
mod deadline;
pub mod destination;
pub mod hash_slot;
pub mod probe;
pub mod ranges;
pub mod replicas;
mod server_file;
mod socket;
pub mod step;
mod tls;
pub mod topology;
