//! Connects [`relay::recovery`] with the tables, the backend and the log.

use crate::server::guc::{self, LogLevel, TakeOver};
use crate::server::process::{self, Aborted, log};
use crate::server::random::token;
use crate::tables::branches;
use crate::tables::care;
use crate::tables::catalog;
use crate::tables::events::{EventsScan, EventsTable};
use crate::tables::identity::Identity;
use crate::tables::numbers;
use crate::tables::replays::Replays;
use crate::tables::row::{Row, attribute};
use crate::tables::ticks;
use crate::tables::{refused, restores, retention};
use crate::worker::backend::saving::save;
use crate::worker::backend::{Backend, taking_over};
use relay::delivery::refusal::Record;
use relay::delivery::{Cursor, Delivery};
use relay::event::wanted::{Purpose, Wanted};
use relay::failure::server_text::shown;
use relay::failure::{Failure, Trouble};
use relay::fault::{self, Mutation};
use relay::guard::claim::{Claimant, Incarnation, Why};
use relay::guard::{Guard, Owner};
use relay::reading::range::{Key, Position};
use relay::reading::snapshot::Tick;
use relay::recovery::books::{Books, Notice, Rows};
use relay::sender::orders::Order;
use relay::time::Now;
use std::sync::Arc;
use std::time::Duration;

/// Moves one backend's recovery on as far as possible. `newest`: the newest tick.
pub(super) fn step(backend: &mut Backend, identity: &Identity, newest: &Arc<Tick>, now: Now) -> Result<(), Aborted> {
    if !backend.recovery.is_due() && backend.delivery.is_up() {
        if backend.is_told_to_take_over() {
            // It still considers itself the owner, but another server may have taken over. Only a new claim can tell.
            backend.let_go();
        }
        return Ok(());
    }
    let mut recovery = std::mem::take(&mut backend.recovery);
    let stepped = recovery.step(
        &mut BackendBooks {
            backend,
            identity,
            newest,
            now,
        },
        now,
    );
    backend.recovery = recovery;
    stepped
}

/// A backend and its tables, for its recovery.
struct BackendBooks<'a> {
    backend: &'a mut Backend,
    identity: &'a Identity,
    newest: &'a Arc<Tick>,
    now: Now,
}

impl Books for BackendBooks<'_> {
    type Error = Aborted;
    type Rows<'a>
        = BackendRows<'a>
    where
        Self: 'a;

    fn delivery(&mut self) -> &mut Delivery {
        &mut self.backend.delivery
    }

    fn claimant(&mut self, guard: Option<&Guard>) -> Result<Claimant<'_>, Aborted> {
        let (backend, identity) = (&*self.backend, self.identity);
        let (incarnation, reach) = process::transaction(|| {
            let known = |guard: &Guard| identity.know(&guard.incarnation);
            (guard.map_or(Incarnation::Unknown, known), backend.reach())
        })?;
        Ok(Claimant {
            incarnation,
            system: identity.system(),
            place: identity.place(),
            promoted_to: identity.promoted_to(),
            anybody: guc::TAKE_OVER.get() == TakeOver::Any,
            copy: backend.is_copy(),
            paused: !backend.is_enabled(),
            number: backend.delivery.number(),
            reach,
            on_missing: backend.on_missing_guard(),
            take_over: backend.is_told_to_take_over(),
            restored: backend.is_restored(),
            last_restore: backend.last_restore(),
        })
    }

    fn owner(&self) -> Owner {
        self.identity.owner()
    }

    fn token(&mut self) -> String {
        token()
    }

    fn total(&self) -> i64 {
        self.backend.total()
    }

    fn newest_tick(&mut self) -> Arc<Tick> {
        self.newest.clone()
    }

    fn oldest(&mut self) -> Result<Position, Aborted> {
        let number = self.backend.number;
        process::transaction(|| {
            let oldest = retention::oldest_tick(number);
            numbers::vouched(&oldest.map_or_else(Position::beginning, Position::at))
        })
    }

    /// A guard that was written before a crash of the server may contain numbers that the crash has lost.
    fn vouched(&mut self, guard: Guard) -> Result<Guard, Aborted> {
        let [position, previous] =
            process::transaction(|| [&guard.position, &guard.previous].map(numbers::vouched_of_guard))?;
        Ok(Guard {
            position,
            previous,
            ..guard
        })
    }

    fn in_tables<R>(&mut self, mut f: impl FnMut(&mut BackendRows<'_>) -> R) -> Result<R, Aborted> {
        let backend = &*self.backend;
        care::transaction(|| {
            let replays = Replays::of(backend.number);
            f(&mut BackendRows { backend, replays })
        })
    }

    fn begin_epoch(&mut self, claimed: u64) {
        self.backend.begin_epoch(claimed, self.now);
        process::debug(|| format!("claiming the guard of backend \"{}\"", self.backend.name()));
    }

    fn record(&mut self, record: Record) {
        self.backend.books.records.push(record);
    }

    fn save(&mut self) -> Result<(), Aborted> {
        save(std::slice::from_mut(self.backend), |_| true, self.now)
    }

    fn flush(&mut self) -> u64 {
        ticks::flush()
    }

    fn wait_again(&mut self, since: u64) -> Result<(), Aborted> {
        self.backend.heads.clear();
        let backend = &*self.backend;
        process::transaction(|| refused::heal(backend.number, backend.lane(), backend.stream(), since))
    }

    fn adopt(&mut self, cursor: Cursor, total: i64) {
        self.backend.adopt(cursor, total, self.now);
    }

    fn read_again(&mut self, cursor: Cursor, reread_to: i64) {
        self.backend.read_again(cursor, reread_to, self.now);
    }

    fn count_healing(&mut self) {
        self.backend.count_healing();
    }

    fn tell(&mut self, notice: Notice<'_>) {
        match notice {
            Notice::Heals(guard) => {
                self.backend.count_healed(self.backend.total() - guard.total);
                self.backend.note_loss(LOST_ENTRIES, KEEP_DATA, self.now);
                if self.backend.takes_line(self.now) {
                    say_healed(self.backend, guard);
                }
            }
            Notice::Replays => {
                let is_news = self.backend.note_loss(LOST_GUARD, KEEP_DATA, self.now);
                if is_news && self.backend.takes_line(self.now) {
                    say_replayed(self.backend);
                }
            }
            Notice::Compared {
                why,
                guard,
                found,
                missing,
            } => {
                let is_news = why != Why::Missing || self.backend.note_loss(LOST_GUARD, KEEP_DATA, self.now);
                if is_news && self.backend.takes_line(self.now) {
                    say_compared(self.backend, why, guard, found, missing);
                }
            }
        }
    }

    fn is_restored(&self) -> bool {
        self.backend.is_restored()
    }

    fn compares_to(&mut self, tick: &Arc<Tick>) {
        self.backend.compares_to(tick);
    }

    fn has_compared(&mut self) -> Result<(), Aborted> {
        self.backend.forget_restores()?;
        self.backend.has_compared(self.now);
        Ok(())
    }

    fn has_taken_over(&mut self) -> Result<(), Aborted> {
        self.backend.has_taken_over()
    }

    fn order(&mut self, order: Order) {
        self.backend.order(order);
    }

    fn disbelieve(&mut self, field: &str) {
        let key = self.backend.guard_key().unwrap_or_default();
        let text = format!("the guard has a value in {field} that this server has never written: {key}");
        self.hold_off(Failure::of(Trouble::NoGuard, text), Duration::ZERO);
    }

    fn hold_off(&mut self, failure: Failure, retry_after: Duration) {
        self.backend.hold_off(failure, retry_after, self.now);
    }

    fn let_go(&mut self) {
        self.backend.let_go();
    }

    fn come_up(&mut self) -> Result<(), Aborted> {
        self.backend.reload_streams()?;
        self.backend.up(self.now);
        Ok(())
    }

    /// A mutation makes it small, so that tests need few events.
    fn waiting_at_once(&self) -> usize {
        match fault::is_mutated(Mutation::CompareByTwo) {
            true => 2,
            false => 100_000,
        }
    }
}

/// The tables, within a transaction, as one backend or lane sees them.
struct BackendRows<'a> {
    backend: &'a Backend,
    replays: Replays,
}

impl Rows for BackendRows<'_> {
    type Table = EventsTable;

    fn open(&mut self) -> EventsTable {
        EventsTable::open(&catalog::expect_relations())
    }

    fn close(&mut self, table: EventsTable) {
        table.close();
    }

    fn wanted(&self, scan: &EventsScan, purpose: Purpose, own_stream: Option<&str>) -> Option<Wanted> {
        let row = scan.row();
        if row.backend_number() != self.backend.number || !is_comparable(row) {
            return None;
        }
        // Nothing else of the row is read, because other values may not be readable.
        let stream = row.text(attribute::STREAM);
        let stream = stream.as_deref().or(own_stream).unwrap_or(self.backend.stream());
        self.backend.serves(stream).then(|| Wanted {
            stream: Arc::from(stream),
            event_id: row.uuid(attribute::EVENT_ID).unwrap_or_default(),
            created_at_us: row.created_at_us(),
            purpose,
        })
    }

    fn is_replay(&self, scan: &EventsScan) -> bool {
        self.replays.has(scan.row().key())
    }

    fn published(&mut self, event_id: [u8; 16]) -> Option<(Key, i64)> {
        branches::only_row_of(self.backend.number, event_id)
    }

    fn waiting(&mut self, after: i64, limit: usize) -> Vec<i64> {
        refused::waiting(self.backend.number, after, limit)
    }

    fn still_waiting(&mut self, seqs: &[i64]) -> Vec<i64> {
        refused::still_waiting(seqs)
    }

    fn highest_written_down(&mut self) -> i64 {
        refused::highest_written_down(self.backend.number)
    }

    fn is_written_down(&mut self, seq: i64, wanted: &Wanted) -> bool {
        refused::is_written_down(seq, wanted.event_id)
    }
}

/// Whether the stream in which to look for a row is known. If it is not, the row fails when it is read to be sent.
fn is_comparable(row: &Row) -> bool {
    !care::is_careful() || care::tried(|| row.text(attribute::STREAM).map(|_| ())).is_ok()
}

/// Completes a task that all lanes of a backend do once (a take-over, or comparing a restore) when the last lane has
/// done it.
pub(super) fn finish_lanes(backends: &mut [Backend], latest: &Arc<Tick>) -> Result<(), Aborted> {
    for index in 0..backends.len() {
        let finder = &backends[index];
        // The lanes of a paused backend do both later, even if its finder has come to the newest tick.
        let Some(row) = finder.row().filter(|row| finder.is_finder() && row.enabled) else {
            continue;
        };
        let number = finder.number;
        let of_lanes = || backends.iter().filter(|b| b.number == number && b.lane().is_some());
        // Until the finder has read that far, more lanes may have to be made.
        let has_found_all = Arc::ptr_eq(&finder.delivery.acked().from, latest);
        let is_compared = !row.restores.is_empty() && has_found_all && !of_lanes().any(Backend::is_restored);
        if is_compared {
            backends[index].forget_restores()?;
        }
        taking_over::finish_lanes(backends, index)?;
    }
    Ok(())
}

/// With at_least_once, the events of a restored dump are sent without comparing them with the streams.
pub(super) fn give_up_comparing(backend: &mut Backend) -> Result<(), Aborted> {
    let Some(row) = backend.row().filter(|row| !row.restores.is_empty()) else {
        return Ok(());
    };
    if backend.lane().is_some() {
        // The finder logs it for all lanes.
        return backend.forget_restores();
    }
    let count = process::transaction(|| restores::count_restored(&row.restores))?;
    log(
        LogLevel::Warning,
        &format!("{count} events of a dump were restored for backend \"{}\"", row.name),
        Some("With delivery = 'at_least_once' the worker does not look for them in the streams."),
        Some("Those that have been sent since the dump was taken are sent again, with the same event_id."),
    );
    backend.forget_restores()
}

/// What `last_error` and `outbox.health()` say when Redis has lost something; `outbox.backend_health()` knows how these
/// begin.
const LOST_GUARD: &str = "its guard was missing: Redis has lost its data, or is another Redis";
const LOST_ENTRIES: &str = "Redis has lost entries that it had acknowledged";
const KEEP_DATA: &str = "In Redis, maxmemory-policy must not be one of allkeys-* (CONFIG SET maxmemory-policy noeviction). \
    Check its persistence and replication, too. outbox.replay() appends retained events once more.";

fn say_healed(backend: &Backend, guard: &Guard) {
    let (known, found) = (backend.delivery.number(), guard.number);
    log(
        LogLevel::Warning,
        &format!(
            "backend \"{}\" heals: Redis has lost what it acknowledged",
            backend.name()
        ),
        Some(&format!(
            "Its guard names batch {found}, but the last acknowledged batch is {known}."
        )),
        Some("The lost events are appended again. Check Redis's persistence and replication, and wait_replicas."),
    );
}

fn say_replayed(backend: &Backend) {
    log(
        LogLevel::Warning,
        &format!("guard of backend \"{}\" is missing", backend.name()),
        Some("Redis has lost its data, or this is another Redis."),
        Some("Because of on_missing_guard, all retained events are sent again."),
    );
}

fn say_compared(backend: &Backend, why: Why, guard: Option<&Guard>, there: usize, missing: usize) {
    let (message, detail) = match (why, guard) {
        (Why::Missing, _) => (
            format!("guard of backend \"{}\" is missing", backend.name()),
            "Redis has lost its data, or this is another Redis.".to_owned(),
        ),
        (Why::OtherHistory, Some(guard)) => (
            format!(
                "backend \"{}\" goes on after another history of this database",
                backend.name()
            ),
            format!(
                "The server at {} (timeline {}) was the last to write its streams, up to a position that this server never had.",
                shown(&guard.place),
                guard.timeline
            ),
        ),
        (Why::Restored, _) => (
            format!("events of a dump were restored for backend \"{}\"", backend.name()),
            "Some may have been sent since the dump was taken.".to_owned(),
        ),
        (Why::Unfinished | Why::OtherHistory, _) => (
            format!("backend \"{}\" goes on where comparing was interrupted", backend.name()),
            "Its guard says that later events may already be in the streams.".to_owned(),
        ),
    };
    let hint = format!(
        "{there} of the events after its saved position are already in the streams and are not repeated; {missing} are sent.{}",
        match why {
            Why::Missing => " Check that Redis evicts no keys (maxmemory-policy).",
            _ => "",
        }
    );
    log(LogLevel::Warning, &message, Some(&detail), Some(&hint));
}
