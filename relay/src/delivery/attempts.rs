//! When the connection of a backend is tried again.

use crate::delivery::backoff::Backoff;
use crate::failure::Class;
use crate::time::Now;
use std::time::Duration;

/// After a configuration error, the wait is this many times longer than in an outage: somebody has to correct something
/// first.
const CONFIGURATION_PATIENCE: u32 = 5;

/// A backend whose node may change looks for the new node at least this often after a small number of failures in a
/// row.
const LOOK_UP_WAIT: Duration = Duration::from_secs(1);
/// Up to this many failures in a row are a small number: a failover takes seconds. After that it is an outage like any
/// other.
const HASTY_FAILURES: u32 = 100;

/// Minimum time between attempts that users ask for.
const ASKED_PAUSE: Duration = Duration::from_secs(1);
/// This many connections that had worked, and were lost, are replaced at once in quick succession.
const HASTY_LOSSES: u32 = 8;
/// This many changes of settings may cause attempts in quicker succession.
const HASTY_CHANGES: u32 = 4;

pub(super) struct Attempts {
    pub(super) backoff: Backoff,
    /// Whether another node may replace a lost one. Then the wait for a failed node is short.
    pub(super) follows: bool,
    /// Failures in a row.
    failures: u32,
    /// The last or next attempt that a user has asked for.
    asked_at: Option<Now>,
    /// The next attempt because of changed settings.
    changed_at: Option<Now>,
    /// Each such attempt moves this by a second. It may not lie far ahead.
    paid_until: Now,
    /// Each connection that is replaced at once moves this by a second.
    hurried_until: Now,
    /// When the next attempt would be if nobody had asked for one sooner.
    unasked: Option<Now>,
}

impl Attempts {
    pub(super) fn new(backoff: Backoff) -> Self {
        Self {
            backoff,
            follows: false,
            failures: 0,
            asked_at: None,
            changed_at: None,
            paid_until: Now::ZERO,
            hurried_until: Now::ZERO,
            unasked: None,
        }
    }

    /// Somebody asks for an attempt before `retry_at`. Returns when the next one is: at most once a second.
    pub(super) fn asked(&mut self, retry_at: Now, now: Now) -> Now {
        let at = self.asked_at.map_or(now, |last| now.max(last + ASKED_PAUSE));
        if at >= retry_at {
            return retry_at;
        }
        self.unasked = self.unasked.or(Some(retry_at));
        self.asked_at = Some(at);
        at
    }

    /// The settings have changed. Returns when the next attempt is. Further changes delay none that is already due.
    pub(super) fn changed(&mut self, now: Now) -> Now {
        *self.changed_at.get_or_insert_with(|| {
            let at = now.max(self.paid_until.saturating_sub(HASTY_CHANGES * ASKED_PAUSE));
            self.paid_until = self.paid_until.max(at) + ASKED_PAUSE;
            at
        })
    }

    /// An attempt begins.
    pub(super) fn begun(&mut self) {
        self.changed_at = None;
    }

    /// Forgets the wait that continues after an attempt that somebody has asked for.
    pub(super) fn forget_wait(&mut self) {
        self.unasked = None;
    }

    /// The backend works.
    pub(super) fn succeeded(&mut self) {
        self.failures = 0;
    }

    pub(super) fn has_failed(&self) -> bool {
        self.failures > 0
    }

    /// A connection that had worked was lost. Returns whether another one may replace it at once: a server that closes
    /// each connection after a batch would otherwise keep the worker busy with claims, each of which is durable.
    pub(super) fn may_hurry(&mut self, now: Now) -> bool {
        let until = self.hurried_until.max(now);
        let may = until <= now + (HASTY_LOSSES - 1) * ASKED_PAUSE;
        if may {
            self.hurried_until = until + ASKED_PAUSE;
        }
        may
    }

    /// The attempt has failed. Returns when the next one is. If somebody had asked for this one, the wait continues as
    /// if nobody had.
    pub(super) fn failed(&mut self, class: Class, now: Now, random: f64) -> Now {
        if let Some(unasked) = self.unasked.take().filter(|at| *at > now) {
            return unasked;
        }
        self.failures = self.failures.saturating_add(1);
        let patience = match class {
            Class::Configuration => CONFIGURATION_PATIENCE,
            _ => 1,
        };
        let mut wait = self.backoff.wait(self.failures, random) * patience;
        if self.follows && class == Class::Backend && self.failures <= HASTY_FAILURES {
            wait = wait.min(LOOK_UP_WAIT);
        }
        now + wait.min(self.backoff.max_delay.max(self.backoff.delay))
    }
}
