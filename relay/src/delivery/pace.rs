//! What a delivery may send within the pace of its backend. The worker shares the tokens
//! ([`Bucket`](super::max_rate::Bucket)).

use crate::delivery::Delivery;
use crate::time::Now;

impl Delivery {
    /// From now on it may send this many events; `None`: any number. `wants`: there may be events to send.
    pub fn allow(&mut self, events: Option<usize>, wants: bool, now: Now) {
        // Rows are read before waiting events are tried again, and would otherwise use up all tokens.
        let is_due = self.streams.next_retry_at().is_some_and(|at| at <= now);
        let reserved = events.filter(|_| is_due).map_or(0, |events| events.div_ceil(2));
        self.allowance.grant(events, reserved, wants);
    }

    /// Whether there may be more to send, which waits for the pace.
    pub fn is_paced(&self) -> bool {
        self.allowance.is_paced()
    }

    /// How many events were sent since this was last called.
    pub fn take_sent(&mut self) -> usize {
        self.allowance.take_sent()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::delivery::backoff::Backoff;
    use crate::delivery::flight::{BatchedEvent, Contents};
    use crate::delivery::refusal::Streams;
    use crate::delivery::state::State;
    use crate::delivery::{Cursor, Guarantee};
    use crate::reading::range::Position;
    use std::rc::Rc;
    use std::time::Duration;

    fn delivery(streams: Streams) -> Delivery {
        let position = Position::beginning();
        let backoff = Backoff {
            exponential: false,
            delay: Duration::from_secs(1),
            max_delay: Duration::from_secs(1),
        };
        let mut delivery = Delivery::new(Guarantee::AtLeastOnce, Cursor { position, number: 0 }, streams, backoff);
        delivery.connecting();
        delivery.connected();
        delivery
    }

    fn send(delivery: &mut Delivery, events: usize) {
        let event = |seq| BatchedEvent {
            seq,
            stream: Rc::from("s"),
            max_attempts: 1,
            committed_after_us: 0,
        };
        let end = Position::beginning();
        delivery.sent((1..=events as i64).map(event).collect(), Contents::Rows { end }, 100);
    }

    #[test]
    fn no_more_is_sent_than_is_allowed() {
        let mut delivery = delivery(Streams::default());
        assert_eq!(delivery.room().map(|room| room.events), Some(usize::MAX));
        delivery.allow(Some(5), true, Now::ZERO);
        send(&mut delivery, 3);
        assert_eq!(delivery.room().map(|room| room.events), Some(2));
        send(&mut delivery, 2);
        assert_eq!((delivery.room(), delivery.is_paced()), (None, true));
        assert_eq!((delivery.take_sent(), delivery.take_sent()), (5, 0));
        delivery.allow(None, true, Now::ZERO);
        assert!(delivery.room().is_some() && !delivery.is_paced());
    }

    #[test]
    fn a_backend_that_waits_for_its_pace_is_not_idle() {
        let mut delivery = delivery(Streams::default());
        for (events, wants, state) in [
            (Some(0), true, State::Sending),
            (Some(0), false, State::Idle),
            (Some(1), true, State::Idle),
            (None, true, State::Idle),
        ] {
            delivery.allow(events, wants, Now::ZERO);
            assert_eq!(delivery.state(), state, "{events:?} {wants}");
        }
    }

    #[test]
    fn half_is_left_to_waiting_events_that_are_due() {
        let now = Duration::from_secs(100);
        for (allowed, rows, retried) in [(Some(10), Some(5), 1), (Some(1), None, 1), (Some(0), None, 0)] {
            let mut delivery = delivery(Streams::waiting([("bad".to_owned(), 1)]));
            delivery.allow(allowed, true, now);
            assert_eq!(delivery.room().map(|room| room.events), rows, "{allowed:?}");
            assert_eq!(delivery.streams_to_retry(now, 100, 100).len(), retried, "{allowed:?}");
        }
    }
}
