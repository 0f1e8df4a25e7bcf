//! What is known of scheduled events: when the next is due, where the search for them begins, and which are *set
//! aside*.

use relay::reading::pace::{Pieces, Portion};
use relay::time::Now;
use relay::time::patience::{Patience, Waits};
use std::collections::BTreeSet;
use std::time::Duration;

/// How long one round may move scheduled events. A transaction costs about half a millisecond, even for one event.
const MOVE_TIME: Duration = Duration::from_millis(3);
/// How soon to look again at an event that is set aside.
const ASIDE_WAITS: Waits = Waits {
    first: Duration::from_millis(50),
    longest: Duration::from_secs(1),
};
/// The next search through all of them comes after this many times as long as the last one took, and after
/// [`LOOKS_BETWEEN`] others that have found some.
const WHOLE_LOOK_REST: u32 = 100;
const LOOKS_BETWEEN: u32 = 16;

pub(super) type EventId = [u8; 16];

pub(super) struct Scheduled {
    /// How many are moved at once.
    pub(super) portion: Portion,
    pub(super) pieces: Pieces,
    pub(super) next_due: Option<Now>,
    /// When that is by the time of day, in microseconds since 1970. The clock may be set meanwhile, or the machine be
    /// suspended.
    pub(super) next_due_us: Option<i64>,
    pub(super) search: Search,
    pub(super) is_known: bool,
    pub(super) aside: BTreeSet<EventId>,
    pub(super) patience: Patience<EventId>,
}

/// Where the search for due events begins. While an old snapshot may need them, events that were moved stay in the
/// index, and a search passes them one by one. So a search begins where the last one moved events. Now and then it
/// begins at the first event, because a transaction may have committed events that were due earlier.
pub(super) struct Search {
    moved_us: i64,
    /// When the next search may go through all of them.
    whole_at: Now,
    /// Searches since the last such one that have found some.
    looks: u32,
    /// The last search has found none.
    is_idle: bool,
    /// The last search did not go through all of them.
    is_partial: bool,
}

impl Default for Search {
    fn default() -> Self {
        Self {
            moved_us: i64::MIN,
            whole_at: Now::ZERO,
            looks: 0,
            is_idle: true,
            is_partial: false,
        }
    }
}

impl Search {
    /// The due time at which the next search begins.
    pub(super) fn begins(&mut self, now: Now) -> i64 {
        let is_whole_due = now >= self.whole_at && (self.is_idle || self.looks >= LOOKS_BETWEEN);
        self.is_partial = !is_whole_due && self.moved_us > i64::MIN;
        match self.is_partial {
            true => self.moved_us,
            false => {
                self.looks = 0;
                i64::MIN
            }
        }
    }

    /// Notes how long a search has taken.
    pub(super) fn took(&mut self, took: Duration, now: Now) {
        if !self.is_partial {
            self.whole_at = now + took * WHOLE_LOOK_REST;
        }
    }

    /// Events that were due up to this time were moved; `None`: none were.
    pub(super) fn moved(&mut self, last_us: Option<i64>) {
        self.is_idle = last_us.is_none();
        self.looks += 1;
        self.moved_us = self.moved_us.max(last_us.unwrap_or(i64::MIN));
    }

    /// When to search again if none is due: through all of them, unless that was done.
    pub(super) fn looks_at(&self) -> Option<Now> {
        self.is_partial.then_some(self.whole_at)
    }
}

impl Default for Scheduled {
    fn default() -> Self {
        Self {
            portion: Portion::new(MOVE_TIME),
            pieces: Pieces::default(),
            next_due: None,
            next_due_us: None,
            search: Search::default(),
            is_known: false,
            aside: BTreeSet::new(),
            patience: Patience::default(),
        }
    }
}

impl Scheduled {
    pub(super) fn set_aside(&mut self, event_id: EventId, now: Now) {
        self.aside.insert(event_id);
        self.patience.failed(event_id, "", true, ASIDE_WAITS, now);
    }
}
