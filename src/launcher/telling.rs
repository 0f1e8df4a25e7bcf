//! What the launcher logs about databases that have no worker: the reason, repeated each minute while it lasts.

use crate::launcher::{Launcher, RETRY_WAIT, WORTH_A_WORD};
use crate::server::guc::{self, LogLevel};
use crate::server::process::{log, repeat_log_after};
use crate::server::shmem;
use std::time::{Duration, Instant};

/// A log line names at most this many databases.
const NAMED: usize = 10;

impl Launcher {
    /// Logs each minute which databases have no worker because the settings or an administrator exclude them. Returns
    /// when to log it again.
    pub(super) fn tell_of_left_out(&mut self, left_out: &[u32]) -> Option<Duration> {
        let is_off = !guc::ENABLED.get();
        if left_out.is_empty() && !is_off {
            self.left_out_said = None;
            return None;
        }
        // A worker that leaves has logged this itself.
        let said = match self.left_out_said {
            None if !left_out.is_empty() => Some(Instant::now()),
            said => said,
        };
        self.left_out_said = said;
        let after = repeat_log_after();
        if let Some(wait) = said.map(|said| after.saturating_sub(said.elapsed()))
            && !wait.is_zero()
        {
            return Some(wait);
        }
        self.left_out_said = Some(Instant::now());
        let names = self.names(left_out.iter());
        let (closed, _): (Vec<u32>, Vec<u32>) = left_out.iter().partition(|oid| !self.databases[oid].is_open);
        let (message, hint) = match is_off {
            true => (
                "no database has a worker of outbox_relay: outbox_relay.enabled is off".to_owned(),
                "Events wait until it is switched on.",
            ),
            false if closed.len() == left_out.len() => (
                format!("no worker of outbox_relay in {names}: connections are not allowed there"),
                "Events wait. See ALTER DATABASE ... ALLOW_CONNECTIONS.",
            ),
            false => (
                format!("no worker of outbox_relay in {names}: excluded by outbox_relay.databases"),
                "Events wait until the setting includes it.",
            ),
        };
        log(LogLevel::Info, &message, None, Some(hint));
        Some(after)
    }

    /// Warns of a shortage, again each minute. It does not warn while workers merely look for the extension.
    pub(super) fn tell_of_shortage(&mut self, waiting: &[u32]) {
        // A database where no worker has looked yet may have waiting events. It is named only if no other database is.
        let is_known = |oid: &&u32| self.databases[oid].has_extension;
        let known: Vec<&u32> = waiting.iter().filter(is_known).collect();
        let others = waiting.iter().filter(|oid| !self.databases[oid].is_template);
        let named: Vec<&u32> = if known.is_empty() { others.collect() } else { known };
        if named.is_empty() {
            self.short = None;
            return;
        }
        let (since, said) = self.short.get_or_insert_with(|| (Instant::now(), None));
        if since.elapsed() < RETRY_WAIT || said.is_some_and(|said| said.elapsed() < repeat_log_after()) {
            return;
        }
        *said = Some(Instant::now());
        let names = self.names(named.into_iter());
        if shmem::is_full() {
            log(
                LogLevel::Warning,
                "too many databases for outbox_relay",
                Some(&format!("No worker could be started for {names}.")),
                Some(
                    "Raise max_worker_processes: shared memory has room for 1,024 databases, and for two more for each process.",
                ),
            );
            return;
        }
        log(
            LogLevel::Warning,
            "too few background worker processes for outbox_relay",
            Some(&format!(
                "No worker could be started for {names}. The launcher tries again each second."
            )),
            Some(
                "Raise max_worker_processes: each database with the extension needs one, and the launcher needs one more.",
            ),
        );
    }

    pub(super) fn tell_of_failures(&mut self) {
        let failing = self.databases.iter().filter(|(_, d)| d.failures >= WORTH_A_WORD);
        let failing: Vec<&u32> = failing.map(|(oid, _)| oid).collect();
        if failing.is_empty() {
            self.failing_said = None;
            return;
        }
        if self
            .failing_said
            .is_some_and(|said| said.elapsed() < repeat_log_after())
        {
            return;
        }
        self.failing_said = Some(Instant::now());
        let names = self.names(failing.into_iter());
        log(
            LogLevel::Warning,
            "workers of outbox_relay end as soon as they are started",
            Some(&format!(
                "This happens in {names}. The launcher tries again at least each minute."
            )),
            Some("The lines of \"outbox_relay worker\" in the server's log say why."),
        );
    }

    /// Names of databases, for the log.
    fn names<'a>(&self, oids: impl ExactSizeIterator<Item = &'a u32>) -> String {
        let count = oids.len();
        let mut names: Vec<String> = oids
            .take(NAMED)
            .map(|oid| format!("\"{}\"", self.databases[oid].name))
            .collect();
        if count > NAMED {
            names.push(format!("{} more", count - NAMED));
        }
        names.join(", ")
    }
}
