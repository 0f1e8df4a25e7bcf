//! Batches in flight, and their limits.

use crate::failure::{Class, Failure};
use crate::reading::range::Position;
use crate::reading::schedule::Supply;
use std::rc::Rc;

/// How many batches are sent to Redis at once, so that the next one is there when one is done.
pub const PIPELINED_BATCHES: usize = 4;

/// How many batches a sender may have, whether sent or not.
pub const WINDOW_BATCHES: usize = 32;

/// How many bytes may be in flight for one backend. A single larger batch is sent alone.
pub(super) const WINDOW_BYTES: usize = 2 * 1024 * 1024;

/// The index of a refused command in its batch, and the failure.
pub type Refusal = (usize, Failure);

/// Whether a refusal blames the backend rather than the event.
pub fn is_backends(refusal: &Refusal) -> bool {
    refusal.1.class != Class::Event
}

/// What a delivery needs to know about an event of a batch.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BatchedEvent {
    pub seq: i64,
    pub stream: Rc<str>,
    /// Total number of attempts before it fails, if Redis refuses it.
    pub max_attempts: u32,
    /// Its transaction committed after this time, in microseconds since 1970.
    pub committed_after_us: i64,
}

/// See [`Delivery::room`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Window {
    pub batches: usize,
    pub bytes: usize,
    /// The limits when nothing is in flight.
    pub whole_batches: usize,
    pub whole_bytes: usize,
    /// How many events may be sent now according to the backend's pace.
    pub events: usize,
}

impl Window {
    /// How much work a sender with this much room has. It has enough if a quarter of the window or more is in flight.
    pub fn supply(self) -> Supply {
        let has_enough = self.batches <= self.whole_batches / 4 * 3 || self.bytes <= self.whole_bytes / 4 * 3;
        let is_ample = self.batches >= self.whole_batches / 4 && self.bytes >= self.whole_bytes / 4;
        match (has_enough, is_ample) {
            (false, _) => Supply::Low,
            (true, true) => Supply::Enough,
            (true, false) => Supply::Full,
        }
    }
}

/// The contents of a batch.
pub enum Contents {
    /// Rows that were read in order. When all are acknowledged, the cursor stands at `end`.
    Rows { end: Position },
    /// Refused events that are tried again, grouped by stream. `all`: streams in which no other event waits.
    Waiting { all: Vec<Rc<str>> },
}

/// A batch as it is counted when its replies come.
pub struct Answered<'a> {
    pub entries: &'a [BatchedEvent],
    pub bytes: usize,
    /// Whether its events had been refused before.
    pub again: bool,
}

pub(super) struct Flight {
    pub(super) entries: Vec<BatchedEvent>,
    pub(super) contents: Contents,
    pub(super) bytes: usize,
    /// Rows of `Delivery::ahead` that lie before it.
    pub(super) aside: Vec<i64>,
}

impl Flight {
    /// The streams whose waiting events it tries again, each once.
    pub(super) fn retried(&self) -> Vec<Rc<str>> {
        match self.contents {
            Contents::Waiting { .. } => streams_of(&self.entries),
            Contents::Rows { .. } => Vec::new(),
        }
    }
}

/// Events of one stream are adjacent.
pub(super) fn streams_of(entries: &[BatchedEvent]) -> Vec<Rc<str>> {
    let mut streams: Vec<Rc<str>> = entries.iter().map(|e| e.stream.clone()).collect();
    streams.dedup();
    streams
}
