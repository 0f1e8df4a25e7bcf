//! Events that are looked for in their streams.

use crate::event::text::{hyphenated, rfc3339};
use std::sync::Arc;

/// What identifies an event in its stream: its id and its timestamp, as they stand in the entry.
pub type EventName = ([u8; 36], [u8; 32]);

/// An event that is looked for.
#[derive(Clone, Debug)]
pub struct Wanted {
    pub stream: Arc<str>,
    pub event_id: [u8; 16],
    /// An event that was published under an id that was used before is another event.
    pub created_at_us: i64,
    pub purpose: Purpose,
}

impl Wanted {
    pub(crate) fn name(&self) -> EventName {
        (hyphenated(&self.event_id), rfc3339(self.created_at_us))
    }
}

/// What an event that is not found means.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Purpose {
    /// The batch was appended: what is missing was refused, unless its stream has since been trimmed or thinned out.
    Settle,
    /// It may never have been sent: what is missing is not there.
    Compare,
}

/// What a search says of an event.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Sighting {
    /// It stands in its stream, or has stood there: the entries of a batch that was appended can only be removed.
    There,
    Missing,
    /// It is not there. Entries of its stream were removed, or are too many to look at; the last one that was ever added
    /// is the entry of this event. If that was sent before the batch, the batch has added nothing.
    NotBehind(EventName),
}
