//! Everything that reads or writes our tables.
//!
//! - [`catalog`] the relations, [`known_backends`] the backends; [`missing`] reports missing objects; [`rights`] the
//!   rights that our SQL runs with; [`publisher_limits`] where a role may publish
//! - [`sql`] how SQL runs; [`found_row`] a row of its result; [`backends`] with their [`options`], [`cursors`],
//!   [`former_lanes`], [`refused`], [`replays`], [`restores`], [`retention`], [`routes`], [`scheduled`] one or two
//!   tables each; [`branches`] the rows of one event
//! - [`row`], [`events`], [`whole_table`] reading rows without SQL; [`care`] a row that cannot be read fails alone
//! - [`insertion`] inserting rows; [`trusted`] rows that the trigger need not check
//! - [`numbers`], [`sequence`] numbers that ascend; [`lent_numbers`] those of events that were published with rights of
//!   another role; [`ticks`] snapshots, [`tick_columns`] as columns
//! - [`stream_names`] streams of events that name none; [`consumers`] what Redis reports about consumer groups
//! - [`identity`] what guards record about this server; [`copies`] databases made from others; [`foreign`], [`applied`]
//!   rows that came without our trigger, or through a subscription
//! - [`purge_piece`] deletes what was sent long ago; [`secret_key`] the key that passwords are sealed with

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
pub(crate) mod former_lanes;
pub(crate) mod found_row;
pub(crate) mod identity;
pub(crate) mod insertion;
pub(crate) mod known_backends;
pub(crate) mod lent_numbers;
pub(crate) mod missing;
pub(crate) mod numbers;
pub(crate) mod options;
pub(crate) mod publisher_limits;
pub(crate) mod purge_piece;
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
mod tick_columns;
pub(crate) mod ticks;
pub(crate) mod trusted;
pub(crate) mod whole_table;
