//! The connection of a delivery: how it is opened, and what happens when it ends.

use crate::delivery::Delivery;
use crate::delivery::flight::Refusal;
use crate::delivery::refusal::Record;
use crate::delivery::state::ConnectionState;
use crate::failure::{Class, Failure};
use crate::time::Now;

impl Delivery {
    /// Somebody has asked for an attempt. There is one, at most once a second. If it fails, the wait continues as if
    /// nobody had asked.
    pub fn retry_asked(&mut self, now: Now) {
        let ConnectionState::Down { retry_at } = &mut self.connection else {
            return;
        };
        *retry_at = self.attempts.asked(*retry_at, now);
    }

    /// The settings have changed: forget the wait. The first few changes cause an attempt each; after that there is one
    /// attempt a second.
    pub fn retry_changed(&mut self, now: Now) {
        self.attempts.forget_wait();
        let ConnectionState::Down { retry_at } = &mut self.connection else {
            return;
        };
        *retry_at = self.attempts.changed(now);
    }

    /// A connection is due, but the worker may not open more.
    pub fn waits_for_room(&mut self, failure: Failure) {
        self.trouble = Some(failure);
    }

    /// Whether to start a sender now.
    pub fn wants_connection(&self, now: Now) -> bool {
        matches!(self.connection, ConnectionState::Down { retry_at } if retry_at <= now)
    }

    /// When the next connection is due, if it is down.
    pub fn connects_at(&self) -> Option<Now> {
        match self.connection {
            ConnectionState::Down { retry_at } => Some(retry_at),
            ConnectionState::Connecting
            | ConnectionState::Up
            | ConnectionState::Draining { .. }
            | ConnectionState::Stopped => None,
        }
    }

    pub fn connecting(&mut self) {
        self.attempts.begun();
        self.connection = ConnectionState::Connecting;
    }

    /// Called when the connection should be up by now but has not failed either, because the server answers slowly or
    /// at length. Returns whether that is so.
    pub fn takes_long(&mut self, failure: Failure) -> bool {
        let is_so = self.connection == ConnectionState::Connecting;
        if is_so {
            self.trouble.get_or_insert(failure);
        }
        is_so
    }

    /// The sender has logged in. With exactly_once, this server also owns the guard, and what the guard says was
    /// processed.
    pub fn connected(&mut self) {
        self.attempts.forget_wait();
        self.connection = ConnectionState::Up;
    }

    pub fn is_up(&self) -> bool {
        matches!(self.connection, ConnectionState::Up | ConnectionState::Stopped)
    }

    /// Whether to end the sender: a reply blamed the backend, and all other replies have been read.
    pub fn is_drained(&self) -> bool {
        matches!(self.connection, ConnectionState::Draining { .. }) && self.flights.is_empty()
    }

    /// Goes down after [`Self::is_drained`].
    pub fn drained(&mut self) {
        if let ConnectionState::Draining { retry_at } = self.connection {
            self.go_down(retry_at);
        }
    }

    /// The connection ended after `accepted` replies of the oldest batch, of which some were `refused`.
    pub fn lost(
        &mut self,
        failure: Failure,
        accepted: usize,
        refused: Vec<Refusal>,
        now: Now,
        random: f64,
    ) -> Vec<Record> {
        self.doubt_flights();
        let records = match self.flights.pop_front() {
            Some(flight) => self.land(flight, accepted, refused, now, random),
            None => Vec::new(),
        };
        // A connection that had worked may have been closed because it was idle. The next attempt is made at once, but
        // only one.
        let had_worked =
            !self.attempts.has_failed() && self.connection == ConnectionState::Up && failure.class == Class::Backend;
        let fresh = had_worked && self.attempts.may_hurry(now);
        let retry_at = self.failed(failure, now, random);
        if fresh {
            self.trouble = None;
        }
        self.go_down(if fresh { now } else { retry_at });
        records
    }

    /// The worker ends the sender (settings changed, backend disabled): batches in flight are in doubt.
    pub fn abandon(&mut self) {
        self.doubt_flights();
        self.go_down(Now::ZERO);
    }

    /// The backend points to another server now. Failures of the former server no longer count.
    pub fn forget_trouble(&mut self) {
        self.trouble = None;
        self.attempts.succeeded();
        self.attempts.forget_wait();
    }

    pub(super) fn failed(&mut self, failure: Failure, now: Now, random: f64) -> Now {
        let retry_at = self.attempts.failed(failure.class, now, random);
        self.trouble = Some(failure);
        retry_at
    }

    pub(super) fn go_down(&mut self, retry_at: Now) {
        self.rewind();
        self.connection = ConnectionState::Down { retry_at };
    }

    /// Continues from the acknowledged position. Batches in flight are forgotten.
    pub(super) fn rewind(&mut self) {
        for flight in self.flights.drain(..) {
            for stream in flight.retried() {
                self.streams.waits_again(&stream);
            }
        }
        self.ahead.rewind();
        self.in_flight_bytes = 0;
        self.read = self.acked.clone();
        self.streams.abandon();
        self.makes_way = false;
    }
}
