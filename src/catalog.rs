//! What a session knows of our tables and backends without asking each time: the relations' OIDs and the backends by name.
//!
//! Filled with the *latest* snapshot, not the transaction's (a backend made since is known), marked valid before it is read (a change
//! in between marks it invalid again), and it sees a backend made by its own transaction.

use crate::error::{internal, raise};
use crate::rows::{Columns, attribute, texts_of_array};
use once_cell::unsync::OnceCell;
use pgrx::pg_sys::panic::ErrorReport;
use pgrx::{PgSqlErrorCode, pg_guard, pg_sys};
use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::ffi::CStr;
use std::rc::Rc;
use wildmatch::WildMatch;

/// OIDs of what we read and write without SQL.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Relations {
    pub events: pg_sys::Oid,
    pub events_seq_key: pg_sys::Oid,
    pub events_xid_key: pg_sys::Oid,
    pub sequence: pg_sys::Oid,
    pub scheduled: pg_sys::Oid,
    pub backends: pg_sys::Oid,
    pub backend_passwords: pg_sys::Oid,
    /// The functions of our own triggers on `events`.
    pub triggers: [pg_sys::Oid; 4],
    settings_tables: [pg_sys::Oid; 4],
    /// All tables that the worker writes.
    tables: [pg_sys::Oid; TABLES.len()],
}

const TABLES: [&CStr; 18] = [
    c"events",
    c"backends",
    c"backend_passwords",
    c"scheduled_events",
    c"refused_events",
    c"failed_events",
    c"cursors",
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
];

impl Relations {
    /// All tables that the worker writes.
    pub fn tables(&self) -> &[pg_sys::Oid] {
        &self.tables
    }

    /// Tables whose changes the worker must hear of.
    pub fn settings_tables(&self) -> &[pg_sys::Oid] {
        &self.settings_tables
    }

    /// Who owns our tables, now: what is on a table runs with its owner's rights. An ERROR if they are not all of one owner.
    pub fn owner(&self) -> pg_sys::Oid {
        let owner = owner_of(self.events);
        for (table, name) in self.tables.iter().zip(TABLES) {
            if owner_of(*table) != owner {
                raise(
                    ErrorReport::new(
                        PgSqlErrorCode::ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE,
                        format!(
                            "table outbox.{} has another owner than outbox.events",
                            name.to_string_lossy()
                        ),
                        "",
                    )
                    .set_hint("Give all tables in schema outbox the same owner, a superuser."),
                );
            }
        }
        owner
    }
}

/// A relation's owner by the catalog as of now; nobody if it has gone.
pub fn owner_of(relation: pg_sys::Oid) -> pg_sys::Oid {
    // SAFETY: a look-up within a transaction; the tuple is released once it was read.
    unsafe {
        let cache = pg_sys::SysCacheIdentifier::RELOID as i32;
        let tuple = pg_sys::SearchSysCache1(cache, pg_sys::Datum::from(relation));
        if tuple.is_null() {
            return pg_sys::InvalidOid;
        }
        let data = (*tuple).t_data;
        let class = data
            .cast::<u8>()
            .add((*data).t_hoff as usize)
            .cast::<pg_sys::FormData_pg_class>();
        let owner = (*class).relowner;
        pg_sys::ReleaseSysCache(tuple);
        owner
    }
}

/// Guards live there: no stream has such a name.
pub const RESERVED: &str = "outbox_relay:";

/// A backend as a publisher needs it.
pub struct KnownBackend {
    pub number: i32,
    /// `None`: any stream.
    allowed_streams: Option<Vec<WildMatch>>,
}

impl KnownBackend {
    pub fn allows(&self, stream: &str) -> bool {
        if stream.starts_with(RESERVED) {
            return false;
        }
        self.allowed_streams
            .as_ref()
            .is_none_or(|patterns| patterns.iter().any(|p| p.matches(stream)))
    }
}

thread_local! {
    static REGISTERED: OnceCell<()> = const { OnceCell::new() };
    static RELATIONS: Cell<Option<Relations>> = const { Cell::new(None) };
    static BACKENDS_VALID: Cell<bool> = const { Cell::new(false) };
    static BACKENDS: RefCell<HashMap<String, Rc<KnownBackend>>> = RefCell::new(HashMap::new());
    /// Counts invalidations, for the worker.
    static GENERATION: Cell<u64> = const { Cell::new(0) };
}

#[pg_guard]
// SAFETY: called by Postgres alone, in this process; it touches only variables of this thread.
unsafe extern "C-unwind" fn on_invalidation(_arg: pg_sys::Datum, relation: pg_sys::Oid) {
    let Some(known) = RELATIONS.get() else {
        return;
    };
    let all = relation == pg_sys::InvalidOid;
    if all || relation == known.backends || relation == known.backend_passwords {
        BACKENDS_VALID.set(false);
        GENERATION.set(GENERATION.get() + 1);
    }
    let ours = [
        known.events,
        known.events_seq_key,
        known.events_xid_key,
        known.sequence,
        known.scheduled,
        known.backends,
        known.backend_passwords,
    ];
    if all || ours.contains(&relation) {
        RELATIONS.set(None);
        BACKENDS_VALID.set(false);
        GENERATION.set(GENERATION.get() + 1);
    } else if known.tables.contains(&relation) {
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

/// Changes whenever backends or our tables may have changed. Needs a transaction that has taken in invalidations.
pub fn generation() -> u64 {
    GENERATION.get()
}

/// Our relations, or `None` where the extension is not installed. Needs a transaction.
pub fn relations() -> Option<Relations> {
    if let Some(known) = RELATIONS.get() {
        return Some(known);
    }
    register();
    // SAFETY: catalog look-ups by constant names within a transaction.
    let found = unsafe {
        let schema = pg_sys::get_namespace_oid(c"outbox".as_ptr(), true);
        if schema == pg_sys::InvalidOid {
            return None;
        }
        let oid = |name: &CStr| pg_sys::get_relname_relid(name.as_ptr(), schema);
        Relations {
            events: oid(c"events"),
            events_seq_key: oid(c"events_pkey"),
            events_xid_key: oid(c"events_xid_idx"),
            sequence: oid(c"events_seq_seq"),
            scheduled: oid(c"scheduled_events"),
            backends: oid(c"backends"),
            backend_passwords: oid(c"backend_passwords"),
            triggers: [c"complete_event", c"confirm_event", c"hold_event", c"hold_scheduled"]
                .map(|name| function(schema, name)),
            settings_tables: [c"backends", c"backend_passwords", c"take_overs", c"restores"].map(oid),
            tables: TABLES.map(oid),
        }
    };
    let missing = [
        found.events,
        found.events_seq_key,
        found.events_xid_key,
        found.sequence,
        found.scheduled,
        found.backends,
        found.backend_passwords,
    ]
    .contains(&pg_sys::InvalidOid);
    if missing {
        return None;
    }
    expect_shape(c"events", found.events, &EVENT_TYPES);
    expect_shape(c"scheduled_events", found.scheduled, &EVENT_TYPES);
    RELATIONS.set(Some(found));
    Some(found)
}

/// A function of ours without arguments; nobody's number if there is none.
///
/// # Safety
/// Within a transaction.
unsafe fn function(schema: pg_sys::Oid, name: &CStr) -> pg_sys::Oid {
    // SAFETY: the caller's promise; keys of the types that the cache is by.
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

/// The types of the columns that events and scheduled events begin with: their values are taken apart, and put together, without asking.
pub const EVENT_TYPES: [pg_sys::Oid; attribute::COUNT] = [
    pg_sys::INT8OID,
    pg_sys::XID8OID,
    pg_sys::TIMESTAMPTZOID,
    pg_sys::UUIDOID,
    pg_sys::INT4OID,
    pg_sys::TEXTOID,
    pg_sys::TEXTOID,
    pg_sys::TEXTOID,
    pg_sys::JSONOID,
    pg_sys::TEXTOID,
    pg_sys::TEXTOID,
    pg_sys::TEXTOID,
    pg_sys::JSONOID,
    pg_sys::INT4OID,
];

/// An ERROR if somebody has changed the type of a column that we know.
fn expect_shape(name: &CStr, table: pg_sys::Oid, types: &[pg_sys::Oid]) {
    for (index, expected) in types.iter().enumerate() {
        // SAFETY: a catalog look-up within a transaction.
        if unsafe { pg_sys::get_atttype(table, index as i16 + 1) } != *expected {
            let name = name.to_string_lossy();
            internal(format!("column {} of outbox.{name} does not have its type", index + 1));
        }
    }
}

/// Our relations, or an ERROR.
pub fn expect_relations() -> Relations {
    relations().unwrap_or_else(|| internal("the tables of extension outbox_relay are missing"))
}

/// A backend by name. Costs nothing but a look-up unless backends have changed.
pub fn backend(name: &str) -> Option<Rc<KnownBackend>> {
    // A long transaction that opens no new table hears of no change by itself.
    // SAFETY: within a transaction; as taking any lock does.
    unsafe { pg_sys::AcceptInvalidationMessages() };
    let relations = expect_relations();
    if !BACKENDS_VALID.get() {
        BACKENDS_VALID.set(true);
        let _guard = InvalidOnError;
        let filled = read_backends(relations.backends);
        BACKENDS.with_borrow_mut(|known| *known = filled);
    }
    BACKENDS.with_borrow(|known| known.get(name).cloned())
}

/// If reading ends in an ERROR, what was there before must not count as valid.
struct InvalidOnError;

impl Drop for InvalidOnError {
    fn drop(&mut self) {
        if std::thread::panicking() {
            BACKENDS_VALID.set(false);
        }
    }
}

/// Reads `outbox.backends` as of now.
fn read_backends(relation: pg_sys::Oid) -> HashMap<String, Rc<KnownBackend>> {
    let mut found = HashMap::new();
    // SAFETY: a heap scan under a registered snapshot; the relation is locked by table_open. Opening it takes in
    // pending invalidations, which may mark the cache invalid again: then it is read once more at the next use.
    unsafe {
        let rel = pg_sys::table_open(relation, pg_sys::AccessShareLock as _);
        let columns = Columns::of(rel, &["name", "number", "allowed_streams"]);
        let snapshot = pg_sys::RegisterSnapshot(pg_sys::GetLatestSnapshot());
        let scan = pg_sys::systable_beginscan(rel, pg_sys::InvalidOid, false, snapshot, 0, std::ptr::null_mut());
        loop {
            let tuple = pg_sys::systable_getnext(scan);
            if tuple.is_null() {
                break;
            }
            let row = columns.take_apart(tuple);
            let (Some(name), Some(number), Some(streams)) = (row.text(0), row.i32(1), row.datum(2)) else {
                continue;
            };
            let patterns = texts_of_array(streams);
            let any = patterns.iter().any(|p| p == "*");
            let allowed_streams = (!any).then(|| patterns.iter().map(|p| WildMatch::new(p)).collect());
            found.insert(
                name,
                Rc::new(KnownBackend {
                    number,
                    allowed_streams,
                }),
            );
        }
        pg_sys::systable_endscan(scan);
        pg_sys::UnregisterSnapshot(snapshot);
        pg_sys::table_close(rel, pg_sys::AccessShareLock as _);
    }
    found
}
