//! What is known of scheduled events: when the next is due, from which on they are looked for, and which are *held*.

use relay::reading::pace::{Pieces, Portion};
use relay::time::Now;
use relay::time::patience::{Patience, Waits};
use std::collections::BTreeSet;
use std::time::Duration;

/// How long one round may move scheduled events. A transaction costs about half a millisecond, even for one event.
const MOVE_TIME: Duration = Duration::from_millis(3);
/// How soon to look again at a held event.
const HELD_WAITS: Waits = Waits {
    first: Duration::from_millis(50),
    longest: Duration::from_secs(1),
};
/// A look at all of them is followed by one after so many times as long as it took, and after so many others that have
/// found some.
const WHOLE_LOOK_REST: u32 = 100;
const LOOKS_BETWEEN: u32 = 16;

pub(super) type EventId = [u8; 16];

pub(super) struct Scheduled {
    /// How many are moved at once.
    pub(super) portion: Portion,
    pub(super) pieces: Pieces,
    pub(super) next_due: Option<Now>,
    pub(super) from: From,
    pub(super) is_known: bool,
    pub(super) held: BTreeSet<EventId>,
    pub(super) patience: Patience<EventId>,
}

/// From which time on they are looked for. Events that were moved are still in the index, and are passed one by one, as
/// long as somebody's snapshot may need them. So a look begins where the last one has moved some, and all are looked at
/// now and then, since a transaction may have committed events that were due before.
pub(super) struct From {
    moved_us: i64,
    /// When the next look may be at all of them.
    whole_at: Now,
    /// Looks since then that have found some.
    looks: u32,
    /// The last look has found none.
    is_idle: bool,
    /// The last look was not at all of them.
    is_partial: bool,
}

impl Default for From {
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

impl From {
    /// The time from which on to look now.
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

    /// The look for the next one has taken so long.
    pub(super) fn took(&mut self, took: Duration, now: Now) {
        if !self.is_partial {
            self.whole_at = now + took * WHOLE_LOOK_REST;
        }
    }

    /// Events were moved that were due up to then; `None`: none were.
    pub(super) fn moved(&mut self, last_us: Option<i64>) {
        self.is_idle = last_us.is_none();
        self.looks += 1;
        self.moved_us = self.moved_us.max(last_us.unwrap_or(i64::MIN));
    }

    /// When to look again, if there is none that is due: at all of them, unless that was done.
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
            from: From::default(),
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
