//! Evaluates the replies to a batch: how far the cursor moves, and what has to be recorded.

use crate::delivery::flight::{BatchedEvent, Contents, Flight, Refusal, is_backends, streams_of};
use crate::delivery::refusal::Record;
use crate::delivery::state::ConnectionState;
use crate::delivery::{Delivery, Guarantee};
use crate::failure::{Class, Failure};
use crate::reading::range::Position;
use crate::time::Now;

impl Delivery {
    /// All replies of the oldest batch have come. Returns what must be recorded before the cursor is saved.
    pub fn replied(&mut self, refused: Vec<Refusal>, now: Now, random: f64) -> Vec<Record> {
        let Some(flight) = self.flights.pop_front() else {
            return Vec::new();
        };
        self.in_flight_bytes -= flight.bytes;
        self.scarce_bytes = self.scarce_bytes.saturating_mul(2);
        if self.guarantee == Guarantee::ExactlyOnce {
            return self.appended(flight, refused, now, random);
        }
        let count = flight.entries.len();
        let blamed = refused.iter().find(|r| is_backends(r)).map(|r| r.1.clone());
        let records = self.land(flight, count, refused, now, random);
        match blamed {
            Some(failure) if self.connection == ConnectionState::Up => {
                let retry_at = self.failed(failure, now, random);
                self.connection = ConnectionState::Draining { retry_at };
            }
            None if self.connection == ConnectionState::Up => {
                self.attempts.succeeded();
                self.trouble = None;
            }
            // These are replies after the first one that blamed the backend.
            Some(_) | None => {}
        }
        self.ack_what_was_read();
        records
    }

    /// Takes the first `known` results of a flight: moves the cursor over rows that were accepted or refused, remembers
    /// what was accepted beyond a gap, and returns what to record.
    pub(super) fn land(
        &mut self,
        flight: Flight,
        known: usize,
        refused: Vec<Refusal>,
        now: Now,
        random: f64,
    ) -> Vec<Record> {
        let whole = known == flight.entries.len() && !refused.iter().any(is_backends);
        let mut records = Vec::new();
        let mut refused = refused.into_iter().peekable();
        let (again, ends_range) = match &flight.contents {
            Contents::Rows { end } => (false, end.under_way.is_none()),
            Contents::Waiting { .. } => (true, false),
        };
        // Set at the first entry that blames the backend, which the cursor cannot pass. If a batch ends its range, no
        // position stands for a part of it.
        let mut gap = matches!(self.connection, ConnectionState::Draining { .. }) || (!whole && ends_range);
        let mut passed: Option<i64> = None;
        for (index, entry) in flight.entries.iter().enumerate().take(known) {
            match refused.next_if(|r| r.0 == index) {
                None => {
                    self.accepted += 1;
                    records.extend(self.streams.accepted(entry, again));
                }
                Some((_, failure)) if failure.class != Class::Event => {
                    gap = true;
                    continue;
                }
                Some((_, failure)) => records.push(self.refused(entry, again, &failure, now, random)),
            }
            if !gap {
                passed = Some(entry.seq);
            } else if !again {
                self.ahead.insert(entry.seq);
            }
        }
        match flight.contents {
            Contents::Waiting { .. } => {
                for stream in streams_of(&flight.entries) {
                    self.streams.end_retry(&stream);
                    if !whole {
                        self.streams.waits_again(&stream);
                    }
                }
            }
            Contents::Rows { end } if whole && !gap => {
                self.ack(end);
                self.ahead.forget(&flight.aside);
            }
            Contents::Rows { end } => {
                if let (Some(seq), Some(under_way)) = (passed, end.under_way) {
                    self.ack(Position::towards(end.from, under_way.to, seq));
                }
            }
        }
        records
    }

    pub(super) fn refused(
        &mut self,
        entry: &BatchedEvent,
        again: bool,
        failure: &Failure,
        now: Now,
        random: f64,
    ) -> Record {
        let backoff = &self.attempts.backoff;
        let wait = |attempt| backoff.wait(attempt, random);
        self.streams.refused(entry, again, failure, now, wait)
    }

    /// With no rows in flight, everything that was read was accepted, parked or skipped.
    pub(super) fn ack_what_was_read(&mut self) {
        let rows_in_flight = self.flights.iter().any(|f| matches!(f.contents, Contents::Rows { .. }));
        if !rows_in_flight && !matches!(self.connection, ConnectionState::Draining { .. }) {
            self.ack(self.read.clone());
            let passed = self.ahead.take_aside();
            self.ahead.forget(&passed);
        }
    }
}
