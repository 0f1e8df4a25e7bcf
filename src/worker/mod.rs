//! The worker of one database: reads committed events, hands them to the senders, and keeps the books.
//!
//! ```text
//!  wait: latch (publishing, commit, settings, signal) or socket (a sender has reported) or time
//!    ├─ hear the senders ──▶ acknowledged, refused, lost
//!    ├─ read: tick, flush, scan once for all backends that stand at the same place ──▶ batches ──▶ senders
//!    ├─ try refused streams again, move scheduled events that are due
//!    └─ save records and cursors, record ticks, purge
//! ```
//! The worker never waits for the network, and holds no transaction while it waits for anything. A task that fails
//! delays no other task ([`tasks`]): somebody who holds a lock delays only what needs it.
//!
//! Most of what a round does has two files: what the worker does, as methods of [`Worker`](state::Worker), and what it
//! keeps from round to round. The second file knows nothing of the first.
//!
//! | it does | | it keeps |
//! |---|---|---|
//! | this file | one round: in which order everything is done | [`state`] |
//! | [`tasks`] | tries tasks again that have failed; saves | [`task`], [`troubles`] for `outbox.health()` |
//! | [`loading`], [`reconciling`] | reads backends and settings; applies changes | [`backend`]: one backend |
//! | [`connecting`] | decides which backends have a sender | [`turns`], [`permits`] |
//! | [`recovery`] | brings backends with a guard up | `relay::recovery` |
//! | [`reading`], [`pass`] | takes ticks and reads for groups of backends; what one scan does | `relay::reading` |
//! | [`lanes`] | makes lanes of clusters, and gives them up | [`found`]: for which rows |
//! | [`passing_by`] | lets readers of backends that do not send pass rows of others | [`passed`] |
//! | [`pacing`] | shares what backends with `max_rate` may send | [`rates`] |
//! | [`retrying`] | sends refused events again | `relay::delivery` |
//! | [`scheduled`] | moves scheduled events that are due | [`due`] |
//! | [`mending`] | mends triggers, and rows that came without them | [`mended`] |
//! | [`consumers`] | asks about consumer groups | |
//! | [`testing`] | answers `outbox.test_backend()` | [`tested`] |
//! | [`forgetting`] | forgets deleted backends | |
//! | [`purging`] | decides when to purge | [`purge`]: how far purging is |
//! | [`leave`] | ends the process | |

pub(crate) mod backend;
mod connecting;
mod consumers;
mod due;
mod forgetting;
mod found;
mod lanes;
mod leave;
mod loading;
mod mended;
mod mending;
mod pacing;
mod pass;
mod passed;
mod passing_by;
mod permits;
mod purge;
mod purging;
mod rates;
mod reading;
mod reconciling;
mod recovery;
mod retrying;
mod scheduled;
mod state;
mod task;
mod tasks;
mod tested;
mod testing;
mod troubles;
mod turns;

use crate::server::database_slot::SlotState;
use crate::server::guc::{self, LogLevel};
use crate::server::place;
use crate::server::process::repeat_log_after;
use crate::server::process::{self, Aborted, log};
use crate::server::shmem;
use crate::server::threads;
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

/// How long a worker that was told to end waits for replies to batches in flight.
const REPLIES_AT_END: Duration = Duration::from_millis(250);
/// How long it then waits until Redis has acknowledged the mark that the owner leaves.
const RELEASE_AT_END: Duration = Duration::from_millis(100);
/// The pause after an ERROR outside of all tasks.
const ERROR_WAIT: Duration = Duration::from_secs(1);

/// Entry point of the process. The argument is the database's slot in shared memory.
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
            // A worker of an earlier launcher is running in this database.
            return;
        }
        pg_sys::before_shmem_exit(Some(leave), argument);
    }
    process::give_way_to_database_statements();
    process::end_with_last_words();
    if let Err(error) = threads::end_with_the_postmaster() {
        log(
            LogLevel::Warning,
            &format!("outbox_relay worker: could not start the thread that watches the postmaster: {error}"),
            None,
            None,
        );
    }
    rights::run_as_worker();
    crate::server::pinned::pin_settings();
    Worker::new(slot).run();
}

#[pg_guard]
// SAFETY: only Postgres calls this, when the process ends.
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
            self.slot.begins_round();
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
            let outcome = self.step();
            let now = self.now();
            self.troubles.tell(self.slot, &self.patience, now);
            timeout = match outcome {
                Ok(timeout) => timeout,
                // The order to end has cancelled the statement that was running.
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

    /// Waits for news. While events come in quick succession, it waits for a fixed time instead, which costs less than
    /// a wake for each event.
    fn wait(&mut self, timeout: Option<Duration>) {
        let rest = self.pace.rest(self.now());
        if !rest.is_zero() && self.has_read_all() {
            self.slot.mark_asleep();
            process::wait_briefly(rest);
            self.slot.mark_awake();
            return;
        }
        process::show_idle();
        process::wait(timeout);
    }

    fn log_error(&mut self, message: String) {
        let now = self.now();
        let known = self.logged_error.as_ref();
        if known.is_none_or(|(text, at)| *text != message || now >= *at + repeat_log_after()) {
            log(
                LogLevel::Error,
                &format!("outbox_relay worker: {message}"),
                Some("The worker tries again shortly."),
                None,
            );
            self.logged_error = Some((message, now));
        }
    }

    /// Called at the start and after a reload. Checks whether this database is served, and warns of settings that are
    /// probably mistakes.
    fn look_at_settings(&mut self) -> bool {
        if self.home.name.is_empty() {
            match process::transaction(place::database) {
                Ok(Some(name)) => self.home.name = name.to_string_lossy().into_owned(),
                _ => return false,
            }
        }
        if !guc::serves(&self.home.name) {
            self.save_all();
            let reason = "outbox_relay.enabled is off, or outbox_relay.databases excludes it";
            leave_process(self.slot, SlotState::Unserved, &self.home.name, reason);
        }
        for (name, setting) in [
            ("published_retention", &guc::PUBLISHED_RETENTION_MIN),
            ("failed_retention", &guc::FAILED_RETENTION_MIN),
            ("inbox_retention", &guc::INBOX_RETENTION_MIN),
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

    /// One round. Returns how long to wait for news. `None`: without limit.
    fn step(&mut self) -> Result<Option<Duration>, Aborted> {
        let now = self.now();
        if now < self.pause_until {
            return Ok(Some(self.pause_until - now));
        }
        self.ticked = false;
        if now >= self.polled_at + guc::millis(&guc::POLL_INTERVAL_MS) {
            self.polled_at = now;
            (self.work, self.polled) = (true, true);
            self.passed.is_due = true;
            self.backends.iter_mut().for_each(Backend::refresh);
        }
        if self.settings_changed {
            self.purge.look_now();
            self.is_stream_noted = false;
        }
        // Reports come first: an acknowledgement counts even if its sender is ended in this round.
        self.backends.iter_mut().for_each(|b| b.hear(now));
        self.heed_wishes(now);
        self.hear_questions();
        let mut changed = false;
        if self.must_load(now) {
            // Backends are loaded after the tick, so that they are at least as new as the rows that the tick sees.
            if !self.backends.is_empty() {
                self.tick_if_due(now);
            }
            match self.load_now(now) {
                Some(Loaded::Idle) => {
                    return Ok(Some(guc::millis(&guc::POLL_INTERVAL_MS).min(repeat_log_after())));
                }
                Some(Loaded::Same) => {}
                Some(Loaded::Changed) => changed = true,
                None if self.backends.is_empty() => return Ok(self.timeout(false, None)),
                None => {}
            }
        }
        self.note_stream(now);
        self.connect(now);
        self.test_backends();
        // A backend with unsaved records neither reads nor claims. An event that waits behind a refused one must not be
        // written down before it. And a claim looks up in the table what became of the last batch.
        if self.backends.iter().any(|b| !b.books.records.is_empty()) {
            self.save_unsaved(now);
        }
        // A rehearsal that fails has no consequences: the real work will fail in the same way and report it.
        let _ = self.rehearse();
        self.recover(now);
        if self.awaited.is_none() {
            self.attempt(Task::FinishLanes, now, |w| {
                recovery::finish_lanes(&mut w.backends, &w.latest)
            });
        }
        self.resume();
        self.ask_consumers(now);
        // Before rows are read that were inserted while triggers were disabled.
        self.mend(now);
        self.pace_failing(now);
        let more = self.read(now) || changed;
        self.failed_streams.clear();
        let more = self.retry_refused(now) || more;
        self.move_scheduled(now);
        self.save_due(now);
        self.save_consumers(now);
        self.end_failing();
        self.forget_deleted(now);
        let passing = self.pass_by(now);
        let purging = self.purge(now, more);
        Ok(self.timeout(more, passing.into_iter().chain(purging).min()))
    }

    /// Moves on the recovery of backends whose connections have read or claimed their guards.
    fn recover(&mut self, now: Now) {
        // Before the first tick, it is not known what has to be sent. A tick that standbys do not have yet is
        // sufficient: the rows that it sees are only looked for in the streams, not sent.
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
            if backend.has_claim_step() {
                process::show_activity(&format!("claiming the streams of {}", backend.name()));
            }
            if let Err(error) = recovery::step(backend, identity, &newest, now) {
                // An order to end cancels the step. That is not a failure.
                if process::is_told_to_end() {
                    break;
                }
                // The sender waits for an order that this step should have given.
                backend.hold_off(Failure::backend(error.to_string()), Duration::ZERO, now);
                failures.push((backend.whose(), error));
            }
        }
        for (whose, error) in failures {
            self.failed(Task::Claim(whose), &error, now);
        }
        // What recovery has saved for backends that came up must be durable before their next batches.
        self.flush();
        // More events may have been restored while they were comparing.
        if self.backends.iter().any(Backend::waits_to_compare) {
            self.generation = Generation::Stale;
        }
    }

    /// Lets senders go on that wait until refused events are written down. The guard knows only the last batch, so what
    /// was refused in it must be durable before the next one.
    fn resume(&mut self) {
        let is_written_down = |b: &Backend| b.delivery.is_stopped() && b.books.records.is_empty();
        if self.backends.iter().any(is_written_down) {
            self.flush();
            let written_down = self.backends.iter_mut().filter(|b| is_written_down(b));
            written_down.for_each(Backend::resume);
        }
    }

    fn timeout(&self, more: bool, aside: Option<Duration>) -> Option<Duration> {
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
            [attempt, self.save_at(b), b.load_at(), b.survey_at(self.interest)]
        });
        let next = times
            .chain([
                self.scheduled_at(),
                self.fails_at,
                Some(poll),
                self.awaited.as_ref().map(|a| a.look_at),
                self.mending.due_at(),
                self.turns.look_at,
                self.granted_at(),
                self.patience.next_retry_at(),
            ])
            .flatten()
            .min()
            .unwrap_or(poll)
            .saturating_sub(now);
        Some(aside.map_or(next, |wait| next.min(wait)))
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

    /// Waits a moment for replies to batches in flight, so that nothing is in doubt when the senders end.
    fn await_replies(&mut self, limit: Duration, concerned: impl Fn(&Backend) -> bool) {
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

    /// Saves everything that is known, before the worker leaves.
    fn save_all(&mut self) {
        self.await_replies(REPLIES_AT_END, Backend::is_sending);
        let now = self.now();
        // If only the worker ends, it comes back soon, and others must not conclude that the owner has left.
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
        self.await_replies(RELEASE_AT_END, Backend::is_releasing);
    }

    /// Ends the process in an orderly way.
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
