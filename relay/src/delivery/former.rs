//! Lanes of a cluster that are given up, so that other hash slots can have one. When an event for its hash slot comes,
//! a former lane goes on. Its cursor is kept until then.

use crate::delivery::Delivery;
use crate::delivery::state::ConnectionState;
use crate::reading::range::Position;

/// Whether a lane can be given up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GivesUp {
    Now,
    /// As soon as what is in flight is acknowledged, if it reads nothing more.
    Soon,
    NotYet,
}

impl Delivery {
    /// Whether a lane can be given up: nothing is on its way or waits, and it has come at least as far as its finder.
    /// So the finder meets all further events of its hash slot.
    pub fn gives_up(&self, finder: &Position) -> GivesUp {
        let is_settled = matches!(self.connection, ConnectionState::Up | ConnectionState::Down { .. });
        let waits = self.streams.has_waiting() || !self.ahead.is_empty();
        match is_settled && !waits && self.acked.includes(finder) {
            false => GivesUp::NotYet,
            true if self.flights.is_empty() && self.read == self.acked => GivesUp::Now,
            true => GivesUp::Soon,
        }
    }
}

impl Position {
    /// Where a former lane goes on that stood here, now that its finder stands at `finder`. The finder may not have
    /// come to what the lane has sent. If it has, its position is nearer to the next event.
    pub fn goes_on_from(self, finder: Self) -> Self {
        match finder.includes(&self) {
            true => finder,
            false => self,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::delivery::backoff::Backoff;
    use crate::delivery::flight::{BatchedEvent, Contents};
    use crate::delivery::refusal::Streams;
    use crate::delivery::{Cursor, Guarantee};
    use crate::time::Now;
    use std::rc::Rc;
    use std::time::Duration;

    const EARLY: &str = "10:10:/10/7/9";
    const LATE: &str = "20:20:/20/17/19";
    const ON_THE_WAY: &str = "10:10:/10/7/9>20:20:/20/17/19@12";

    fn position(text: &str) -> Position {
        text.parse().expect("a position")
    }

    fn lane(at: &str, streams: Streams) -> Delivery {
        let cursor = Cursor {
            position: position(at),
            number: 0,
        };
        let backoff = Backoff {
            exponential: false,
            delay: Duration::ZERO,
            max_delay: Duration::ZERO,
        };
        let mut lane = Delivery::new(Guarantee::ExactlyOnce, cursor, streams, backoff);
        lane.connected();
        lane
    }

    fn gives_up(lane: &Delivery, finder: &str) -> GivesUp {
        lane.gives_up(&position(finder))
    }

    #[test]
    fn a_lane_is_given_up_where_its_finder_has_passed_nothing_that_it_must_send() {
        let at_late = lane(LATE, Streams::default());
        for finder in [EARLY, ON_THE_WAY, LATE] {
            assert_eq!(gives_up(&at_late, finder), GivesUp::Now, "{finder}");
        }
        for (at, finder) in [(EARLY, LATE), (EARLY, ON_THE_WAY), (ON_THE_WAY, ON_THE_WAY)] {
            assert_eq!(gives_up(&lane(at, Streams::default()), finder), GivesUp::NotYet, "{at}");
        }
    }

    #[test]
    fn a_lane_is_kept_while_events_wait_or_are_in_flight() {
        let waiting = Streams::waiting([("stream".to_owned(), 1)]);
        assert_eq!(gives_up(&lane(LATE, waiting), EARLY), GivesUp::NotYet);
        let mut sending = lane(LATE, Streams::default());
        let event = BatchedEvent {
            seq: 21,
            stream: Rc::from("stream"),
            max_attempts: 1,
            committed_after_us: 0,
        };
        let end = position("30:30:/30/27/29");
        sending.sent(vec![event], Contents::Rows { end: end.clone() }, 1);
        sending.advanced(end);
        assert_eq!(gives_up(&sending, LATE), GivesUp::Soon);
        sending.replied(Vec::new(), Now::ZERO, 0.5);
        assert_eq!(gives_up(&sending, LATE), GivesUp::Now);
        // Its connection is being opened, or must be first.
        sending.abandon();
        assert_eq!(gives_up(&sending, LATE), GivesUp::Now);
        sending.connecting();
        assert_eq!(gives_up(&sending, LATE), GivesUp::NotYet);
    }

    #[test]
    fn a_former_lane_goes_on_where_more_was_passed() {
        let goes_on = |lane: &str, finder: &str| position(lane).goes_on_from(position(finder)).to_string();
        assert_eq!(goes_on(EARLY, LATE), LATE);
        assert_eq!(goes_on(EARLY, ON_THE_WAY), ON_THE_WAY);
        assert_eq!(goes_on(LATE, ON_THE_WAY), LATE);
        assert_eq!(goes_on(LATE, EARLY), LATE);
    }
}
