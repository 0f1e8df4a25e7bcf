//! The kit: throwaway Postgres and Redis servers for the tests, and helpers to wait and to cause faults.
//!
//! - [`Postgres`] a server with its own data directory, reached by a Unix socket ([`postgres`])
//! - [`Redis`] a server with its own port and directory ([`redis`])
//! - [`Stack`] both, with the extension created and its `default` backend pointed at that Redis ([`stack`])
//! - [`wait_until`], [`wait_eq`], [`eventually`] poll until a condition holds, and report what did not hold ([`wait`])
//! - [`Standing`] and [`ids`] the relay's own status, and the arrived events ([`relay`])
//! - [`Ledger`], [`Load`], [`Verdict`] what was committed, who commits it, and whether the streams agree ([`ledger`])
//! - [`Refused`] the error of a refused statement ([`refused`])
//! - [`Redis::persistent`], [`Saved`] the data of a Redis on disk, and losing some of them ([`persistence`])
//! - [`Redis::replica_of`] replicas that fall behind and are promoted ([`replication`])
//! - [`owners`] servers that share a Redis, and which of them owns the guard
//! - [`Proxy`], [`Way`] a network that delays, cuts and holds back ([`proxy`])
//! - [`Postgres::crash_at`], [`Postgres::hold_at`], [`Postgres::mutation`] control a library built for tests
//!   ([`faults`])
//! - [`Group`] a consumer group, and the entries that it has not acknowledged ([`groups`])
//! - [`Guard`] the guard of a backend, and workers that are killed ([`guard`])
//! - [`Watched`], [`Sentinel`] sentinels, and the primary and replica that they watch ([`sentinel`])
//! - [`Cluster`] three masters with their replicas, and a ledger for many streams ([`cluster`])
//! - [`Dice`] repeatable randomness ([`dice`])
//! - [`WallClock`] a clock that is set while a server runs ([`clock`])
//! - [`Authority`] certificates, and Redis servers that speak TLS ([`tls`])
//! - [`BlackHole`], [`Garbage`], [`Eavesdropper`] servers in place of a Redis ([`hostile`]); [`Liar`] one that lies
//!   ([`liar`])
//!
//! `scripts/test` prepares what the kit needs and names it in the environment ([`env`]): start the tests with it (`make
//! test`). Every server runs below one temporary directory, so that the script can end the processes of a killed test.

pub mod bystander;
pub mod clock;
pub mod cluster;
pub mod dice;
pub mod env;
pub mod faults;
pub mod groups;
pub mod guard;
pub mod hostile;
pub mod ledger;
pub mod liar;
pub mod owners;
pub mod persistence;
mod port;
pub mod postgres;
pub mod process;
pub mod proxy;
pub mod redis;
pub mod refused;
pub mod relay;
pub mod replication;
pub mod sentinel;
pub mod stack;
pub mod tls;
pub mod wait;

pub use bystander::{Bystander, median_beside};
pub use clock::WallClock;
pub use cluster::Cluster;
pub use dice::Dice;
pub use groups::{Group, xreadgroup};
pub use guard::{Guard, UNTRIMMED};
pub use hostile::{BlackHole, Eavesdropper, Garbage};
pub use ledger::{Ledger, Load, Verdict};
pub use liar::{Liar, Lie};
pub use persistence::Saved;
pub use port::TakenPort;
pub use postgres::{Mode, Postgres};
pub use proxy::{Proxy, Way};
pub use redis::{Entry, Redis, entries, tell, xlen};
pub use refused::Refused;
pub use relay::{QUICK, Standing, first_ids, ids, promptly, publish_many, standing, types, wait_drained, wait_trouble};
pub use sentinel::{Sentinel, Watched};
pub use stack::{Stack, backoff, misconfigured};
pub use tls::{Authority, Certificate};
pub use wait::{LIMIT, eventually, holds_for, wait_eq, wait_until};
