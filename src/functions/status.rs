//! What the views ask of the library: the worker's state, and how many events wait behind a saved cursor.

use crate::server::database_slot::{DatabaseSlot, SlotState};
use crate::server::datum::bytes_of;
use crate::server::error::strict_arguments;
use crate::server::guc;
use crate::server::place;
use crate::server::report;
use crate::server::shmem;
use crate::server::trigger_call::{When, expect_trigger};
use crate::server::txn;
use crate::tables::catalog;
use crate::tables::events::EventsTable;
use crate::tables::rights;
use crate::tables::row::{Row, attribute, hash_slot_of_text};
use crate::tables::ticks;
use crate::tables::{backends, cursors};
use pgrx::iter::TableIterator;
use pgrx::{PgLogLevel, PgSqlErrorCode, name, pg_extern, pg_sys};
use relay::reading::range::{Key, Position, RangeScan};
use relay::redis::hash_slot::{HASH_SLOTS, tag_of};
use std::collections::BTreeMap;
use std::sync::Arc;

/// Pending events are counted exactly up to this many.
const COUNTED: i64 = 10_000;
/// A worker counts as hanging when it has given no sign of life for this long. (Loaded machines have taken a second.)
pub(super) const HANGS_AFTER_MS: u64 = 3_000;
/// The launcher starts a worker within so long, also while the database is locked for a moment.
const STARTS_WITHIN_MS: u64 = 8_000;
/// How many rows are looked at to count, including those of other backends.
const COUNT_STEPS: i64 = 100_000;
/// How many rows are looked at between looks for a request to cancel.
const STEPS_WITHOUT_INTERRUPT: i64 = 10_000;

/// `outbox.worker_status()`
#[pg_extern(sql = false)]
fn worker_status() -> TableIterator<'static, (name!(worker_pid, Option<i32>), name!(state, String))> {
    let (pid, state) = worker_here();
    TableIterator::once((pid, state.to_owned()))
}

/// This database's worker and what it is doing, or why there is none.
pub(super) fn worker_here() -> (Option<i32>, &'static str) {
    let slot = shmem::database_slot_here();
    let pid = slot.map(|s| s.pid()).filter(|pid| *pid != 0);
    let lasts = |slot: Option<&DatabaseSlot>| slot.is_some_and(|s| s.in_state_for_ms() >= STARTS_WITHIN_MS);
    let state = match slot.map(|s| (s.state(), pid)) {
        _ if !shmem::is_attached() => "library not in shared_preload_libraries",
        // SAFETY: reads shared state.
        _ if unsafe { pg_sys::RecoveryInProgress() } => "standby",
        _ if !guc::ENABLED.get() => "disabled",
        // Whatever the launcher knows: it may have been renamed, or have had no worker since the server's start.
        _ if pid.is_none() && !is_listed() => "database not in outbox_relay.databases",
        _ if pid.is_none() && !is_open() => "connections not allowed",
        _ if pid.is_none() && shmem::launcher_pid().is_none() => "waiting for the launcher",
        Some((SlotState::Running, Some(_))) if is_hanging(slot) => "hanging",
        Some((SlotState::Running, Some(_))) => "running",
        Some((SlotState::Mismatched, Some(_))) => "version mismatch",
        // It is there, and cannot begin.
        Some((SlotState::Starting, Some(_))) if slot.is_some_and(|s| s.trouble().is_some()) => "failing to start",
        // It has left, or is to come.
        Some((SlotState::Wanted | SlotState::Running | SlotState::Mismatched, None)) if lasts(slot) => {
            "waiting for the launcher"
        }
        Some((SlotState::Starting | SlotState::Wanted, _)) => "starting",
        Some((SlotState::Running | SlotState::Mismatched, None)) => "starting",
        Some((SlotState::Short, _)) => "waiting for a background worker process",
        Some((SlotState::Failing, _)) => "failing to start",
        Some((SlotState::Unserved, _)) => "database not in outbox_relay.databases",
        None if shmem::is_full() => "no slot in shared memory",
        _ => "stopped",
    };
    (pid, state)
}

/// Whether `outbox_relay.databases` names this database.
fn is_listed() -> bool {
    // SAFETY: a catalog look-up within a transaction; the text is read before it can go.
    place::database().is_none_or(|name| guc::serves(&name.to_string_lossy()))
}

/// Whether connections to this database are allowed, also those of workers.
fn is_open() -> bool {
    // SAFETY: a look-up within a transaction; the tuple is released once it was read. It is never a null pointer while
    // somebody is connected, except to a database that is being dropped.
    unsafe {
        let cache = pg_sys::SysCacheIdentifier::DATABASEOID as i32;
        let tuple = pg_sys::SearchSysCache1(cache, pg_sys::Datum::from(pg_sys::MyDatabaseId));
        if tuple.is_null() {
            return false;
        }
        let form = pg_sys::GETSTRUCT(tuple).cast::<pg_sys::FormData_pg_database>();
        let is_open = (*form).datallowconn;
        pg_sys::ReleaseSysCache(tuple);
        is_open
    }
}

/// Whether a worker has been called in vain. Whoever looks calls it, so that whoever looks next knows.
fn is_hanging(slot: Option<&DatabaseSlot>) -> bool {
    slot.is_some_and(|slot| {
        slot.call();
        slot.unanswered_ms() >= HANGS_AFTER_MS
    })
}

/// How many committed rows of a backend lie behind its saved cursor, and when the oldest was created. Rows are counted
/// up to `limit`; the rest is estimated.
fn behind_cursor(number: i32, limit: i64, most_steps: Option<i64>) -> (i64, Option<i64>) {
    let Some(relations) = catalog::relations() else {
        return (0, None);
    };
    let stand = Stand::of(number);
    let position = stand.lowest();
    let now = Arc::new(ticks::take(&relations).0);
    let mut table = EventsTable::open(&relations);
    table.want_only(vec![number]);
    let (mut count, mut met, mut oldest, mut last_seq) = (0, 0, None, 0);
    let mut count_range = |scan: &mut RangeScan<crate::tables::events::EventsScan>| -> bool {
        while let Some(step) = scan.step() {
            met += 1;
            last_seq = step.seq();
            if let Some(key) = step.row() {
                let row = scan.current().row();
                if row.backend_number() == number && stand.waits(row, key) {
                    oldest = oldest.or_else(|| row.i64(attribute::CREATED_AT));
                    count += 1;
                }
            }
            if count >= limit || most_steps.is_some_and(|most| met >= most) {
                return false;
            }
            if met % STEPS_WITHOUT_INTERRUPT == 0 {
                pgrx::check_for_interrupts!();
            }
        }
        true
    };
    let mut whole = true;
    let mut from = position.from.clone();
    // With lanes, the scan begins where the range of the lowest one began.
    if let Some(under_way) = position.under_way.as_ref().filter(|_| stand.lanes.is_empty()) {
        let mut scan = RangeScan::open(&mut table, &from, &under_way.to, under_way.last_seq);
        whole = count_range(&mut scan);
        from = under_way.to.clone();
    }
    if whole {
        let mut scan = RangeScan::open(&mut table, &from, &now, 0);
        whole = count_range(&mut scan);
    }
    if !whole && limit > 1 {
        // The estimate assumes that this backend has the same share of the remaining numbers. (Rows of others are not
        // counted one by one. Among late rows, numbers tell nothing.)
        let rest = (now.high_seq - last_seq).max(0) as f64;
        let passed = (last_seq - position.place()).max(met);
        count += (rest * count as f64 / (passed as f64).max(1.0)) as i64;
    }
    table.close();
    (count, oldest)
}

/// Where a backend stands according to its saved cursors.
struct Stand {
    position: Position,
    /// The positions of the lanes by hash slot, in a cluster.
    lanes: BTreeMap<u16, Position>,
    own_stream: String,
}

impl Stand {
    fn of(number: i32) -> Self {
        let saved = |lane| cursors::cursor(number, lane).map(|(cursor, _)| cursor.position);
        let lanes: BTreeMap<u16, Position> = cursors::lanes(number)
            .into_iter()
            .filter_map(|slot| Some((slot, saved(Some(slot))?)))
            .collect();
        Self {
            position: saved(None).unwrap_or_else(Position::beginning),
            own_stream: match lanes.is_empty() {
                true => String::new(),
                false => backends::own_stream(number),
            },
            lanes,
        }
    }

    /// The lowest of all positions: no waiting event lies before it.
    fn lowest(&self) -> Position {
        let mut lowest = &self.position;
        for lane in self.lanes.values() {
            if !lane.from.snapshot.includes(&lowest.from.snapshot) {
                lowest = lane;
            }
        }
        lowest.clone()
    }

    /// Whether a row behind [`Self::lowest`] still waits for its lane.
    fn waits(&self, row: &Row, key: Key) -> bool {
        if self.lanes.is_empty() {
            return true;
        }
        !self
            .lanes
            .get(&row.hash_slot(&self.own_stream))
            .unwrap_or(&self.position)
            .covers(key)
    }
}

crate::sql_function!(hash_slot, pg_finfo_hash_slot);

/// `outbox.hash_slot(stream)`, strict
fn hash_slot(fcinfo: pg_sys::FunctionCallInfo) -> pg_sys::Datum {
    let Some([stream]) = strict_arguments(fcinfo) else {
        return pg_sys::Datum::from(0);
    };
    // SAFETY: an argument of type text.
    let slot = hash_slot_of_text(unsafe { bytes_of(stream) });
    pg_sys::Datum::from(i32::from(slot))
}

/// `outbox.hash_tag(slot)`
#[pg_extern(sql = false)]
fn hash_tag(hash_slot: i32) -> Option<String> {
    u16::try_from(hash_slot)
        .ok()
        .filter(|slot| *slot < HASH_SLOTS)
        .map(tag_of)
}

/// `outbox.backlog(backend_number)`
#[pg_extern(sql = false)]
fn backlog(
    backend_number: i32,
) -> TableIterator<
    'static,
    (
        name!(pending, i64),
        name!(oldest_created_at, Option<pgrx::datum::TimestampWithTimeZone>),
    ),
> {
    let count = || rights::of_owner(|| behind_cursor(backend_number, COUNTED, Some(COUNT_STEPS)));
    // SAFETY: this frame has nothing to be dropped, nor has pgrx's, which calls it.
    let (pending, oldest) = unsafe { report::guard(count) };
    let oldest = oldest.and_then(|us| pgrx::datum::TimestampWithTimeZone::try_from(us).ok());
    TableIterator::once((pending, oldest))
}

/// `outbox.has_waiting_events(backend_number)`
#[pg_extern(sql = false)]
fn has_waiting_events(backend_number: i32) -> bool {
    let waits = || backends::waits_elsewhere(backend_number) || behind_cursor(backend_number, 1, None).0 > 0;
    // SAFETY: this frame has nothing to be dropped, nor has pgrx's, which calls it.
    unsafe { report::guard(|| rights::of_owner(waits)) }
}

/// Called by the extension's SQL script, so the library learns of the extension whichever statement runs the script.
#[pg_extern(sql = false)]
fn announce_extension() {
    txn::extension_created();
    if !shmem::is_attached() {
        report::say(
            PgLogLevel::WARNING as i32,
            PgSqlErrorCode::ERRCODE_WARNING,
            "outbox_relay is not preloaded: events are kept, but not sent",
            None,
            Some("Add outbox_relay to shared_preload_libraries and restart the server."),
        );
    }
}

/// `outbox.wake()`
#[pg_extern(sql = false)]
fn wake() {
    if let Some(slot) = shmem::database_slot_here() {
        slot.announce_work();
        slot.announce_schedule();
        slot.ask();
    }
    // Once more when what this transaction has done can be seen.
    txn::woken();
}

/// `outbox.want_consumers()`
#[pg_extern(sql = false)]
fn want_consumers() -> bool {
    if let Some(slot) = shmem::database_slot_here() {
        slot.view_consumers();
    }
    true
}

/// `outbox.probe_consumers()`
#[pg_extern(sql = false)]
fn probe_consumers() -> bool {
    shmem::database_slot_here().is_some_and(|slot| slot.probe_consumers())
}

crate::sql_function!(backends_changed, pg_finfo_backends_changed);

/// `outbox.backends_changed()`, after a statement on `backends`, `backend_passwords`, `publisher_limits`, `routes`,
/// `take_overs`, `restores` or `copied_backends`
fn backends_changed(fcinfo: pg_sys::FunctionCallInfo) -> pg_sys::Datum {
    let relations = catalog::expect_relations();
    // SAFETY: called by Postgres. Marks the table's cache entries in all sessions as stale when this transaction
    // commits.
    unsafe {
        expect_trigger(
            fcinfo,
            "backends_changed",
            When::AfterStatement,
            relations.settings_tables(),
        );
        // Sessions cache only what these tables hold. A restore writes many rows of `restores`, and must not cause
        // as many invalidations.
        let trigger = (*fcinfo).context.cast::<pg_sys::TriggerData>();
        let table = (*(*trigger).tg_relation).rd_id;
        let cached = [
            relations.backends,
            relations.backend_passwords,
            relations.publisher_limits,
            relations.routes,
        ];
        if cached.contains(&table) {
            // The invalidation does not name the table itself. If it did, a process that has the table open would
            // rebuild its cache entry and process further invalidations while doing so, nested in each other. It
            // would run out of stack if others sent them faster than it rebuilds.
            let news = match relations.backends_news {
                pg_sys::InvalidOid => relations.backends,
                sequence => sequence,
            };
            pg_sys::CacheInvalidateRelcacheByRelid(news);
        }
        // An AFTER trigger's result is ignored.
        (*fcinfo).isnull = false;
    }
    txn::backends_changed();
    pg_sys::Datum::from(0)
}
