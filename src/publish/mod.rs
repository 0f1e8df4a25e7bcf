//! Publishing: an event becomes a row of `outbox.events` in the caller's transaction. Nothing here depends on the
//! worker.
//!
//! - [`call`] `publish_event`, in all signatures
//! - [`array`] `publish_events`
//! - [`trigger`] plain INSERT and COPY
//! - [`bridge`] rows of outbox tables of another make
//! - [`request`] what a publisher asks for; [`error`] the words of all refusals
//! - [`destinations`] where an event goes, by its backend or by routes; [`placing`] into which stream, and whether it may;
//!   [`fan_out`] its further rows, if it goes to several streams
//! - [`json`] JSON, however it is typed; [`binary`] payloads that are bytes
//! - [`doubts`] what is accepted with a WARNING; [`trace`] the trace context that goes with it
//! - [`repeated_id`] event ids that are used already
//! - [`appending`] from a checked request to a row
//! - [`returning`] RETURNING and ON CONFLICT for those who may only insert; [`on_conflict`] what ON CONFLICT (event_id)
//!   means; [`refused_rights`] what they have no right to, in words; [`planning`] the same where the library came late
//!
//! `publish_event` inserts through the table's access method and not the executor, as long as the table is as the
//! extension made it (see `tables/insertion.rs`): it needs no rights on the table, and no plan. A plain INSERT passes
//! the trigger `complete_event`. Both check the same things and draw the same numbers, the transaction id *before* the
//! sequence number: the reader's bounds rely on it (see `relay::reading::snapshot::Tick`).

mod appending;
mod array;
mod binary;
mod bridge;
mod call;
mod destinations;
mod doubts;
mod error;
mod fan_out;
mod json;
pub(crate) mod on_conflict;
mod placing;
pub(crate) mod planning;
mod refused_rights;
mod repeated_id;
mod request;
pub(crate) mod returning;
mod trace;
mod trigger;
