//! Limits how many events a backend may send: `max_rate` of its row, so that a draining backlog does not overload its
//! consumers. This is a token bucket; each event that is sent takes a token, even if it is sent again.

use crate::time::Now;
use std::time::Duration;

/// What a backend that was idle may send at once, as a fraction of a second.
const BURST: u32 = 20;
/// Looking for events is not worthwhile for less than this fraction of a second's events.
const PORTION: u32 = 100;

#[derive(Clone, Debug)]
pub struct Bucket {
    per_second: u32,
    /// Negative if more was sent than it had.
    tokens: i64,
    /// The time up to which it was filled.
    filled_to: Now,
}

impl Bucket {
    /// A full bucket.
    pub fn new(per_second: u32, now: Now) -> Self {
        let mut bucket = Self {
            per_second: per_second.max(1),
            tokens: 0,
            filled_to: now,
        };
        bucket.tokens = bucket.capacity();
        bucket
    }

    pub fn per_second(&self) -> u32 {
        self.per_second
    }

    fn capacity(&self) -> i64 {
        i64::from((self.per_second / BURST).max(1))
    }

    /// How long it takes to gain this many tokens.
    fn time_of(&self, tokens: u64) -> Duration {
        // Rounded up, so that no token is given twice.
        let nanos = (u128::from(tokens) * 1_000_000_000).div_ceil(u128::from(self.per_second));
        Duration::from_nanos(u64::try_from(nanos).unwrap_or(u64::MAX))
    }

    /// How many events may be sent now.
    pub fn available(&mut self, now: Now) -> usize {
        let passed = now.saturating_sub(self.filled_to);
        let gained = passed.as_nanos() * u128::from(self.per_second) / 1_000_000_000;
        let gained = i64::try_from(gained).unwrap_or(i64::MAX);
        let tokens = self.tokens.saturating_add(gained);
        match tokens >= self.capacity() {
            true => (self.tokens, self.filled_to) = (self.capacity(), now),
            // The rest of the time counts for the next token.
            false => (self.tokens, self.filled_to) = (tokens, self.filled_to + self.time_of(gained as u64)),
        }
        usize::try_from(self.tokens).unwrap_or(0)
    }

    /// Notes that this many events were sent.
    pub fn spend(&mut self, events: usize) {
        self.tokens = self.tokens.saturating_sub(i64::try_from(events).unwrap_or(i64::MAX));
    }

    /// When looking for more events is worthwhile.
    pub fn next_at(&self) -> Now {
        let portion = i64::from((self.per_second / PORTION).max(1)).min(self.capacity());
        let missing = u64::try_from(portion.saturating_sub(self.tokens)).unwrap_or(0);
        self.filled_to + self.time_of(missing)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Sends everything that it may during `time`, checking every `step`, or when it is worthwhile.
    fn sent(bucket: &mut Bucket, from: Now, time: Duration, step: Option<Duration>) -> (usize, u32) {
        let (mut now, mut sent, mut looks) = (from, 0, 0);
        while now < from + time {
            let events = bucket.available(now);
            bucket.spend(events);
            sent += events;
            looks += 1;
            now = step.map_or_else(|| bucket.next_at().max(now), |step| now + step);
        }
        (sent, looks)
    }

    #[test]
    fn the_rate_does_not_depend_on_how_often_it_is_checked() {
        for rate in [1, 2, 7, 99, 1_000, 33_333, 1_000_000, u32::MAX] {
            for step in [None, Some(Duration::from_micros(333)), Some(Duration::from_millis(7))] {
                let seconds = 10;
                let mut bucket = Bucket::new(rate, Now::ZERO);
                let (sent, looks) = sent(&mut bucket, Now::ZERO, Duration::from_secs(seconds), step);
                let exact = u64::from(rate) * seconds;
                let burst = u64::from(rate / BURST).max(1);
                let range = exact.saturating_sub(burst)..=exact + burst;
                assert!(
                    range.contains(&(sent as u64)),
                    "{sent} at {rate} a second, each {step:?}"
                );
                assert!(
                    step.is_some() || u64::from(looks) <= seconds * u64::from(PORTION.min(rate)) + 2,
                    "{looks} looks"
                );
            }
        }
    }

    #[test]
    fn idle_time_gives_at_most_one_burst() {
        let mut bucket = Bucket::new(1_000, Now::ZERO);
        assert_eq!(bucket.available(Duration::from_secs(3_600)), 50);
        bucket.spend(50);
        assert_eq!(bucket.available(Duration::from_secs(3_600)), 0);
        assert_eq!(bucket.available(Duration::from_millis(3_600_010)), 10);
    }

    #[test]
    fn tokens_that_were_overdrawn_are_waited_for() {
        let mut bucket = Bucket::new(100, Now::ZERO);
        assert_eq!(bucket.available(Now::ZERO), 5);
        bucket.spend(105);
        assert_eq!(bucket.available(Duration::from_millis(990)), 0);
        assert!(bucket.next_at() > Duration::from_secs(1));
        assert_eq!(bucket.available(Duration::from_millis(1_010)), 1);
    }

    #[test]
    fn a_clock_that_stands_still_or_goes_back_gives_no_tokens() {
        let now = Duration::from_secs(5);
        let mut bucket = Bucket::new(10, now);
        bucket.spend(1);
        assert_eq!(bucket.available(Duration::from_secs(4)), 0);
        assert_eq!(bucket.available(now), 0);
    }
}
