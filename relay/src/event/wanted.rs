//! Events that recovery looks for in their streams.

use crate::event::text::{hyphenated, rfc3339};
use std::sync::Arc;

/// What identifies an event in its stream: its id and its timestamp, as they are in the entry.
pub type EventName = ([u8; 36], [u8; 32]);

/// An event that recovery looks for.
#[derive(Clone, Debug)]
pub struct Wanted {
    pub stream: Arc<str>,
    pub event_id: [u8; 16],
    /// This distinguishes it from an earlier event that had the same id.
    pub created_at_us: i64,
    pub purpose: Purpose,
}

impl Wanted {
    pub(crate) fn name(&self) -> EventName {
        (hyphenated(&self.event_id), rfc3339(self.created_at_us))
    }
}

/// What it means if an event is not found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Purpose {
    /// The batch was appended: a missing event was refused, unless its stream has since been trimmed or entries were
    /// deleted.
    Settle,
    /// The event may never have been sent: if it is missing, it was not appended.
    Compare,
}

/// What a search says of an event.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Sighting {
    /// It stands in its stream, or has stood there: the entries of a batch that was appended can only be removed.
    There,
    Missing,
    /// It is not there. Entries of its stream were removed, or are too many to look at; the last one that was ever
    /// added is the entry of this event. If that was sent before the batch, the batch has added nothing.
    NotBehind(EventName),
}
