//! Publishing: an event becomes a row of `outbox.events` in the caller's transaction. Nothing here depends on the
//! worker.
//!
//! - [`call`] `publish_event`, in all signatures
//! - [`array`] `publish_events`
//! - [`trigger`] plain INSERT and COPY, of an [`inserted_row`]; [`confirming`] it after other triggers; [`drawn`]
//!   numbers of rows that are published again; [`restoring`] rows of a dump
//! - [`bridge`] rows of other products' outbox tables
//! - [`request`] what a publisher asks for; [`error`] the messages of all refusals
//! - [`destinations`] where an event goes, by its backend or by routes; [`placing`] which stream it goes into, and
//!   whether that is allowed; [`fan_out`] its further rows, if it goes to several streams
//! - [`json`] JSON in whatever type it comes; [`binary`] binary payloads
//! - [`doubts`] what is accepted with a WARNING; [`trace`] the trace context that is added
//! - [`repeated_id`] event ids that are already used
//! - [`appending`] from a checked request to a row
//! - [`returning`] RETURNING and ON CONFLICT for roles that may only insert; [`on_conflict`] what ON CONFLICT
//!   (event_id) means; [`refused_rights`] clear errors for statements that they have no right to; [`planning`] the same
//!   in sessions that load the library late; [`lent_rights`] views and rules
//!
//! `publish_event` inserts through the table's access method and not through the executor, as long as the table is as
//! the extension made it (see `tables/insertion`). So it needs no rights on the table and no plan. A plain INSERT
//! goes through the trigger `complete_event`. Both make the same checks and draw the same numbers, and both draw the
//! transaction id *before* the sequence number: the reader's bounds rely on that (see
//! `relay::reading::snapshot::Tick`).

mod appending;
mod array;
mod binary;
mod bridge;
mod call;
mod confirming;
mod destinations;
mod doubts;
mod drawn;
mod error;
mod fan_out;
mod inserted_row;
mod json;
pub(crate) mod lent_rights;
pub(crate) mod on_conflict;
mod placing;
pub(crate) mod planning;
pub(crate) mod refused_rights;
mod repeated_id;
mod request;
mod restoring;
pub(crate) mod returning;
mod trace;
mod trigger;
