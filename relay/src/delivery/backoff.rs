//! How long to wait before the next attempt.

use std::time::Duration;

/// The settings `retry_backoff`, `retry_delay` and `retry_max_delay`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Backoff {
    pub exponential: bool,
    pub delay: Duration,
    pub max_delay: Duration,
}

impl Backoff {
    /// The wait after the `attempt`-th failure in a row (from 1). Exponential: it doubles each time up to `max_delay`,
    /// and a random value between half of it and all of it is taken, so that many workers do not come back at once.
    /// `random` is in `[0, 1)`.
    pub fn wait(&self, attempt: u32, random: f64) -> Duration {
        if !self.exponential {
            return self.delay;
        }
        let doubled = self.delay.saturating_mul(1 << attempt.saturating_sub(1).min(20));
        doubled.min(self.max_delay.max(self.delay)).mul_f64(0.5 + random / 2.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const B: Backoff = Backoff {
        exponential: true,
        delay: Duration::from_secs(1),
        max_delay: Duration::from_secs(60),
    };

    #[test]
    fn the_wait_doubles_up_to_the_limit() {
        let waits: Vec<_> = [1, 2, 3, 6, 7, 8, 100]
            .iter()
            .map(|n| B.wait(*n, 0.999_999).as_secs_f64().round())
            .collect();
        assert_eq!(waits, [1.0, 2.0, 4.0, 32.0, 60.0, 60.0, 60.0]);
        assert_eq!(B.wait(3, 0.0), Duration::from_secs(2));
    }

    #[test]
    fn the_wait_is_constant_when_backoff_is_off() {
        let b = Backoff {
            exponential: false,
            ..B
        };
        assert_eq!(b.wait(9, 0.3), Duration::from_secs(1));
    }
}
