//! Patience with tasks that fail, separately for each: a failed task is tried again after a while, twice as long each
//! time, and nothing else waits for it. A failure is reported at once and again each minute. One that may pass soon (a
//! lock) is reported only if it lasts.

use crate::time::Now;
use std::collections::BTreeMap;
use std::time::Duration;

/// The same failure is reported again after this time.
const TELL_AGAIN_AFTER: Duration = Duration::from_secs(60);
/// So many different failures of a task are reported within that time. Their words may be of somebody else's choice.
const TOLD: usize = 8;
/// A failure that may pass soon is reported when it has lasted this long.
const MAY_PASS_WITHIN: Duration = Duration::from_secs(1);

/// The first wait, and the longest.
#[derive(Clone, Copy, Debug)]
pub struct Waits {
    pub first: Duration,
    pub longest: Duration,
}

struct Setback {
    since: Now,
    failures: u32,
    retry_at: Now,
    told: Vec<(String, Now)>,
}

/// The failures by task.
pub struct Patience<T> {
    setbacks: BTreeMap<T, Setback>,
}

impl<T> Default for Patience<T> {
    fn default() -> Self {
        Self {
            setbacks: BTreeMap::new(),
        }
    }
}

impl<T: Ord + Copy> Patience<T> {
    /// Whether a task may be tried now.
    pub fn allows(&self, task: T, now: Now) -> bool {
        self.retry_at(task).is_none_or(|at| at <= now)
    }

    /// When a task that failed is tried again.
    pub fn retry_at(&self, task: T) -> Option<Now> {
        // The usual case must cost almost nothing.
        if self.setbacks.is_empty() {
            return None;
        }
        self.setbacks.get(&task).map(|setback| setback.retry_at)
    }

    /// When the next of all failed tasks is tried again.
    pub fn next_retry_at(&self) -> Option<Now> {
        self.setbacks.values().map(|setback| setback.retry_at).min()
    }

    pub fn succeeded(&mut self, task: T) {
        if !self.setbacks.is_empty() {
            self.setbacks.remove(&task);
        }
    }

    /// Forgets tasks that no longer exist.
    pub fn retain(&mut self, mut is_known: impl FnMut(T) -> bool) {
        self.setbacks.retain(|task, _| is_known(*task));
    }

    /// Notes a failure. Returns whether to report it. `may_pass`: it may pass soon.
    pub fn failed(&mut self, task: T, message: &str, may_pass: bool, waits: Waits, now: Now) -> bool {
        let setback = self.setbacks.entry(task).or_insert(Setback {
            since: now,
            failures: 0,
            retry_at: now,
            told: Vec::new(),
        });
        let wait = waits.first.saturating_mul(1 << setback.failures.min(20));
        setback.failures += 1;
        setback.retry_at = now + wait.min(waits.longest);
        setback.told.retain(|(_, at)| now < *at + TELL_AGAIN_AFTER);
        let is_told = setback.told.len() >= TOLD || setback.told.iter().any(|(told, _)| told == message);
        if is_told || (may_pass && now < setback.since + MAY_PASS_WITHIN) {
            return false;
        }
        setback.told.push((message.to_owned(), now));
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const WAITS: Waits = Waits {
        first: Duration::from_millis(100),
        longest: Duration::from_millis(500),
    };

    fn ms(ms: u64) -> Now {
        Duration::from_millis(ms)
    }

    #[test]
    fn each_task_waits_by_itself_twice_as_long_each_time() {
        let mut patience = Patience::default();
        patience.failed(1, "no", false, WAITS, ms(0));
        assert!(!patience.allows(1, ms(99)) && patience.allows(1, ms(100)) && patience.allows(2, ms(0)));
        for (now, then) in [(100, 300), (300, 700), (700, 1_200), (1_200, 1_700)] {
            patience.failed(1, "no", false, WAITS, ms(now));
            assert_eq!(patience.retry_at(1), Some(ms(then)));
        }
        assert_eq!(patience.next_retry_at(), Some(ms(1_700)));
        patience.succeeded(1);
        assert_eq!((patience.retry_at(1), patience.next_retry_at()), (None, None));
    }

    #[test]
    fn a_failure_is_reported_at_once_and_each_minute_and_a_lock_when_it_lasts() {
        let mut patience = Patience::default();
        assert!(patience.failed(1, "broken", false, WAITS, ms(0)));
        assert!(!patience.failed(1, "broken", false, WAITS, ms(59_999)));
        assert!(patience.failed(1, "otherwise", false, WAITS, ms(59_999)));
        assert!(patience.failed(1, "broken", false, WAITS, ms(60_000)));
        assert!(!patience.failed(2, "locked", true, WAITS, ms(0)));
        assert!(!patience.failed(2, "locked", true, WAITS, ms(999)));
        assert!(patience.failed(2, "locked", true, WAITS, ms(1_000)));
        assert!(!patience.failed(2, "locked", true, WAITS, ms(2_000)));
    }

    #[test]
    fn few_failures_are_reported_in_a_minute_whatever_their_words_are() {
        let mut patience = Patience::default();
        let mut reported = |from_ms: u64| {
            let words = (from_ms..from_ms + 1_000).map(|n| (n, format!("failure {n}")));
            words
                .filter(|(n, words)| patience.failed(1, words, false, WAITS, ms(*n)))
                .count()
        };
        assert_eq!([reported(0), reported(30_000), reported(61_000)], [TOLD, 0, TOLD]);
    }
}
