//! How soon the next look at the table is worth while.
//!
//! A look, a batch and its reply cost as much as tens of events. Up to some rate each event is sent at once; beyond, the looks are a
//! moment apart, so that a busy database spends its processors on publishing.

use crate::delivery::Now;
use std::time::Duration;

/// Events a second from which on looks are so far apart,
const BUSY_RATE: f64 = 6_000.0;
const APART: Duration = Duration::from_millis(2);
/// and how long their rate is taken.
const WINDOW: Duration = Duration::from_millis(50);

/// When the last look was, and how many events come.
#[derive(Default)]
pub struct Pace {
    looked_at: Now,
    since: Now,
    /// Since then.
    found: usize,
    is_busy: bool,
}

impl Pace {
    pub fn looks(&mut self, now: Now) {
        self.looked_at = now;
        let time = now.saturating_sub(self.since);
        if time >= WINDOW {
            self.is_busy = self.found as f64 >= BUSY_RATE * time.as_secs_f64();
            (self.since, self.found) = (now, 0);
        }
    }

    pub fn finds(&mut self, events: usize) {
        self.found += events;
    }

    /// Whether looks are apart.
    pub fn is_busy(&self) -> bool {
        self.is_busy
    }

    /// How long to wait with the next look.
    pub fn rest(&self, now: Now) -> Duration {
        let pause = if self.is_busy { APART } else { Duration::ZERO };
        (self.looked_at + pause).saturating_sub(now)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Looks each 100 us for so many windows, and finds an event each `nth` time. How long is the rest after each look at most?
    fn longest_rest(pace: &mut Pace, from: Now, windows: u32, nth: u32) -> Duration {
        let step = Duration::from_micros(100);
        let looks = windows * (WINDOW.as_micros() / step.as_micros()) as u32;
        let rests = (0..looks).map(|n| {
            let now = from + n * step;
            pace.looks(now);
            pace.finds(usize::from(n % nth == 0));
            pace.rest(now)
        });
        rests.max().unwrap_or_default()
    }

    #[test]
    fn what_comes_slowly_is_looked_for_at_once() {
        assert_eq!(longest_rest(&mut Pace::default(), WINDOW, 10, 2), Duration::ZERO);
    }

    #[test]
    fn looks_are_apart_while_many_come_and_no_longer() {
        let mut pace = Pace::default();
        assert_eq!(longest_rest(&mut pace, WINDOW, 3, 1), APART);
        let now = 4 * WINDOW;
        pace.looks(now);
        assert_eq!(pace.rest(now), APART);
        assert_eq!(
            pace.rest(now + APART),
            Duration::ZERO,
            "what comes later has waited enough"
        );
        pace.looks(now + 100 * WINDOW);
        assert_eq!(
            pace.rest(now + 100 * WINDOW),
            Duration::ZERO,
            "nothing came for a while"
        );
    }
}
