//! Limits how long a reply or a write may take as a whole. A socket's own timeout starts again with each byte, so a
//! peer that sends (or takes) one byte at a time could block a connection for ever.

use std::time::{Duration, Instant};

/// A long reply has the timeout for each piece of this size, so that it is not cut off on a slow network.
pub(super) const PIECE_BYTES: usize = 64 * 1024;

pub(super) struct Deadline {
    timeout: Duration,
    until: Instant,
    /// The bytes of the current piece.
    bytes: usize,
}

impl Deadline {
    pub(super) fn new(timeout: Duration, now: Instant) -> Self {
        Self {
            timeout,
            until: now + timeout,
            bytes: 0,
        }
    }

    /// This many bytes were moved by `now`. Returns how long the rest may take; `None`: the time is up.
    pub(super) fn moved(&mut self, bytes: usize, now: Instant) -> Option<Duration> {
        self.bytes += bytes;
        if self.bytes >= PIECE_BYTES {
            (self.bytes, self.until) = (0, now + self.timeout);
        }
        Some(self.until.saturating_duration_since(now)).filter(|left| !left.is_zero())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_whole_pieces_extend_the_deadline() {
        let (start, ms) = (Instant::now(), Duration::from_millis);
        let mut deadline = Deadline::new(ms(100), start);
        assert_eq!(deadline.moved(1, start + ms(60)), Some(ms(40)));
        assert_eq!(deadline.moved(1, start + ms(90)), Some(ms(10)));
        assert_eq!(deadline.moved(PIECE_BYTES, start + ms(95)), Some(ms(100)));
        assert_eq!(deadline.moved(1, start + ms(150)), Some(ms(45)));
        assert_eq!(deadline.moved(1, start + ms(195)), None);
    }
}
