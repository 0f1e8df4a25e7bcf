//! Watches another server's guard: whether its owner still refreshes it.

use crate::guard::Guard;
use crate::time::Now;
use std::time::Duration;

/// An owner counts as gone when it has missed this many refreshes.
const MISSED_BEATS: u32 = 3;
/// The same after an outage of Redis: the owner may wait longer than this server before it tries again.
const MISSED_AFTER_OUTAGE: u32 = 12;
/// If two looks are further apart than two refreshes plus this, an outage is assumed between them.
const LATE_LOOK: Duration = Duration::from_secs(1);

/// What is remembered about a guard that is being watched.
#[derive(Default)]
pub struct Watch {
    seen: Option<Sighting>,
    /// Whether the guard has changed while it was watched.
    moved: bool,
    /// How many refreshes must be missed at present.
    missable: u32,
}

/// The guard as it was last seen.
struct Sighting {
    /// Token, number and beat: everything that an owner does changes one of them.
    mark: (String, u64, u64),
    /// How often the owner refreshes it.
    interval: Duration,
    /// When it was first seen in this state.
    since: Now,
    looked_at: Now,
    /// Whether Redis was unreachable since then.
    interrupted: bool,
}

impl Watch {
    /// Redis is unreachable, perhaps for the owner too: then its silence proves nothing.
    pub fn interrupt(&mut self) {
        if let Some(seen) = &mut self.seen {
            seen.interrupted = true;
        }
    }

    /// Whether the owner is known to be alive.
    pub(super) fn has_moved(&self) -> bool {
        self.moved
    }

    /// Looks at the guard. Returns for how much longer it must not change before its owner counts as gone.
    pub(super) fn look(&mut self, guard: &Guard, now: Now) -> Duration {
        let mark = (guard.token.clone(), guard.number, guard.beat);
        let gap = guard.interval * 2 + LATE_LOOK;
        let mut since = now;
        match &self.seen {
            Some(seen) if seen.mark != mark => (self.moved, self.missable) = (true, MISSED_BEATS),
            // The owner may have refreshed it without being seen.
            Some(seen) if seen.interrupted || now > seen.looked_at + gap => self.missable = MISSED_AFTER_OUTAGE,
            Some(seen) => since = seen.since,
            None => self.missable = MISSED_BEATS,
        }
        let looked_at = now;
        let interval = guard.interval;
        self.seen = Some(Sighting {
            mark,
            interval,
            since,
            looked_at,
            interrupted: false,
        });
        (interval * self.missable).saturating_sub(now - since)
    }

    /// The guard is missing. If another server owned it, that one goes first. Returns how often to look meanwhile, and
    /// for how long.
    pub(super) fn misses(&self, now: Now) -> Option<(Duration, Duration)> {
        let seen = self.seen.as_ref()?;
        let rest = (seen.interval * MISSED_AFTER_OUTAGE).saturating_sub(now.saturating_sub(seen.looked_at));
        (!rest.is_zero()).then_some((seen.interval, rest))
    }
}
