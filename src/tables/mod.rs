//! All that touches our tables.
//!
//! - [`catalog`] which relations there are, [`known_backends`] which backends; [`missing`] what is refused without them;
//!   [`rights`] in whose name our SQL runs; [`publisher_limits`] to where a role may publish
//! - [`sql`] how SQL runs; [`found_row`] what it finds; [`backends`] with their [`options`], [`cursors`], [`refused`],
//!   [`replays`], [`restores`], [`retention`], [`routes`], [`scheduled`] a file a table or two; [`branches`] rows of one
//!   event
//! - [`row`], [`events`], [`whole_table`] rows taken apart, and scans, without SQL; [`care`] a row that cannot be read
//!   fails alone
//! - [`insertion`] a row of ours is an INSERT to everybody else; [`trusted`] which of them the trigger need not check
//! - [`numbers`], [`sequence`] numbers that ascend; [`ticks`] snapshots
//! - [`stream_names`] streams of events that name none; [`consumers`] what Redis says of consumer groups
//! - [`identity`] who this server is to the guards; [`copies`] databases made of others; [`foreign`], [`applied`] rows
//!   that came without our trigger, or by a subscription
//! - [`secret_key`] the key that passwords are sealed with

pub(crate) mod applied;
pub(crate) mod backends;
pub(crate) mod branches;
pub(crate) mod care;
pub(crate) mod catalog;
pub(crate) mod consumers;
pub(crate) mod copies;
pub(crate) mod cursors;
pub(crate) mod events;
pub(crate) mod foreign;
pub(crate) mod found_row;
pub(crate) mod identity;
pub(crate) mod insertion;
pub(crate) mod known_backends;
pub(crate) mod missing;
pub(crate) mod numbers;
pub(crate) mod options;
pub(crate) mod publisher_limits;
pub(crate) mod refused;
pub(crate) mod replays;
pub(crate) mod restores;
pub(crate) mod retention;
pub(crate) mod rights;
pub(crate) mod routes;
pub(crate) mod row;
pub(crate) mod scheduled;
pub(crate) mod secret_key;
pub(crate) mod sequence;
pub(crate) mod sql;
pub(crate) mod stream_names;
pub(crate) mod ticks;
pub(crate) mod trusted;
pub(crate) mod whole_table;
