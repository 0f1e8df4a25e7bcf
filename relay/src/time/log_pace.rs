//! How many lines a process may log. Each thing that goes wrong is logged once a minute, but whoever can make many
//! things go wrong, or the same in new words each time, must not fill the disk.

use crate::time::Now;
use std::time::Duration;

/// So many lines at once,
pub const BURST: u32 = 200;
/// and then so many a second.
pub const A_SECOND: u32 = 10;

/// The lines of one process.
#[derive(Debug, Default)]
pub struct LogPace {
    /// When all lines so far would be logged at the steady pace.
    paid_to: Now,
    left_out: u64,
}

impl LogPace {
    /// Whether a line may be logged now: then the number of lines that were left out before it.
    pub fn line(&mut self, now: Now) -> Option<u64> {
        let of_each = Duration::from_secs(1) / A_SECOND;
        if self.paid_to > now + of_each * (BURST - 1) {
            self.left_out += 1;
            return None;
        }
        self.paid_to = self.paid_to.max(now) + of_each;
        Some(std::mem::take(&mut self.left_out))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_burst_is_followed_by_a_few_lines_a_second_and_by_another_burst_after_a_rest() {
        let mut pace = LogPace::default();
        let mut lines = |from_ms: u64, to_ms: u64| -> (u32, u64) {
            let logged = (from_ms..to_ms).filter_map(|ms| pace.line(Duration::from_millis(ms)));
            logged.fold((0, 0), |(lines, left_out), more| (lines + 1, left_out + more))
        };
        // Another line each millisecond.
        let (burst, told) = lines(0, 1_000);
        assert!((BURST..BURST + 2 * A_SECOND).contains(&burst), "{burst}");
        let (more, told_later) = lines(1_000, 11_000);
        assert_eq!(more, 10 * A_SECOND);
        let (after_a_rest, told_at_last) = lines(60_000, 60_150);
        assert_eq!(after_a_rest, 150);
        // What was left out is told once.
        assert_eq!(told + told_later + told_at_last, u64::from(11_000 - burst - more));
    }
}
