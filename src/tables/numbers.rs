//! Numbers of events: drawn from a sequence, and ascending even if the sequence is altered (see
//! `relay::reading::numbers`).
//!
//! For each database, shared memory holds the highest number that was drawn. After a start or a crash it is unknown;
//! the first process that needs it, a publisher or the worker, finds it in what is durable. If the library is not
//! preloaded, each session finds it alone. There is no worker then, so the numbers need only be above those of the rows
//! and the saved cursors.

use crate::server::database_slot::DatabaseSlot;
use crate::server::guc::LogLevel;
use crate::server::process::log;
use crate::server::shmem;
use crate::tables::catalog::{self, Relations};
use crate::tables::events::EventsTable;
use crate::tables::lent_numbers;
use crate::tables::row::{Row, attribute};
use crate::tables::sequence;
use crate::tables::whole_table::each_row;
use pgrx::pg_sys;
use relay::reading::range::Position;
use relay::reading::snapshot::Tick;
use std::cell::{Cell, RefCell};
use std::ffi::CStr;
use std::sync::Arc;

const LOCK: pg_sys::LOCKMODE = pg_sys::AccessShareLock as pg_sys::LOCKMODE;

/// The most times that the sequence is set forward for one number. More would mean that somebody sets it back each
/// time.
const ATTEMPTS: usize = 10;

thread_local! {
    /// Without shared memory: the sequence, and the highest of its numbers that this session knows.
    static OWN: Cell<(pg_sys::Oid, i64)> = const { Cell::new((pg_sys::InvalidOid, 0)) };
}

/// Returns the caller's transaction id and the next number, always drawn in this order (see [`Tick`]). Within a
/// transaction that may write.
///
/// Both the table and the sequence are locked first, and neither lock is held while waiting for the other. TRUNCATE
/// with RESTART IDENTITY locks the table first, and DROP EXTENSION the sequence, so any fixed order would deadlock with
/// one of them.
pub(crate) fn draw_numbers(relations: &Relations) -> (u64, i64) {
    let slot = slot().filter(|slot| slot.numbers.get().is_some());
    // There is one guard for all calls, because a guard costs as much as a call.
    // SAFETY: within a transaction that may write; locks are kept until its end. Nothing in it needs to be dropped.
    let (xid, before, mut seq, [current, session]) = unsafe {
        pg_sys::ffi::pg_guard_ffi_boundary(|| {
            let roles = [hot::GetUserId(), hot::GetOuterUserId()];
            hot::lock(relations.events, relations.sequence);
            let xid = hot::GetTopFullTransactionId().value;
            let Some(slot) = slot else {
                return (xid, None, 0, roles);
            };
            let before = slot.numbers.get();
            let seq = sequence::nextval_internal(relations.sequence, false);
            (xid, before, seq, roles)
        })
    };
    let before = before.unwrap_or_else(|| {
        let before = highest(relations);
        seq = sequence::next(relations.sequence);
        before
    });
    sequence::expect_ascending(relations.sequence);
    if seq <= before {
        seq = go_on(relations, seq);
    }
    match slot {
        Some(slot) => slot.numbers.raise(seq),
        None => raise(relations, seq),
    }
    lent_numbers::note(xid, seq, current, session);
    (xid, seq)
}

/// Functions that are called for each event, without a guard around each call.
mod hot {
    use pgrx::pg_sys;

    // SAFETY: the declarations of storage/lmgr.h, access/xact.h and miscadmin.h; called within a guard, because they
    // may raise an ERROR.
    unsafe extern "C-unwind" {
        fn LockRelationOid(relation: pg_sys::Oid, mode: pg_sys::LOCKMODE);
        fn ConditionalLockRelationOid(relation: pg_sys::Oid, mode: pg_sys::LOCKMODE) -> bool;
        fn UnlockRelationOid(relation: pg_sys::Oid, mode: pg_sys::LOCKMODE);
        pub(super) fn GetTopFullTransactionId() -> pg_sys::FullTransactionId;
        pub(super) fn GetUserId() -> pg_sys::Oid;
        pub(super) fn GetOuterUserId() -> pg_sys::Oid;
    }

    /// # Safety
    /// Within a transaction and a guard.
    pub(super) unsafe fn lock(table: pg_sys::Oid, sequence: pg_sys::Oid) {
        const MODE: pg_sys::LOCKMODE = pg_sys::RowExclusiveLock as pg_sys::LOCKMODE;
        // SAFETY: the caller's promise; only releases what was taken here.
        unsafe {
            loop {
                LockRelationOid(table, MODE);
                if ConditionalLockRelationOid(sequence, MODE) {
                    return;
                }
                UnlockRelationOid(table, MODE);
                LockRelationOid(sequence, MODE);
                UnlockRelationOid(sequence, MODE);
            }
        }
    }
}

/// The highest number that any event got, whether or not it committed or still exists. Within a transaction.
pub(crate) fn highest(relations: &Relations) -> i64 {
    match slot() {
        Some(slot) => slot.numbers.get().unwrap_or_else(|| find(relations, slot)),
        None => {
            let (of, own) = OWN.get();
            match of == relations.sequence {
                // Other sessions may have drawn numbers since.
                true => own.max(highest_event(relations)),
                false => {
                    let found = highest_kept(relations);
                    OWN.set((relations.sequence, found));
                    found
                }
            }
        }
    }
}

fn raise(relations: &Relations, seq: i64) {
    match slot() {
        Some(slot) => slot.numbers.raise(seq),
        None => OWN.set((relations.sequence, seq)),
    }
}

/// The slot of this session's database; `None`: the library is not preloaded.
fn slot() -> Option<&'static DatabaseSlot> {
    shmem::claim_database_slot_here()
}

/// Finds the highest number after a start. On a standby it is found each time, because rows come by replication.
fn find(relations: &Relations, slot: &DatabaseSlot) -> i64 {
    let found = highest_kept(relations);
    // SAFETY: reads shared state.
    if unsafe { pg_sys::RecoveryInProgress() } {
        return found;
    }
    slot.numbered_by(relations.sequence);
    slot.numbers.found(found);
    slot.numbers.get().unwrap_or(found)
}

/// Called when the sequence has given a number that is not above all earlier ones. One session sets it forward.
fn go_on(relations: &Relations, given: i64) -> i64 {
    let (sequence, exclusive) = (relations.sequence, pg_sys::ExclusiveLock as pg_sys::LOCKMODE);
    // SAFETY: a lock of the transaction, released below or by its abort. Only this function locks this object. A
    // session that has the lock has drawn from the sequence before, and so does not wait for a session that alters the
    // sequence.
    unsafe { pg_sys::LockDatabaseObject(pg_sys::RelationRelationId, sequence, 0, exclusive) };
    // Another session may have set it forward meanwhile.
    let mut before = highest(relations);
    let mut seq = sequence::next(sequence);
    for _ in 0..ATTEMPTS {
        if seq > before {
            break;
        }
        let highest = before.max(highest_scheduled(relations)).max(highest_kept(relations));
        let maximum = sequence::maximum(sequence);
        if highest >= maximum {
            let trouble = format!("Its MAXVALUE is {maximum}, and numbers up to {highest} were given.");
            sequence::refuse(trouble);
        }
        // Skips numbers that others have just drawn and not used yet: at most one for each session.
        // SAFETY: a plain read.
        let margin = i64::from(unsafe { pg_sys::MaxBackends });
        sequence::set(sequence, highest.saturating_add(margin).min(maximum - 1).max(highest));
        raise(relations, highest);
        before = highest;
        seq = sequence::next(sequence);
        say_gone_on(sequence, given, seq);
    }
    // SAFETY: taken above.
    unsafe { pg_sys::UnlockDatabaseObject(pg_sys::RelationRelationId, sequence, 0, exclusive) };
    if seq <= before {
        let trouble = "It is set back again and again.".to_owned();
        sequence::refuse(trouble);
    }
    seq
}

fn say_gone_on(sequence: pg_sys::Oid, given: i64, seq: i64) {
    // The extension was created again: its sequence starts from the beginning, and no sequence was set back.
    if slot().is_some_and(|slot| slot.numbered_by(sequence)) {
        return;
    }
    log(
        LogLevel::Info,
        &format!("numbers of events went on at {seq}: sequence outbox.events_seq_seq had gone back to {given}"),
        Some("TRUNCATE with RESTART IDENTITY, setval(), ALTER SEQUENCE and restored data set it back."),
        Some("Nothing is lost, and there is nothing to do."),
    );
}

/// The highest number in everything that survives a crash: in rows (also of prepared transactions), positions, and the
/// sequence itself. Scheduled events do not count here, because they get new numbers when they are due.
fn highest_kept(relations: &Relations) -> i64 {
    let highest_refused = match relation(c"refused_events") {
        pg_sys::InvalidOid => 0,
        table => last_of(table, |_| relation(c"refused_events_pkey")).unwrap_or_default(),
    };
    sequence::last(relations.sequence)
        .max(highest_event(relations))
        .max(highest_refused)
        .max(highest_of_positions())
}

/// The highest number of all rows of `outbox.events`, however they were inserted.
fn highest_event(relations: &Relations) -> i64 {
    let last = last_of(relations.events, |relations| relations.events_seq_key);
    // If the index was dropped, all rows are read. That is rarely needed.
    last.unwrap_or_else(|| highest_of_columns(relations.events, &["seq"]))
}

/// The OID of one of our tables.
fn relation(name: &CStr) -> pg_sys::Oid {
    // SAFETY: catalog look-ups by constant names within a transaction.
    unsafe {
        let schema = pg_sys::get_namespace_oid(c"outbox".as_ptr(), false);
        pg_sys::get_relname_relid(name.as_ptr(), schema)
    }
}

/// The last value in an index whose first column is a number, including rows that are not visible. 0: the index is
/// empty. `None`: there is no index.
fn last_of(table: pg_sys::Oid, index: impl FnOnce(&Relations) -> pg_sys::Oid) -> Option<i64> {
    let (table, relations) = catalog::open_table(table, LOCK);
    let index = index(&relations);
    // SAFETY: a backward index scan without keys; what is opened is closed, or released by the transaction's abort.
    unsafe {
        if index == pg_sys::InvalidOid {
            pg_sys::table_close(table, LOCK);
            return None;
        }
        let index = pg_sys::index_open(index, LOCK);
        let any = &raw mut pg_sys::SnapshotAnyData;
        let scan = pg_sys::systable_beginscan_ordered(table, index, any, 0, std::ptr::null_mut());
        let tuple = pg_sys::systable_getnext_ordered(scan, pg_sys::ScanDirection::BackwardScanDirection);
        let last = match tuple.is_null() {
            true => 0,
            false => Row::of(tuple, (*table).rd_att).i64(attribute::SEQ).unwrap_or_default(),
        };
        pg_sys::systable_endscan_ordered(scan);
        pg_sys::index_close(index, LOCK);
        pg_sys::table_close(table, LOCK);
        Some(last)
    }
}

/// The highest number of scheduled events. All of them are read.
fn highest_scheduled(relations: &Relations) -> i64 {
    highest_of_columns(relations.scheduled, &["seq"])
}

/// The highest number in the saved cursors and their ticks.
fn highest_of_positions() -> i64 {
    const COLUMNS: [&str; 5] = ["from_low_seq", "from_high_seq", "to_low_seq", "to_high_seq", "last_seq"];
    match relation(c"cursors") {
        pg_sys::InvalidOid => 0,
        cursors => highest_of_columns(cursors, &COLUMNS),
    }
}

/// The highest value in these columns of a table, which hold numbers.
fn highest_of_columns(table: pg_sys::Oid, names: &[&str]) -> i64 {
    let mut highest = 0;
    each_row(table, names, |row| {
        highest = row.values().map(|value| value.value() as i64).fold(highest, i64::max);
    });
    highest
}

/// A tick's `next_xid` and `low_seq`, and the lowest number of rows that came after it.
type Vouched = ((u64, i64), Option<i64>);

thread_local! {
    /// Ticks whose bounds were checked before.
    static VOUCHED: RefCell<Vec<Vouched>> = const { RefCell::new(Vec::new()) };
}

/// Called when positions are loaded, because earlier results may be outdated. Besides, rows that were inserted without
/// the trigger may have higher numbers than were drawn; ticks must cover these, and no session may draw them again.
/// Returns the highest number. Within a transaction.
pub(crate) fn vouch_anew() -> i64 {
    VOUCHED.with_borrow_mut(Vec::clear);
    let relations = catalog::expect_relations();
    // This does not wait for a session that has locked the table. Rows that it inserts without the trigger are noticed
    // when it commits.
    if EventsTable::is_open_to_all(&relations) {
        raise(&relations, highest(&relations).max(highest_event(&relations)));
    }
    highest(&relations)
}

/// A saved position, with bounds that certainly hold. Its ticks state that later transactions have only numbers above
/// `low_seq`. That can be wrong if rows were numbered by another version of the library or without the trigger, or if
/// numbers were lost in a crash. Then the bound is lowered to where it holds, and the rows above it are read once more
/// and distinguished by their transaction ids. This reads the rows after the position in an index; within a
/// transaction.
pub(crate) fn vouched(position: &Position) -> Position {
    let relations = catalog::expect_relations();
    let highest = highest(&relations);
    let began = slot().and_then(|slot| slot.numbers.began()).unwrap_or(highest);
    position.with_ticks(|tick| {
        if tick.low_seq == 0 {
            return tick.clone();
        }
        let lowest = lowest_since(&relations, tick).map_or(i64::MAX, |seq| seq - 1);
        let bound = match is_of_this_run(tick) {
            true => lowest,
            false => lowest.min(began),
        };
        match bound < tick.low_seq {
            true => Arc::new(tick.lowered_to(bound)),
            false => tick.clone(),
        }
    })
}

/// As [`vouched`], for a guard's position. Somebody else may have written it, and a saved position bounds the numbers
/// of all later events. So no number in it may be above those that were drawn.
pub(crate) fn vouched_of_guard(position: &Position) -> Position {
    let highest = highest(&catalog::expect_relations());
    let within = position.with_ticks(|tick| match tick.high_seq > highest {
        true => Arc::new(Tick {
            high_seq: highest,
            ..tick.lowered_to(highest)
        }),
        false => tick.clone(),
    });
    let within = match within.under_way {
        Some(way) if way.last_seq > highest => Position::towards(within.from, way.to, highest),
        _ => within,
    };
    vouched(&within)
}

fn is_of_this_run(tick: &Tick) -> bool {
    shmem::incarnation().is_some_and(|(_, began)| tick.snapshot.xmax() > began.first_xid)
}

/// The lowest number, not above those that `tick` has passed, of rows that came later. Backends often stand at the same
/// tick.
fn lowest_since(relations: &Relations, tick: &Tick) -> Option<i64> {
    let key = (tick.next_xid, tick.low_seq);
    let known = VOUCHED.with_borrow(|known| known.iter().find(|(k, _)| *k == key).map(|(_, lowest)| *lowest));
    if let Some(known) = known {
        return known;
    }
    let table = EventsTable::open(relations);
    let lowest = table.lowest_since(tick.next_xid, tick.low_seq);
    table.close();
    VOUCHED.with_borrow_mut(|known| known.push((key, lowest)));
    if let Some(seq) = lowest {
        log(
            LogLevel::Warning,
            &format!("events have come with numbers from {seq} on, which a saved position had passed"),
            Some("Another version of the library has numbered them, or they were inserted without its trigger."),
            Some("The worker finds them by their transaction ids: nothing is lost, and there is nothing to do."),
        );
    }
    lowest
}
