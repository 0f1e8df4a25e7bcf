//! What is known of scheduled events: when the next is due, and which are *held*.

use relay::reading::pace::{Pieces, Portion};
use relay::time::Now;
use relay::time::patience::{Patience, Waits};
use std::collections::BTreeSet;
use std::time::Duration;

/// How long scheduled events may be moved in one round. A transaction costs about half a millisecond, however few they
/// are.
const MOVE_TIME: Duration = Duration::from_millis(3);
/// How soon a held one is looked at again.
const HELD_WAITS: Waits = Waits {
    first: Duration::from_millis(50),
    longest: Duration::from_secs(1),
};

pub(super) type EventId = [u8; 16];

pub(super) struct Scheduled {
    /// How many are moved at once.
    pub(super) portion: Portion,
    pub(super) pieces: Pieces,
    pub(super) next_due: Option<Now>,
    pub(super) is_known: bool,
    pub(super) held: BTreeSet<EventId>,
    pub(super) patience: Patience<EventId>,
}

impl Default for Scheduled {
    fn default() -> Self {
        Self {
            portion: Portion::new(MOVE_TIME),
            pieces: Pieces::default(),
            next_due: None,
            is_known: false,
            held: BTreeSet::new(),
            patience: Patience::default(),
        }
    }
}

impl Scheduled {
    pub(super) fn hold(&mut self, event_id: EventId, now: Now) {
        self.held.insert(event_id);
        self.patience.failed(event_id, "", true, HELD_WAITS, now);
    }
}
