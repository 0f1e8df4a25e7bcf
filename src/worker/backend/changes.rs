//! Applies changes of a backend's settings that loading has found.

use crate::server::guc::{self, LogLevel};
use crate::server::process::log;
use crate::tables::backends::BackendRow;
use crate::worker::backend::connection::Connection;
use crate::worker::backend::duty::{Duty, Finder};
use crate::worker::backend::settings::{self, Home};
use crate::worker::backend::{Backend, refused_streams};
use relay::delivery::refusal::Streams;
use relay::time::Now;

impl Backend {
    /// Whether the sender can go on with these settings: the destination is unchanged, and so is the stream of batches
    /// in flight.
    pub(crate) fn keeps_sender(&self, row: &BackendRow, home: &Home) -> bool {
        let stays = self.is_to(row, home) && settings::stream(Some(&row.options)) == *self.stream();
        // Servers that watch the guard must know how often it is refreshed. Only a new claim tells them.
        let has_told = self.duty.connection().is_none_or(Connection::has_told_interval);
        let beats = !self.is_exactly_once() || has_told;
        // A new claim looks for restored events.
        let claims = self.is_exactly_once() && row.enabled && self.restored.has_new(row);
        // A paused backend keeps its connection and its guard. But its batches in flight would still be sent.
        let is_enabled = match (row.enabled, self.is_enabled()) {
            (true, true) => true,
            _ => self.is_exactly_once() && self.delivery.is_idle(),
        };
        is_enabled && stays && beats && !claims
    }

    /// Whether a row leads to the same destination.
    fn is_to(&self, row: &BackendRow, home: &Home) -> bool {
        let destination = settings::destination(row, home, self.lane());
        match &self.duty {
            Duty::Send(service) => service.connection.is_to(&destination),
            Duty::Find(finder) => finder.destination == destination,
            Duty::Fail { .. } | Duty::Strays => false,
        }
    }

    /// Applies changed settings.
    pub(crate) fn reconfigure(&mut self, row: BackendRow, home: &Home, now: Now) {
        let was_copy = self.is_copy();
        let was_unusable = self.duty.unusable().is_some();
        let mut is_other = self.row() != Some(&row) || !self.is_to(&row, home);
        if !self.keeps_sender(&row, home) {
            self.let_go();
            self.forget_trouble();
        }
        if row.enabled != self.is_enabled() {
            // While it was paused, failures of its Redis were not shown.
            self.forget_trouble();
        }
        let former_stream = self.entries.stream.clone();
        self.entries.reconfigure(&row.options);
        if self.entries.stream != former_stream {
            is_other = true;
            let waiting = match self.duty {
                Duty::Send(_) => refused_streams(self.number, self.lane(), &self.entries.stream),
                Duty::Find(_) | Duty::Fail { .. } | Duty::Strays => Streams::default(),
            };
            self.delivery.set_streams(waiting);
        }
        if let Ok(guarantee) = row.options.delivery {
            self.delivery.set_guarantee(guarantee);
        }
        self.apply_row(row, home);
        if (was_copy && !self.is_copy()) || (was_unusable && self.duty.unusable().is_none()) {
            self.forget_trouble();
        }
        self.delivery.set_backoff(guc::backoff(), now);
        match is_other {
            true => self.delivery.retry_changed(now),
            // The settings were only read again: a cause outside of them may have been removed.
            false => self.delivery.retry_asked(now),
        }
        self.books.change_since_saved();
    }

    fn apply_row(&mut self, row: BackendRow, home: &Home) {
        if self.becomes_finder(&row) {
            self.delivery.set_streams(Streams::default());
            self.duty = Duty::Find(Box::new(Finder::new(row, home)));
            return;
        }
        let row = self.without_done(row);
        match &mut self.duty {
            Duty::Send(service) => {
                let destination = settings::destination(&row, home, service.lane);
                service.connection.set_destination(destination);
                self.delivery.set_follows(service.connection.is_looked_up());
                service.row = row;
            }
            Duty::Find(finder) => **finder = Finder::new(row, home),
            Duty::Fail { .. } | Duty::Strays => {}
        }
    }

    /// Notes that its row was deleted.
    pub(crate) fn delete(&mut self) {
        self.say_deleted();
        self.let_go();
        self.duty = Duty::of_deleted(self.lane());
        self.leave_meter();
        self.restored.let_go();
        self.delivery.set_streams(Streams::default());
    }

    /// Logs the key of the guard, which nobody uses any more. It stays: a server that gets the backend back, from a
    /// backup or as a standby without the deletion, learns from it what was sent.
    fn say_deleted(&self) {
        if let Some(key) = self.guard_key() {
            log(
                LogLevel::Info,
                &format!("backend \"{}\" was deleted", self.name()),
                Some(&format!("Its guard stays in its Redis: {key}")),
                Some(&format!("To remove it, run: redis-cli DEL '{key}'")),
            );
        }
    }

    /// A failure with the former settings tells nothing about the new ones.
    fn forget_trouble(&mut self) {
        self.delivery.forget_trouble();
        self.logged.forget_state();
    }
}
