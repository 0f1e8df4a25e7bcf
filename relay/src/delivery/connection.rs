//! The connection of a delivery: when it is opened, and what its end means.

use crate::delivery::Delivery;
use crate::delivery::flight::Refusal;
use crate::delivery::refusal::Record;
use crate::delivery::state::ConnectionState;
use crate::failure::{Class, Failure};
use crate::time::Now;
use std::time::Duration;

/// Configuration errors wait this many times longer than outages: somebody has to correct something first.
const CONFIGURATION_PATIENCE: u32 = 5;

/// A backend whose node may change looks for the new one at least this often while it has few failures in a row.
const LOOK_UP_WAIT: Duration = Duration::from_secs(1);
/// So many failures in a row are few: a failover takes seconds. Then it is an outage like any other.
const HASTY_FAILURES: u32 = 100;

/// Attempts that somebody asks for are at least this far apart.
const ASKED_PAUSE: Duration = Duration::from_secs(1);
/// So many changes of settings may follow each other faster than that.
const HASTY_CHANGES: u32 = 4;

impl Delivery {
    /// Somebody has asked for an attempt. There is one, at most once a second. If it fails, the wait goes on as if
    /// nobody had asked.
    pub fn retry_asked(&mut self, now: Now) {
        let ConnectionState::Down { retry_at } = &mut self.connection else {
            return;
        };
        let at = self.asked_at.map_or(now, |last| now.max(last + ASKED_PAUSE));
        if at < *retry_at {
            self.unasked = self.unasked.or(Some(*retry_at));
            (self.asked_at, *retry_at) = (Some(at), at);
        }
    }

    /// The settings changed: forget the wait. Some changes in a row have an attempt each; then there is one a second.
    pub fn retry_changed(&mut self, now: Now) {
        self.unasked = None;
        let ConnectionState::Down { retry_at } = &mut self.connection else {
            return;
        };
        // Further changes do not put off the attempt of one.
        *retry_at = *self.changed_at.get_or_insert_with(|| {
            let at = now.max(self.paid_until.saturating_sub(HASTY_CHANGES * ASKED_PAUSE));
            self.paid_until = self.paid_until.max(at) + ASKED_PAUSE;
            at
        });
    }

    /// A connection is due, but the worker may open no more.
    pub fn waits_for_room(&mut self, failure: Failure) {
        self.trouble = Some(failure);
    }

    /// Whether a sender is to be started now.
    pub fn wants_connection(&self, now: Now) -> bool {
        matches!(self.connection, ConnectionState::Down { retry_at } if retry_at <= now)
    }

    /// When that will be, if it is down.
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
        self.changed_at = None;
        self.connection = ConnectionState::Connecting;
    }

    /// The connection should be up by now and has not failed either: the server answers slowly, or at length. Returns
    /// whether that is so.
    pub fn takes_long(&mut self, failure: Failure) -> bool {
        let is_so = self.connection == ConnectionState::Connecting;
        if is_so {
            self.trouble.get_or_insert(failure);
        }
        is_so
    }

    /// Logged in, and with exactly_once: the guard is ours, and what it says was taken in.
    pub fn connected(&mut self) {
        self.unasked = None;
        self.connection = ConnectionState::Up;
    }

    pub fn is_up(&self) -> bool {
        matches!(self.connection, ConnectionState::Up | ConnectionState::Stopped)
    }

    /// Whether the sender is to be let go: its last reply blamed the backend and no more are to come.
    pub fn is_drained(&self) -> bool {
        matches!(self.connection, ConnectionState::Draining { .. }) && self.flights.is_empty()
    }

    /// Goes down after [`Self::is_drained`].
    pub fn drained(&mut self) {
        if let ConnectionState::Draining { retry_at } = self.connection {
            self.go_down(retry_at);
        }
    }

    /// The connection ended, after `accepted` replies of the oldest batch, of which some `refused`.
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
        // A connection that had worked may have been closed because it was idle. It is tried again at once, but only
        // once.
        let fresh = self.failures == 0 && self.connection == ConnectionState::Up && failure.class == Class::Backend;
        let retry_at = self.failed(failure, now, random);
        if fresh {
            self.trouble = None;
        }
        self.go_down(if fresh { now } else { retry_at });
        records
    }

    /// The worker lets the sender go (settings changed, backend disabled): what is in flight is in doubt.
    pub fn abandon(&mut self) {
        self.doubt_flights();
        self.go_down(Now::ZERO);
    }

    /// The backend points to another server now. Failures of the former one mean nothing.
    pub fn forget_trouble(&mut self) {
        self.trouble = None;
        self.failures = 0;
        self.unasked = None;
    }

    pub(super) fn failed(&mut self, failure: Failure, now: Now, random: f64) -> Now {
        if let Some(unasked) = self.unasked.take().filter(|at| *at > now) {
            self.trouble = Some(failure);
            return unasked;
        }
        self.failures = self.failures.saturating_add(1);
        let patience = if failure.class == Class::Configuration {
            CONFIGURATION_PATIENCE
        } else {
            1
        };
        let mut wait = self.backoff.wait(self.failures, random) * patience;
        if self.follows && failure.class == Class::Backend && self.failures <= HASTY_FAILURES {
            wait = wait.min(LOOK_UP_WAIT);
        }
        self.trouble = Some(failure);
        now + wait.min(self.backoff.max_delay.max(self.backoff.delay))
    }

    pub(super) fn go_down(&mut self, retry_at: Now) {
        self.rewind();
        self.connection = ConnectionState::Down { retry_at };
    }

    /// Reads on from the acknowledged position. What is in flight, if anything, is forgotten.
    pub(super) fn rewind(&mut self) {
        for flight in self.flights.drain(..) {
            for stream in flight.retried() {
                self.streams.waits_again(&stream);
            }
        }
        self.aside.clear();
        self.piece.clear();
        self.in_flight_bytes = 0;
        self.read = self.acked.clone();
        self.streams.abandon();
        self.makes_way = false;
    }
}
