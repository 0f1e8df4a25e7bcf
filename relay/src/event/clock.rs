//! Timestamps of events, which mostly ascend.

use crate::event::text::{put_digits, rfc3339};

/// Caches the second of the last timestamp: adjacent ones usually differ only in the fraction.
pub(crate) struct Clock {
    second: i64,
    text: [u8; 32],
}

impl Default for Clock {
    fn default() -> Self {
        Self {
            second: 0,
            text: rfc3339(0),
        }
    }
}

impl Clock {
    /// The time in the form of [`rfc3339`].
    pub(crate) fn rfc3339(&mut self, us: i64) -> [u8; 32] {
        let second = us.div_euclid(1_000_000);
        if second != self.second {
            (self.second, self.text) = (second, rfc3339(us));
        }
        put_digits(&mut self.text[20..26], us.rem_euclid(1_000_000) as u32);
        self.text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates() {
        for (us, text) in [
            (0, "1970-01-01T00:00:00.000000+00:00"),
            (-1, "1969-12-31T23:59:59.999999+00:00"),
            (951_782_400_000_000, "2000-02-29T00:00:00.000000+00:00"),
            (4_107_542_400_000_001, "2100-03-01T00:00:00.000001+00:00"),
            (i64::MAX, "9999-12-31T04:00:54.775807+00:00"),
        ] {
            assert_eq!(std::str::from_utf8(&rfc3339(us)).unwrap(), text);
        }
    }

    #[test]
    fn a_clock_agrees_with_the_conversion_of_each_time() {
        let mut clock = Clock::default();
        for us in [
            7,
            -1,
            -1_000_000,
            999_999,
            1_767_225_599_999_999,
            1_767_225_599_000_000,
            i64::MAX,
            i64::MAX - 1,
        ] {
            assert_eq!(clock.rfc3339(us), rfc3339(us), "{us}");
        }
    }
}
