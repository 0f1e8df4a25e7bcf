//! The worker of one database: reads committed events, hands them to the senders, and keeps the books.
//!
//! ```text
//!  wait: latch (publishing, commit, settings, signal) or socket (a sender has reported) or time
//!    ├─ hear the senders ──▶ acknowledged, refused, lost
//!    ├─ read: tick, flush, scan once for all backends that stand at the same place ──▶ batches ──▶ senders
//!    ├─ try refused streams again, move scheduled events that are due
//!    └─ save records and cursors, record ticks, purge
//! ```
//! It never waits for the network, and holds no transaction while it waits for anything. Of these tasks none waits for another that fails
//! (`tasks.rs`): whoever holds a lock holds up what needs it.

pub mod backend;
mod connecting;
mod held;
mod leave;
mod loading;
mod mended;
mod mending;
mod pass;
mod permits;
mod purge;
mod reading;
mod reconciling;
mod recovery;
mod retrying;
mod scheduled;
mod state;
mod task;
mod tasks;
mod turns;

use crate::server::database_slot::SlotState;
use crate::server::guc::{self, LogLevel};
use crate::server::process::REPEAT_LOG_AFTER;
use crate::server::process::{self, Aborted, log};
use crate::server::shmem;
use crate::tables::rights;
use crate::worker::backend::Backend;
use crate::worker::backend::saving::save;
use crate::worker::leave::leave_process;
use crate::worker::state::Generation;
use crate::worker::state::Loaded;
use crate::worker::state::Worker;
use crate::worker::task::Task;
use pgrx::{pg_guard, pg_sys};
use relay::failure::Failure;
use relay::reading::snapshot::FIRST_NORMAL_XID;
use relay::time::Now;
use std::io::Read;
use std::time::Duration;

/// How long a worker that must go waits for replies that are on their way.
const SETTLE_AT_END: Duration = Duration::from_millis(250);
/// How long a worker that must go waits for Redis to take note of it.
const RELEASE_AT_END: Duration = Duration::from_millis(100);
/// After an ERROR that no task accounts for.
const ERROR_WAIT: Duration = Duration::from_secs(1);

/// Entry point of the process; the argument is its database's slot in shared memory.
#[pg_guard]
#[unsafe(no_mangle)]
pub extern "C-unwind" fn outbox_relay_worker(argument: pg_sys::Datum) {
    process::end_without_exit_handlers();
    process::take_signals();
    let Some(slot) = shmem::database_slot_at(argument.value() as u64) else {
        return;
    };
    // SAFETY: once, at the start of a worker that asked for a database connection.
    unsafe {
        pg_sys::BackgroundWorkerInitializeConnectionByOid(slot.database(), pg_sys::InvalidOid, 0);
        if !slot.attach(pg_sys::MyProcPid, pg_sys::MyLatch) {
            // That of a launcher before this one.
            return;
        }
        pg_sys::before_shmem_exit(Some(leave), argument);
    }
    process::give_way_to_database_statements();
    process::end_with_last_words();
    rights::are_the_workers();
    crate::server::pinned::pin_settings();
    Worker::new(slot).run();
}

#[pg_guard]
// SAFETY: called by Postgres alone, when the process ends.
unsafe extern "C-unwind" fn leave(_code: i32, argument: pg_sys::Datum) {
    if let Some(slot) = shmem::database_slot_at(argument.value() as u64) {
        // SAFETY: a plain read of the process's own variable.
        slot.detach(unsafe { pg_sys::MyProcPid });
        shmem::wake_launcher();
    }
}

impl Worker {
    fn run(&mut self) -> ! {
        let mut timeout = Some(Duration::ZERO);
        let mut looked = false;
        loop {
            process::report_statistics();
            if timeout != Some(Duration::ZERO) && !process::is_told_to_end() {
                self.wait(timeout);
            }
            self.drain_socket();
            if process::is_told_to_end() {
                self.end();
            }
            process::handle_interrupts();
            self.settings_changed |= process::reload_if_told();
            if !looked || self.settings_changed {
                looked = self.look_at_settings();
            }
            timeout = match self.step() {
                Ok(timeout) => timeout,
                // It cancelled what it was at.
                Err(_) if process::is_told_to_end() => Some(Duration::ZERO),
                Err(error) => {
                    self.log_error(error.to_string());
                    self.pause_until = self.now() + ERROR_WAIT;
                    self.generation = Generation::Stale;
                    self.work = true;
                    Some(ERROR_WAIT)
                }
            };
        }
    }

    /// Until there is news; while events come in quick succession, until the next look is due.
    fn wait(&mut self, timeout: Option<Duration>) {
        let rest = self.pace.rest(self.now());
        if !rest.is_zero() && self.has_read_all() {
            self.slot.mark_asleep();
            process::wait_briefly(rest);
            self.slot.mark_awake();
            return;
        }
        self.show_idle();
        process::wait(timeout);
    }

    fn log_error(&mut self, message: String) {
        let now = self.now();
        let known = self.logged_error.as_ref();
        if known.is_none_or(|(text, at)| *text != message || now >= *at + REPEAT_LOG_AFTER) {
            log(
                LogLevel::Error,
                &format!("outbox_relay worker: {message}"),
                Some("It tries again shortly."),
                None,
            );
            self.logged_error = Some((message, now));
        }
    }

    /// At the start and after a reload: whether this database is served, and settings that somebody may not have meant.
    fn look_at_settings(&mut self) -> bool {
        if self.home.name.is_empty() {
            // SAFETY: a catalog look-up in a transaction; the text is copied.
            let name = process::transaction(|| unsafe {
                let name = pg_sys::get_database_name(pg_sys::MyDatabaseId);
                (!name.is_null()).then(|| std::ffi::CStr::from_ptr(name).to_string_lossy().into_owned())
            });
            match name {
                Ok(Some(name)) => self.home.name = name,
                _ => return false,
            }
        }
        if !guc::serves(&self.home.name) {
            self.save_all();
            let reason = "outbox_relay.enabled is off, or outbox_relay.databases leaves it out";
            leave_process(self.slot, SlotState::Unserved, &self.home.name, reason);
        }
        for (name, setting) in [
            ("published_retention", &guc::PUBLISHED_RETENTION_MIN),
            ("failed_retention", &guc::FAILED_RETENTION_MIN),
        ] {
            if (1..60).contains(&setting.get()) {
                log(
                    LogLevel::Warning,
                    &format!("outbox_relay.{name} is only {} minutes", setting.get()),
                    None,
                    Some("A number without a unit means minutes; write for example '7d'."),
                );
            }
        }
        true
    }

    /// One round. Returns how long to wait for news; `None`: for ever.
    fn step(&mut self) -> Result<Option<Duration>, Aborted> {
        let now = self.now();
        if now < self.pause_until {
            return Ok(Some(self.pause_until - now));
        }
        self.ticked = false;
        if now >= self.polled_at + guc::millis(&guc::POLL_INTERVAL_MS) {
            self.polled_at = now;
            (self.work, self.polled) = (true, true);
            self.backends.iter_mut().for_each(Backend::refresh);
        }
        if self.settings_changed {
            self.purge.look_now();
        }
        // What was acknowledged counts, also if its sender is let go now.
        self.backends.iter_mut().for_each(|b| b.hear(now));
        self.heed_wishes(now);
        let mut changed = false;
        if self.must_load(now) {
            // What is loaded after a tick is at least as new as what the tick sees.
            if !self.backends.is_empty() {
                self.tick_if_due(now);
            }
            match self.load_now(now) {
                Some(Loaded::Idle) => return Ok(Some(guc::millis(&guc::POLL_INTERVAL_MS))),
                Some(Loaded::Same) => {}
                Some(Loaded::Changed) => changed = true,
                None if self.backends.is_empty() => return Ok(self.timeout(false, None)),
                None => {}
            }
        }
        self.connect(now);
        // A backend with records reads nothing, and claims nothing: what waits behind a refused event must not be in the table sooner
        // than that one, and a claim looks there for what became of the last batch.
        if self.backends.iter().any(|b| !b.books.records.is_empty()) {
            self.save_unsaved(now);
        }
        // For nothing: what is wrong comes to light when it is done in earnest.
        let _ = self.rehearse();
        self.recover(now);
        if self.awaited.is_none() {
            self.attempt(Task::FinishLanes, now, |w| {
                recovery::finish_lanes(&mut w.backends, &w.latest)
            });
        }
        self.resume();
        // Before rows are read that came while triggers were off.
        self.mend(now);
        let more = self.read(now) || changed;
        self.failed_streams.clear();
        let more = self.retry_refused(now) || more;
        self.move_scheduled(now);
        self.save_due(now);
        self.end_failing();
        let purging = self.purge(now, more);
        Ok(self.timeout(more, purging))
    }

    /// `more`: there are events to be read.
    fn purge(&mut self, now: Now, more: bool) -> Option<Duration> {
        let slot = self.slot;
        let is_wanted = || more || slot.has_work() || slot.is_publishing();
        let failed = self.attempt(Task::PurgeFailed, now, |w| w.purge.step_failed(now, &is_wanted));
        self.attempt(Task::RecordTicks, now, |w| w.purge.record_ticks(now, &mut w.backends));
        let published = self.purge_published(now, &is_wanted);
        [failed, published].into_iter().flatten().flatten().min()
    }

    /// Each backend has its own patience: another's success says nothing of who is in the way of this one.
    fn purge_published(&mut self, now: Now, is_wanted: &dyn Fn() -> bool) -> Option<Option<Duration>> {
        let (purge, backends) = (&mut self.purge, &self.backends);
        // What is not for now any more would be waited for.
        self.patience.retain(|task| match task {
            Task::PurgePublished((number, _)) => purge::is_on() && backends.iter().any(|b| b.number == number),
            _ => true,
        });
        let patience = &self.patience;
        let mut succeeded = Vec::new();
        let outcome = purge.step_published(
            now,
            backends,
            is_wanted,
            &|number| patience.allows(Task::PurgePublished((number, None)), now),
            &mut |number| succeeded.push(number),
        );
        for number in succeeded {
            self.patience.succeeded(Task::PurgePublished((number, None)));
        }
        match outcome {
            Ok(due) => Some(due),
            Err(error) => {
                let task = Task::PurgePublished((self.purge.backend(), None));
                self.failed(task, &error, now);
                if let Some(at) = self.patience.retry_at(task) {
                    self.purge.look_at(at);
                }
                // The next backend is next.
                Some(Some(Duration::ZERO))
            }
        }
    }

    /// Takes backends further whose connections have read or claimed their guards.
    fn recover(&mut self, now: Now) {
        // Before the first tick, nothing is known of what there is to send.
        // Also one that standbys do not have yet: what it sees is looked for in the streams, not sent.
        let newest = self.newest();
        let is_ticked = newest.next_xid > FIRST_NORMAL_XID;
        if !is_ticked || self.backends.iter().all(|b| !b.has_claim_step()) {
            return;
        }
        let Some(identity) = &self.identity else {
            return;
        };
        let mut failures = Vec::new();
        for backend in self.backends.iter_mut().filter(|b| b.books.records.is_empty()) {
            if let Err(error) = recovery::step(backend, identity, &newest, now) {
                // An order to end cancels the step, and is no trouble.
                if process::is_told_to_end() {
                    break;
                }
                // Its sender waits for an order that will not come.
                backend.hold_off(Failure::backend(error.to_string()), Duration::ZERO, now);
                failures.push((backend.whose(), error));
            }
        }
        for (whose, error) in failures {
            self.failed(Task::Claim(whose), &error, now);
        }
        // What those have saved that came up is behind their next batches.
        self.flush();
        // More may have been restored while they compared.
        if self.backends.iter().any(Backend::is_held) {
            self.generation = Generation::Stale;
        }
    }

    /// Lets senders go on that have waited until what was refused is written down. The guard tells of the last batch alone, so that
    /// must be durable before the next.
    fn resume(&mut self) {
        let is_written_down = |b: &Backend| b.delivery.is_stopped() && b.books.records.is_empty();
        if self.backends.iter().any(is_written_down) {
            self.flush();
            let written_down = self.backends.iter_mut().filter(|b| is_written_down(b));
            written_down.for_each(Backend::resume);
        }
    }

    fn timeout(&self, more: bool, purging: Option<Duration>) -> Option<Duration> {
        if more {
            return Some(Duration::ZERO);
        }
        let now = self.now();
        let poll = self.polled_at + guc::millis(&guc::POLL_INTERVAL_MS);
        let times = self.backends.iter().flat_map(|b| {
            let attempt = Some(b)
                .filter(|b| b.books.records.is_empty())
                .and_then(Backend::due_at)
                .map(|due| {
                    self.patience
                        .retry_at(Task::Retry(b.whose()))
                        .map_or(due, |at| at.max(due))
                });
            [attempt, self.save_at(b), b.load_at()]
        });
        let next = times
            .chain([
                self.scheduled_at(),
                Some(poll),
                self.awaited.as_ref().map(|a| a.look_at),
                self.mending.due_at(),
                self.turns.look_at,
                self.patience.next_retry_at(),
            ])
            .flatten()
            .min()
            .unwrap_or(poll)
            .saturating_sub(now);
        Some(purging.map_or(next, |p| next.min(p)))
    }

    fn show_idle(&mut self) {
        if std::mem::take(&mut self.shown_busy) {
            process::show_activity(None);
        }
    }

    fn save_due(&mut self, now: Now) {
        if self
            .backends
            .iter()
            .any(|b| self.save_at(b).is_some_and(|at| at <= now))
        {
            self.save_unsaved(now);
        }
    }

    /// Waits a moment for replies that are on their way, so that nothing of it is in doubt when the senders are let go.
    fn settle(&mut self, limit: Duration, concerned: impl Fn(&Backend) -> bool) {
        let deadline = self.now() + limit;
        loop {
            let now = self.now();
            self.backends.iter_mut().for_each(|b| b.hear(now));
            if now >= deadline || !self.backends.iter().any(&concerned) {
                return;
            }
            process::wait(Some(deadline - now));
            self.drain_socket();
        }
    }

    /// Last words: saves what is known.
    fn save_all(&mut self) {
        self.settle(SETTLE_AT_END, Backend::is_sending);
        let now = self.now();
        // A worker alone is back in a moment, which nobody is to take for the end of the owner.
        if process::is_server_stopping() {
            self.backends.iter_mut().for_each(Backend::release_guard);
        }
        if let Err(error) = save(&mut self.backends, |_| true, now) {
            log(
                LogLevel::Warning,
                &format!("could not save the cursors: {error}"),
                None,
                None,
            );
        }
        self.settle(RELEASE_AT_END, Backend::is_releasing);
    }

    /// Told to end.
    fn end(&mut self) -> ! {
        process::accept_end();
        process::set_option(c"lock_timeout", c"200ms");
        self.save_all();
        leave_process(self.slot, SlotState::Wanted, &self.home.name, "it was told to end");
    }

    fn drain_socket(&mut self) {
        let mut bytes = [0; 256];
        while (&self.woken).read(&mut bytes).is_ok_and(|n| n == bytes.len()) {}
    }
}
