//! Streams with waiting refused events, which are tried again.

use crate::delivery::flight::{Contents, Flight};
use crate::delivery::refusal::{Retry, Streams};
use crate::delivery::state::ConnectionState;
use crate::delivery::{Delivery, Guarantee};
use crate::time::Now;
use std::rc::Rc;

impl Delivery {
    pub fn streams(&self) -> &Streams {
        &self.streams
    }

    /// The names of the backend's streams have changed with its settings, or failed events were deleted.
    pub fn set_streams(&mut self, mut streams: Streams) {
        streams.go_on_from(&self.streams);
        self.streams = streams;
        self.mark_retries();
    }

    /// Marks the streams that are being tried, so that they are not tried twice at the same time.
    pub(super) fn mark_retries(&mut self) {
        for stream in self.flights.iter().flat_map(Flight::retried) {
            self.streams.retrying(&stream);
        }
    }

    /// The streams whose waiting events are to be tried again now in one batch, and how many events of each: only the
    /// head, in at most `heads` streams whose head is not accepted yet, and `followers` events in total of other
    /// streams. For a stream of which nothing is sent, call [`Self::stream_cleared`] or [`Self::stream_put_back`].
    pub fn streams_to_retry(&mut self, now: Now, heads: usize, followers: usize) -> Vec<Retry> {
        if self.connection == ConnectionState::Up
            && !self
                .flights
                .iter()
                .any(|f| matches!(f.contents, Contents::Waiting { .. }))
        {
            self.streams.retried(now);
        }
        if self.is_rereading() {
            return Vec::new();
        }
        if self.guarantee == Guarantee::ExactlyOnce && !self.flights.is_empty() {
            self.makes_way = self.streams.next_retry_at().is_some_and(|at| at <= now);
            return Vec::new();
        }
        self.makes_way = false;
        let most = self.allowance.for_waiting();
        if most == 0 || self.room_but_for_pace().is_none() {
            return Vec::new();
        }
        self.streams.due(now, heads.min(most), followers.min(most))
    }

    /// There was no room for events of this stream: they are tried with the next batch.
    pub fn stream_put_back(&mut self, stream: &Rc<str>) {
        self.streams.rests(stream);
    }

    /// At most `count` streams whose head has failed, with the reason. When all records are written down, all events
    /// that wait in them must fail, and [`Self::stream_failed`] must be called.
    pub fn streams_to_fail(&self, count: usize) -> Vec<(Rc<str>, Rc<str>)> {
        self.streams.to_fail(count)
    }

    /// All waiting events of this stream have failed durably. Later ones have one attempt.
    pub fn stream_failed(&mut self, stream: &Rc<str>) {
        self.streams.failed(stream);
    }

    /// No event of this stream waits any more.
    pub fn stream_cleared(&mut self, stream: &Rc<str>) {
        self.streams.cleared(stream);
    }

    /// The waiting events of a stream could not be read: they are tried again later.
    pub fn retry_failed(&mut self) {
        self.streams.abandon();
        self.mark_retries();
    }
}
