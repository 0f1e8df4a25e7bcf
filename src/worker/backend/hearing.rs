//! A backend's sender: when it is started, what it reports, and when it is ended.

use crate::server::process;
use crate::worker::backend::connection::Connection;
use crate::worker::backend::{Backend, longest_turn};
use crate::worker::permits::SenderPermits;
use relay::delivery::flight::Refusal;
use relay::delivery::refusal::Record;
use relay::failure::memory::NoMemory;
use relay::failure::{Failure, Trouble};
use relay::redis::destination::Address;
use relay::sender::orders::Report;
use relay::time::Now;
use std::io::ErrorKind;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::Duration;

impl Backend {
    /// Whether it is time to start a sender.
    pub(crate) fn wants_sender(&self, now: Now) -> bool {
        self.connects() && !self.has_sender() && self.delivery.wants_connection(now)
    }

    /// Notes that no permit is free for its sender.
    pub(crate) fn wait_for_turn(&mut self, now: Now) {
        if let Some(connection) = self.duty.connection_mut() {
            connection.wait_for_turn();
        }
        // The failure of its last turn is more informative.
        if self.delivery.trouble().is_none() {
            let failure = Failure::of(
                Trouble::NoDescriptor,
                "it waits for its turn to connect: there are more backends than file descriptors",
            );
            self.delivery.waits_for_room(failure);
            self.books.change(now);
        }
    }

    /// Starts a sender. A permit must be free.
    pub(crate) fn connect(&mut self, now: Now, waker: &Arc<UnixStream>, permits: &mut SenderPermits) {
        self.turn.began_at = now;
        let ousts = self.is_told_to_take_over();
        let patience = if self.turn.is_taken {
            longest_turn()
        } else {
            Duration::MAX
        };
        let Some(connection) = self.duty.connection_mut().filter(|c| c.destination().is_ok()) else {
            return;
        };
        match connection.connect(ousts, patience, now, waker, permits.take()) {
            Ok(()) => self.delivery.connecting(),
            Err(error) => {
                let failure = match error.kind() {
                    ErrorKind::OutOfMemory => NoMemory.failure("a sender"),
                    _ => Failure::backend(format!("could not start a sender: {error}")),
                };
                self.lost(failure, 0, Vec::new(), now);
            }
        }
    }

    /// Lets the sender end. The next attempt uses another connection.
    pub(crate) fn let_go(&mut self) {
        self.recovery.reset();
        self.forget_survey();
        let Some(connection) = self.duty.connection_mut() else {
            return;
        };
        connection.forget_address();
        if connection.drop_sender() {
            self.delivery.abandon();
        }
    }

    /// Processes the sender's reports.
    pub(crate) fn hear(&mut self, now: Now) {
        // There may be thousands of backends, so a backend without news is checked for something to log only from time
        // to time.
        let mut has_news = self.logged.is_look_due(now);
        while let Some(report) = self.duty.connection().and_then(Connection::report) {
            has_news = true;
            self.take_report(report, now);
            self.count_progress();
        }
        if self.delivery.is_drained() {
            self.drop_sender();
            self.delivery.drained();
        }
        if self.delivery.has_used_up_numbers() {
            self.let_go();
        }
        has_news |= self.says_that_it_is_slow(now) | self.says_that_survey_is_slow(now);
        if has_news {
            self.logged.looked(now);
            self.log_change(now);
        }
    }

    fn take_report(&mut self, report: Report, now: Now) {
        match report {
            Report::Found(address) => self.found(address, now),
            Report::Connected => {
                self.delivery.connected();
                self.count_connection();
            }
            Report::Guard(guard) => self.recovery.read(*guard),
            Report::Claimed => self.recovery.claimed(),
            Report::Seen(found) => self.recovery.seen(found),
            Report::Surveyed(number, found) => self.take_survey(number, found, now),
            Report::Done { refused, buffer } => {
                self.keep(buffer);
                self.count_batch(&refused);
                let records = self.delivery.replied(refused, now, fastrand::f64());
                self.take_in(records, now);
            }
            Report::Aborted { refused, buffer } => {
                self.keep(buffer);
                self.count_aborted(&refused);
                let records = self.delivery.aborted(refused, now, fastrand::f64());
                self.take_in(records, now);
            }
            Report::Behind(failure) => {
                self.note_failing_node();
                self.delivery.waits_for_replicas(failure);
                self.books.change(now);
            }
            Report::Released => {
                if let Some(connection) = self.duty.connection_mut() {
                    connection.released();
                }
            }
            Report::Lost {
                failure,
                accepted,
                refused,
            } => self.lost(failure, accepted, refused, now),
        }
    }

    /// Whether to log that a sender's server answers but the sender is not ready after twice its timeouts.
    fn says_that_it_is_slow(&mut self, now: Now) -> bool {
        let Some(connection) = self.duty.connection_mut() else {
            return false;
        };
        if connection.slow_at().is_none_or(|at| now < at) {
            return false;
        }
        let failure = Failure::of(
            Trouble::TimedOut,
            "it answers, but was not ready within twice its timeouts",
        );
        let is_slow = self.delivery.takes_long(failure);
        match is_slow {
            true => {
                connection.is_slow(now);
                self.books.change(now);
            }
            false => connection.has_connected(),
        }
        is_slow
    }

    /// Notes the node that the sender is about to connect to.
    fn found(&mut self, address: Address, now: Now) {
        process::debug(|| format!("connecting to Redis at {address} for backend \"{}\"", self.name()));
        self.books.note_address(&address, now);
        let is_other = self.duty.connection_mut().is_some_and(|c| c.found(address));
        // If there is a failure, it came from another node.
        if is_other && self.delivery.trouble().is_none() {
            self.logged.forget_state();
        }
    }

    fn take_in(&mut self, records: Vec<Record>, now: Now) {
        self.books.records.extend(records);
        self.books.move_on(now);
        self.retention.is_due = true;
    }

    fn lost(&mut self, failure: Failure, accepted: usize, refused: Vec<Refusal>, now: Now) {
        self.drop_sender();
        self.note_failing_node();
        self.recovery.interrupt();
        self.count_answers(accepted, &refused);
        let records = self.delivery.lost(failure, accepted, refused, now, fastrand::f64());
        // Failures of a paused backend are not shown.
        if self.is_enabled() || !records.is_empty() {
            self.books.change(now);
        }
        self.books.records.extend(records);
    }

    pub(super) fn drop_sender(&mut self) {
        self.forget_survey();
        if let Some(connection) = self.duty.connection_mut() {
            connection.drop_sender();
        }
    }

    pub(super) fn note_failing_node(&mut self) {
        if let Some(connection) = self.duty.connection_mut() {
            connection.note_failure();
        }
    }
}
