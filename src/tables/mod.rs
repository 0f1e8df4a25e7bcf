//! All that touches our tables.
//!
//! - [`catalog`] which relations and backends there are; [`missing`] what is refused without them; [`rights`] in whose
//!   name our SQL runs
//! - [`sql`] how SQL runs; [`found_row`] what it finds; [`backends`] with their [`options`], [`cursors`], [`refused`],
//!   [`restores`], [`retention`], [`scheduled`] a file a table or two
//! - [`row`], [`events`] rows taken apart, and scans, without SQL; [`care`] a row that cannot be read fails alone
//! - [`insertion`] a row of ours is an INSERT to everybody else; [`trusted`] which of them the trigger need not check
//! - [`numbers`], [`sequence`] numbers that ascend; [`ticks`] snapshots
//! - [`identity`] who this server is to the guards; [`copies`] databases made of others; [`foreign`], [`applied`] rows
//!   that came without our trigger, or by a subscription
//! - [`secret_key`] the key that passwords are sealed with

pub mod applied;
pub mod backends;
pub mod care;
pub mod catalog;
pub mod copies;
pub mod cursors;
pub mod events;
pub mod foreign;
pub mod found_row;
pub mod identity;
pub mod insertion;
pub mod missing;
pub mod numbers;
pub mod options;
pub mod refused;
pub mod restores;
pub mod retention;
pub mod rights;
pub mod row;
pub mod scheduled;
pub mod secret_key;
pub mod sequence;
pub mod sql;
pub mod ticks;
pub mod trusted;
