//! Events that are looked for in their streams.

use crate::event::text::{hyphenated, rfc3339};
use std::sync::Arc;

/// What identifies an event in its stream: its id and its timestamp, as they stand in the entry.
pub(crate) type EventName = ([u8; 36], [u8; 32]);

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
