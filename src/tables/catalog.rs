//! What a session caches about our tables: the relations' OIDs. Postgres's invalidations tell when that has changed.

use crate::server::error::{internal, raise};
use crate::server::unguarded;
use crate::tables::known_backends::{self, KnownBackend};
use crate::tables::missing;
use crate::tables::row::{EVENT_COLUMNS, Row, attribute};
use once_cell::unsync::OnceCell;
use pgrx::pg_sys::panic::ErrorReport;
use pgrx::{PgSqlErrorCode, pg_guard, pg_sys};
use std::cell::Cell;
use std::ffi::CStr;
use std::rc::Rc;

/// OIDs of the relations that we read and write without SQL. Those of `events`, the sequence and `backends` are always
/// set, others may be missing (`InvalidOid`); see the module `missing`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Relations {
    pub events: pg_sys::Oid,
    /// Indexes are found by their columns and not by name, because an administrator may have replaced ours with
    /// another.
    pub events_seq_key: pg_sys::Oid,
    pub events_xid_key: pg_sys::Oid,
    pub events_id_key: pg_sys::Oid,
    pub scheduled_id_key: pg_sys::Oid,
    pub sequence: pg_sys::Oid,
    pub scheduled: pg_sys::Oid,
    pub backends: pg_sys::Oid,
    /// The sequence of the backends' numbers. Changes of backends are announced as invalidations of it, because hardly
    /// any session has it open.
    pub backends_news: pg_sys::Oid,
    pub backend_passwords: pg_sys::Oid,
    pub publisher_limits: pg_sys::Oid,
    pub routes: pg_sys::Oid,
    /// The functions of our own triggers on `events`.
    pub triggers: [pg_sys::Oid; 5],
    settings_tables: [pg_sys::Oid; 7],
    /// All tables that the worker writes.
    tables: [pg_sys::Oid; TABLES.len()],
}

const TABLES: [&CStr; 27] = [
    c"events",
    c"backends",
    c"backend_passwords",
    c"moved_backends",
    c"routes",
    c"publisher_limits",
    c"scheduled_events",
    c"refused_events",
    c"failed_events",
    c"inbox",
    c"consumer_grants",
    c"cursors",
    c"former_lanes",
    c"ticks",
    c"installation",
    c"incarnations",
    c"take_overs",
    c"restores",
    c"known_triggers",
    c"held_events",
    c"held_scheduled",
    c"held_cursors",
    c"held_refused",
    c"kept_rows",
    c"copied_backends",
    c"replays",
    c"consumer_groups",
];

/// The functions of our triggers that run when an event is inserted.
const TRIGGERS: [&CStr; 5] = [
    c"complete_event",
    c"confirm_event",
    c"hold_event",
    c"hold_scheduled",
    c"fan_out",
];

type Watched = [pg_sys::Oid; TABLES.len() + 2];
/// The index of `backends` in [`TABLES`].
const BACKENDS_TABLE: usize = 1;
const BACKENDS_NEWS: usize = TABLES.len() + 1;

impl Relations {
    /// All tables that the worker writes.
    pub(crate) fn tables(&self) -> &[pg_sys::Oid] {
        &self.tables
    }

    /// Tables whose changes the worker must be told of.
    pub(crate) fn settings_tables(&self) -> &[pg_sys::Oid] {
        &self.settings_tables
    }

    /// The owner of our tables that exist. Raises an ERROR if they have several.
    fn owner(&self) -> pg_sys::Oid {
        let mut first: Option<(pg_sys::Oid, &CStr)> = None;
        for (table, name) in self.tables.iter().zip(TABLES) {
            let owner = class_of(*table).owner;
            match first {
                _ if owner == pg_sys::InvalidOid => {}
                None => first = Some((owner, name)),
                Some((other, other_name)) if other != owner => raise(
                    ErrorReport::new(
                        PgSqlErrorCode::ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE,
                        format!(
                            "table outbox.{} has another owner than outbox.{}",
                            name.to_string_lossy(),
                            other_name.to_string_lossy()
                        ),
                        "",
                    )
                    .set_hint("Give all tables in schema outbox the same owner, a superuser."),
                ),
                Some(_) => {}
            }
        }
        first.map_or_else(|| missing::table(c"events"), |(owner, _)| owner)
    }

    /// The function of the trigger `fan_out`, the last of [`TRIGGERS`].
    pub(crate) fn fan_out(&self) -> pg_sys::Oid {
        self.triggers[TRIGGERS.len() - 1]
    }

    fn is_whole(&self) -> bool {
        !self.tables.contains(&pg_sys::InvalidOid) && self.sequence != pg_sys::InvalidOid
    }

    fn has(&self, relation: pg_sys::Oid) -> bool {
        let others = [
            self.events_seq_key,
            self.events_xid_key,
            self.events_id_key,
            self.scheduled_id_key,
            self.sequence,
        ];
        others.contains(&relation) || self.tables.contains(&relation)
    }
}

/// The current owner of our tables. Our code on them runs with that role's rights. Raises an ERROR if they have several
/// owners.
pub(crate) fn owner() -> pg_sys::Oid {
    let known = RELATIONS.get().or_else(look_up);
    known.unwrap_or_else(|| missing::extension()).owner()
}

/// A relation's current owner in the catalog; `InvalidOid` if the relation no longer exists.
pub(crate) fn owner_of(relation: pg_sys::Oid) -> pg_sys::Oid {
    class_of(relation).owner
}

/// Properties of a relation in the current catalog; empty if it no longer exists.
struct RelationClass {
    owner: pg_sys::Oid,
    method: pg_sys::Oid,
}

fn class_of(relation: pg_sys::Oid) -> RelationClass {
    // SAFETY: a look-up within a transaction; the tuple is released after it is read.
    unsafe {
        let cache = pg_sys::SysCacheIdentifier::RELOID as i32;
        let tuple = pg_sys::SearchSysCache1(cache, pg_sys::Datum::from(relation));
        if tuple.is_null() {
            return RelationClass {
                owner: pg_sys::InvalidOid,
                method: pg_sys::InvalidOid,
            };
        }
        let class = pg_sys::GETSTRUCT(tuple).cast::<pg_sys::FormData_pg_class>();
        let found = RelationClass {
            owner: (*class).relowner,
            method: (*class).relam,
        };
        pg_sys::ReleaseSysCache(tuple);
        found
    }
}

thread_local! {
    static REGISTERED: OnceCell<()> = const { OnceCell::new() };
    static RELATIONS: Cell<Option<Relations>> = const { Cell::new(None) };
    /// The table of events from which the worker has loaded its backends.
    static SERVED: Cell<Option<pg_sys::Oid>> = const { Cell::new(None) };
    /// The last known OIDs of all our tables and the sequence.
    static WATCHED: Cell<Watched> = const { Cell::new([pg_sys::InvalidOid; TABLES.len() + 2]) };
    /// Counts their invalidations, for the worker.
    static GENERATION: Cell<u64> = const { Cell::new(0) };
}

#[pg_guard]
// SAFETY: only Postgres calls this, in this process; it touches only variables of this thread.
unsafe extern "C-unwind" fn on_invalidation(_arg: pg_sys::Datum, relation: pg_sys::Oid) {
    let all = relation == pg_sys::InvalidOid;
    let watched = WATCHED.get();
    if all || watched.contains(&relation) {
        GENERATION.set(GENERATION.get() + 1);
    }
    if all || [watched[BACKENDS_TABLE], watched[BACKENDS_NEWS]].contains(&relation) {
        known_backends::forget();
    }
    if RELATIONS.get().is_some_and(|known| all || known.has(relation)) {
        RELATIONS.set(None);
    }
}

fn register() {
    REGISTERED.with(|r| {
        r.get_or_init(|| {
            // SAFETY: registers a callback of this library for the life of the process.
            unsafe { pg_sys::CacheRegisterRelcacheCallback(Some(on_invalidation), pg_sys::Datum::from(0)) };
        });
    });
}

/// Whether nobody is changing the table of events, nor has changed it in a transaction that is seen and still has to
/// send its invalidations. Keeps the table as it is until the transaction ends.
pub(crate) fn is_settled(relations: &Relations) -> bool {
    let lock = pg_sys::RowExclusiveLock as pg_sys::LOCKMODE;
    // SAFETY: within a transaction, which releases the lock.
    unsafe { pg_sys::ConditionalLockRelationOid(relations.events, lock) }
}

/// Changes whenever our tables may have changed. Needs a transaction that has processed pending invalidations.
pub(crate) fn generation() -> u64 {
    GENERATION.get()
}

/// The worker has loaded its backends from the extension with this table of events.
pub(crate) fn note_served(events: Option<pg_sys::Oid>) {
    SERVED.set(events);
}

/// Whether the extension is still the one from which the worker has loaded its backends. It may have been dropped and
/// created again since: then nothing in its tables is of the loaded backends. A statement that has waited for a lock
/// may find the new tables, so what was written has to be asked for afterwards. Needs a transaction.
pub(crate) fn is_served() -> bool {
    let served = SERVED.get();
    served.is_some() && relations().map(|relations| relations.events) == served
}

/// Raises an ERROR unless [`is_served`]: called when something of the loaded backends was written.
pub(crate) fn expect_served() {
    if !is_served() {
        let code = PgSqlErrorCode::ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE;
        raise(ErrorReport::new(code, "the extension was created again", ""));
    }
}

/// Our relations, or `None` if the extension is not installed. Raises an ERROR with an explanation if it is installed
/// but an object that everybody needs is missing. Needs a transaction.
pub(crate) fn relations() -> Option<Relations> {
    if let Some(known) = RELATIONS.get() {
        return Some(known);
    }
    let found = look_up()?;
    for (table, name) in [(found.events, c"events"), (found.backends, c"backends")] {
        if table == pg_sys::InvalidOid {
            missing::table(name);
        }
    }
    if found.sequence == pg_sys::InvalidOid {
        missing::sequence();
    }
    expect_shape("events", found.events);
    if found.scheduled != pg_sys::InvalidOid {
        expect_shape("scheduled_events", found.scheduled);
    }
    if found.is_whole() {
        RELATIONS.set(Some(found));
    }
    Some(found)
}

/// Looks up the relations; `None`: the extension is not installed. From now on their changes are noticed.
fn look_up() -> Option<Relations> {
    register();
    // SAFETY: catalog look-ups by constant names within a transaction.
    let found = unsafe {
        let schema = pg_sys::get_namespace_oid(c"outbox".as_ptr(), true);
        let oid = |name: &CStr| match schema {
            pg_sys::InvalidOid => pg_sys::InvalidOid,
            schema => pg_sys::get_relname_relid(name.as_ptr(), schema),
        };
        let (events, scheduled) = (oid(c"events"), oid(c"scheduled_events"));
        let [seq, xid, event_id, branch] = [attribute::SEQ, attribute::XID, attribute::EVENT_ID, attribute::BRANCH];
        Relations {
            events,
            events_seq_key: index_on(events, &[seq], false),
            events_xid_key: index_on(events, &[xid, seq], false),
            events_id_key: index_on(events, &[event_id, branch], true),
            scheduled_id_key: index_on(scheduled, &[event_id, branch], true),
            sequence: oid(c"events_seq_seq"),
            scheduled,
            backends: oid(c"backends"),
            backends_news: oid(c"backends_number_seq"),
            backend_passwords: oid(c"backend_passwords"),
            publisher_limits: oid(c"publisher_limits"),
            routes: oid(c"routes"),
            triggers: TRIGGERS.map(|name| function(schema, name)),
            settings_tables: [
                c"backends",
                c"backend_passwords",
                c"take_overs",
                c"restores",
                c"copied_backends",
                c"publisher_limits",
                c"routes",
            ]
            .map(oid),
            tables: TABLES.map(oid),
        }
    };
    let mut watched = WATCHED.get();
    let now = found.tables.iter().chain([&found.sequence, &found.backends_news]);
    for (known, relation) in watched.iter_mut().zip(now).filter(|(_, r)| **r != pg_sys::InvalidOid) {
        *known = *relation;
    }
    WATCHED.set(watched);
    // The extension itself is only looked up if something is missing.
    (found.is_whole() || is_installed()).then_some(found)
}

/// Whether the extension is installed in this database, even if some of its objects are missing.
pub(crate) fn is_installed() -> bool {
    // SAFETY: a catalog look-up within a transaction.
    unsafe { pg_sys::get_extension_oid(c"outbox_relay".as_ptr(), true) != pg_sys::InvalidOid }
}

/// Whether a relation has this name in schema outbox. Reads only caches.
///
/// # Safety
/// Within a transaction, in a frame that holds nothing.
pub(crate) unsafe fn has_our_name(relation: pg_sys::Oid, name: &CStr) -> bool {
    // SAFETY: the caller's promise.
    unsafe { named(name) == Some(relation) }
}

/// The relation of this name in schema outbox. Reads only caches.
///
/// # Safety
/// Within a transaction, in a frame that holds nothing.
pub(crate) unsafe fn named(name: &CStr) -> Option<pg_sys::Oid> {
    let is_there = |oid: &pg_sys::Oid| *oid != pg_sys::InvalidOid;
    // SAFETY: the caller's promise.
    unsafe {
        let schema = Some(unguarded::get_namespace_oid(c"outbox".as_ptr(), true)).filter(is_there)?;
        Some(unguarded::get_relname_relid(name.as_ptr(), schema)).filter(is_there)
    }
}

/// A valid B-tree index that begins with these columns in this order. `is_unique`: it is unique on exactly these
/// columns. It is looked up in the catalog without a lock on the table.
///
/// # Safety
/// Within a transaction.
unsafe fn index_on(table: pg_sys::Oid, columns: &[usize], is_unique: bool) -> pg_sys::Oid {
    if table == pg_sys::InvalidOid {
        return pg_sys::InvalidOid;
    }
    let lock = pg_sys::AccessShareLock as pg_sys::LOCKMODE;
    let mut index = pg_sys::InvalidOid;
    // SAFETY: a scan of a catalog; the values are of its columns' types, and live as long as the tuple.
    unsafe {
        let catalog = pg_sys::table_open(pg_sys::IndexRelationId, lock);
        let mut key: pg_sys::ScanKeyData = std::mem::zeroed();
        pg_sys::ScanKeyInit(
            &mut key,
            pg_sys::Anum_pg_index_indrelid as i16,
            pg_sys::BTEqualStrategyNumber as u16,
            pg_sys::Oid::from(pg_sys::F_OIDEQ),
            pg_sys::Datum::from(table),
        );
        let by_table = pg_sys::Oid::from(pg_sys::IndexIndrelidIndexId);
        let scan = pg_sys::systable_beginscan(catalog, by_table, true, std::ptr::null_mut(), 1, &mut key);
        loop {
            let tuple = pg_sys::systable_getnext(scan);
            if tuple.is_null() {
                break;
            }
            let row = Row::of(tuple, (*catalog).rd_att);
            if let Some(oid) = usable_index(&row, columns, is_unique) {
                index = oid;
                break;
            }
        }
        pg_sys::systable_endscan(scan);
        pg_sys::table_close(catalog, lock);
    }
    index
}

/// The index of a row of pg_index, if it is a usable B-tree over these columns in ascending order.
fn usable_index(row: &Row, columns: &[usize], is_unique: bool) -> Option<pg_sys::Oid> {
    let says = |column: u32| row.get(column as usize).is_some_and(|d| d.value() as u8 != 0);
    let has = |column: u32| row.get(column as usize).is_some();
    let count = row.get(pg_sys::Anum_pg_index_indnkeyatts as usize);
    let count = count.map_or(0, |d| d.value() as i16 as usize);
    let is_usable = says(pg_sys::Anum_pg_index_indisvalid)
        && says(pg_sys::Anum_pg_index_indisready)
        && says(pg_sys::Anum_pg_index_indislive)
        && !has(pg_sys::Anum_pg_index_indexprs)
        && !has(pg_sys::Anum_pg_index_indpred);
    let is_key = match is_unique {
        true => {
            let is_unique = says(pg_sys::Anum_pg_index_indisunique) && says(pg_sys::Anum_pg_index_indimmediate);
            is_unique && count == columns.len()
        }
        false => count >= columns.len(),
    };
    if !is_usable || !is_key {
        return None;
    }
    let oid = row.get(pg_sys::Anum_pg_index_indexrelid as usize)?;
    let indexed = row.get(pg_sys::Anum_pg_index_indkey as usize)?;
    let options = row.get(pg_sys::Anum_pg_index_indoption as usize)?;
    // SAFETY: both are vectors with an element for each column of the index, and there are enough; they are stored
    // uncompressed.
    let (indexed, options) = unsafe {
        let indexed = (*indexed.cast_mut_ptr::<pg_sys::int2vector>())
            .values
            .as_slice(columns.len());
        let options = (*options.cast_mut_ptr::<pg_sys::int2vector>())
            .values
            .as_slice(columns.len());
        (indexed, options)
    };
    let begins = indexed.iter().zip(columns).all(|(is, must)| *is as usize == *must);
    // A descending index, or one with nulls first, has another order.
    let ascends = options.iter().all(|o| *o == 0);
    let oid = pg_sys::Oid::from(oid.value() as u32);
    (begins && ascends && class_of(oid).method == BTREE).then_some(oid)
}

/// The access method of B-tree indexes (pg_am.dat).
const BTREE: pg_sys::Oid = pg_sys::BTREE_AM_OID;

/// Whether the table of cursors can be written to now, without waiting for a lock. Needs a transaction.
pub(crate) fn can_save() -> bool {
    let lock = pg_sys::RowExclusiveLock as pg_sys::LOCKMODE;
    let cursors = TABLES.iter().position(|table| *table == c"cursors");
    let table = relations().zip(cursors).map(|(known, index)| known.tables[index]);
    let table = table.filter(|table| *table != pg_sys::InvalidOid);
    // SAFETY: tries to take a lock within a transaction.
    table.is_some_and(|table| unsafe { pg_sys::ConditionalLockRelationOid(table, lock) })
}

/// One of our functions without arguments; `InvalidOid` if it does not exist.
///
/// # Safety
/// Within a transaction.
unsafe fn function(schema: pg_sys::Oid, name: &CStr) -> pg_sys::Oid {
    // SAFETY: the caller's promise; the keys have the types of the cache.
    unsafe {
        pg_sys::GetSysCacheOid(
            pg_sys::SysCacheIdentifier::PROCNAMEARGSNSP as i32,
            pg_sys::Anum_pg_proc_oid as pg_sys::AttrNumber,
            pg_sys::Datum::from(name.as_ptr()),
            pg_sys::Datum::from(pg_sys::buildoidvector(std::ptr::null(), 0)),
            pg_sys::Datum::from(schema),
            pg_sys::Datum::from(0),
        )
    }
}

/// Raises an ERROR if somebody has changed the type of a column that we read.
fn expect_shape(name: &str, table: pg_sys::Oid) {
    for (index, expected) in EVENT_COLUMNS[..attribute::COUNT].iter().enumerate() {
        // SAFETY: a catalog look-up within a transaction.
        if unsafe { pg_sys::get_atttype(table, index as i16 + 1) } != expected.kind {
            internal(format!("column {} of outbox.{name} has an unexpected type", index + 1));
        }
    }
}

/// Our relations, or an ERROR.
pub(crate) fn expect_relations() -> Relations {
    relations().unwrap_or_else(|| missing::extension())
}

/// Opens one of our tables, and looks up the relations after that: until the table is locked, its indexes can be
/// replaced by others.
pub(crate) fn open_table(table: pg_sys::Oid, lock: pg_sys::LOCKMODE) -> (pg_sys::Relation, Relations) {
    // SAFETY: opens a relation by OID within a transaction; raises an ERROR if it no longer exists.
    let opened = unsafe { pg_sys::table_open(table, lock) };
    (opened, expect_relations())
}

/// A backend by name. This costs only a look-up, unless backends have changed.
pub(crate) fn backend(name: &str) -> Option<Rc<KnownBackend>> {
    // A long transaction that opens no new table would not process invalidations otherwise.
    // SAFETY: within a transaction. Taking any lock does the same.
    unsafe { pg_sys::AcceptInvalidationMessages() };
    known_backends::find(expect_relations().backends, name)
}
