//! How soon the next look at the table is worthwhile.
//!
//! A look, a batch and its reply cost as much as tens of events. Up to some rate, each event is sent at once. Above it,
//! looks are a moment apart, so that a busy database spends its processors on publishing. Events still arrive as early,
//! because they wait less for a processor.

use crate::time::Now;
use std::time::Duration;

/// From this many events a second on, looks are this far apart.
const PAUSES: [(f64, Duration); 2] = [
    (2_500.0, Duration::from_micros(500)),
    (6_000.0, Duration::from_millis(2)),
];
/// The time over which the rate of events is measured.
const WINDOW: Duration = Duration::from_millis(50);

/// When the last look was, and how many events come.
#[derive(Default)]
pub struct Pace {
    looked_at: Now,
    since: Now,
    /// How many were found since then.
    found: usize,
    apart: Duration,
}

impl Pace {
    pub fn looks(&mut self, now: Now) {
        self.looked_at = now;
        let time = now.saturating_sub(self.since);
        if time >= WINDOW {
            let rate = self.found as f64 / time.as_secs_f64();
            let pause = PAUSES.iter().rev().find(|(from, _)| rate >= *from);
            self.apart = pause.map_or(Duration::ZERO, |(_, apart)| *apart);
            (self.since, self.found) = (now, 0);
        }
    }

    pub fn finds(&mut self, events: usize) {
        self.found += events;
    }

    /// Whether looks are kept apart.
    pub fn is_busy(&self) -> bool {
        !self.apart.is_zero()
    }

    /// How long to wait before the next look.
    pub fn rest(&self, now: Now) -> Duration {
        (self.looked_at + self.apart).saturating_sub(now)
    }
}

/// How many rows are processed at once, so that this takes about a given time: events of others may have to wait for
/// it.
pub struct Portion {
    time: Duration,
    count: usize,
}

impl Portion {
    /// A few fixed values, so that a statement can be cached for each: its plan depends on how many rows it expects.
    const COUNTS: [usize; 6] = [20, 50, 100, 200, 500, 1_000];

    pub fn new(time: Duration) -> Self {
        Self { time, count: 50 }
    }

    pub fn count(&self) -> usize {
        self.count
    }

    /// This many rows have taken this long. A single long time may have another cause, so the count is at most halved.
    pub fn took(&mut self, rows: usize, took: Duration) {
        if took > self.time {
            let fewer = Self::COUNTS.into_iter().rfind(|count| *count <= rows / 2);
            self.count = fewer.unwrap_or(Self::COUNTS[0]).min(self.count);
        } else if rows >= self.count && took * 2 < self.time {
            let more = Self::COUNTS.into_iter().find(|count| *count > self.count);
            self.count = more.unwrap_or(self.count);
        }
    }
}

/// A large task that is done in steps, one in a round. It rests after each, so that most events of others are not
/// delayed.
#[derive(Default)]
pub struct Pieces {
    began_at: Option<Now>,
    rests_until: Now,
}

impl Pieces {
    /// It rests this many times as long as the last step has taken, with all the work that it has caused in its round:
    /// flushing, reading and sending.
    const REST: u32 = 2;

    /// Whether the next step may begin. Asked in the round after the last step. `beside_others`: others publish.
    pub fn may_begin(&mut self, beside_others: bool, now: Now) -> bool {
        if let Some(began_at) = self.began_at.take() {
            self.rests_until = now + now.saturating_sub(began_at) * Self::REST;
        }
        if !beside_others {
            self.rests_until = Now::ZERO;
        }
        now >= self.rests_until
    }

    pub fn begins(&mut self, now: Now) {
        self.began_at.get_or_insert(now);
    }

    /// When to ask again.
    pub fn rests_until(&self) -> Now {
        self.rests_until
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn steps_rest_only_while_others_publish() {
        let us = Duration::from_micros;
        let mut pieces = Pieces::default();
        assert!(pieces.may_begin(true, us(100)));
        pieces.begins(us(100));
        assert!(!pieces.may_begin(true, us(400)));
        assert_eq!(pieces.rests_until(), us(1_000));
        assert!(!pieces.may_begin(true, us(999)) && pieces.may_begin(true, us(1_000)));
        pieces.begins(us(1_000));
        assert!(pieces.may_begin(false, us(1_300)), "nobody is there");
        assert_eq!(
            pieces.rests_until(),
            Now::ZERO,
            "what is due later is not held up by it"
        );
    }

    #[test]
    fn a_portion_adapts_to_its_time() {
        for us_each in [1, 5, 30, 200] {
            let mut portion = Portion::new(Duration::from_millis(1));
            for _ in 0..100 {
                portion.took(portion.count(), portion.count() as u32 * Duration::from_micros(us_each));
            }
            let took = portion.count() as u64 * us_each;
            let is_bound = [20, 1_000].contains(&portion.count());
            assert!((300..=1_500).contains(&took) || is_bound, "{took} us");
        }
        let mut portion = Portion::new(Duration::from_millis(1));
        portion.took(3, Duration::from_micros(10));
        assert_eq!(portion.count(), 50, "there were no more");
        portion.took(50, Duration::from_secs(1));
        assert_eq!(portion.count(), 20);
    }

    /// Looks every 100 us during this many windows, and finds an event at each `nth` look. Returns the longest rest
    /// after a look.
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
    fn more_events_put_looks_further_apart() {
        for (nth, apart) in [
            (5, Duration::ZERO),
            (3, PAUSES[0].1),
            (2, PAUSES[0].1),
            (1, PAUSES[1].1),
        ] {
            assert_eq!(
                longest_rest(&mut Pace::default(), WINDOW, 10, nth),
                apart,
                "each {nth}th look"
            );
        }
    }

    #[test]
    fn looks_are_apart_only_while_many_events_come() {
        let apart = PAUSES[1].1;
        let mut pace = Pace::default();
        assert_eq!(longest_rest(&mut pace, WINDOW, 3, 1), apart);
        let now = 4 * WINDOW;
        pace.looks(now);
        assert_eq!(pace.rest(now), apart);
        assert_eq!(
            pace.rest(now + apart),
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
