//! The relay's logic, with no Postgres in it. Time and randomness are passed in, so that every decision can be replayed.
//!
//! ```text
//! reader ─ which rows come next (snapshot, tick, position)     event, encode ─ a row as the bytes of its XADD
//! foreign ─ rows that carry ids of another cluster
//! delivery ─ what a backend does next (refusal: its streams)   sender ─ the thread that owns its connection
//! recovery ─ from a guard that was read to a backend that is up
//! guard, claim ─ whose streams they are and how far they are   conversation ─ what is said on a connection, exactly once
//! backoff, classify ─ when to try again, and who is to blame   destination, connection, replies ─ one Redis, how to reach it, what it says
//! pace ─ when to look at the table again; patience ─ with what fails
//! place ─ whether two names mean one data directory
//! allowed_hosts ─ where it may be; route ─ which node of several  tls, server_file ─ with certificates, and what else is in files
//! slot ─ hash slots of Redis Cluster                           server_text ─ its words, as they are shown
//! ```
#![deny(unsafe_code)]

pub mod allowed_hosts;
pub mod backoff;
pub mod bounds;
pub mod claim;
pub mod classify;
pub mod connection;
pub mod conversation;
mod deadline;
mod decimal;
pub mod delivery;
pub mod destination;
pub mod encode;
pub mod event;
pub mod fault;
pub mod foreign;
pub mod guard;
mod idle;
pub mod numbers;
pub mod pace;
pub mod patience;
pub mod place;
pub mod reader;
pub mod recovery;
pub mod refusal;
pub mod replies;
pub mod route;
pub mod seal;
pub mod sender;
mod server_file;
pub mod server_text;
pub mod slot;
pub mod snapshot;
pub mod statement;
pub mod tails;
mod tls;
