//! Limits of publishers (`outbox.publisher_limits`): which backends and streams a role may publish to.
//!
//! Rights add up, as elsewhere in Postgres. A user who has the right to publish through a role without a limit has no
//! limit. A user who has it only through limited roles may do what any of them may. So membership in a limited role
//! takes nothing away.
//!
//! Most databases have no limits: then a publisher only compares two numbers. Otherwise each session caches the limits
//! of its users until our tables, roles, memberships or functions change.

use crate::tables::catalog::{self, Relations};
use crate::tables::missing;
use crate::tables::row::{attribute, texts_of_array};
use crate::tables::whole_table::each_row;
use once_cell::unsync::OnceCell;
use pgrx::{pg_guard, pg_sys};
use std::cell::{Cell, RefCell};
use std::ffi::CStr;
use std::fmt;
use std::rc::Rc;
use wildmatch::WildMatch;

/// How many users a session remembers.
const MOST_USERS: usize = 64;
/// Functions that publish.
const FUNCTIONS: [&CStr; 2] = [c"publish_event", c"publish_events"];

thread_local! {
    static REGISTERED: OnceCell<()> = const { OnceCell::new() };
    /// [`catalog::generation`] when the table was last read and was empty.
    static NONE_AT: Cell<Option<u64>> = const { Cell::new(None) };
    /// Counts changes of roles, memberships, functions and databases.
    static ROLES: Cell<u64> = const { Cell::new(0) };
    static KNOWN: RefCell<Known> = const { RefCell::new(Known::nothing()) };
    /// The limits of the last limited user that began an INSERT, and the start of its transaction.
    static BEGUN_BY: RefCell<Option<(pg_sys::TimestampTz, Limits)>> = const { RefCell::new(None) };
}

/// What a session has cached.
struct Known {
    /// [`catalog::generation`] when the table was read. `None`: it was not read.
    read_at: Option<u64>,
    limits: Vec<Rc<Limit>>,
    /// [`ROLES`] when the first of `users` was looked up.
    roles: u64,
    users: Vec<(pg_sys::Oid, Standing)>,
}

/// What a user may publish.
#[derive(Clone)]
enum Standing {
    Free,
    Limited(Limits),
    /// Nothing. A view, a rule or a bridge lends it a right, or the role was changed while the statement ran.
    Rightless,
}

impl Known {
    const fn nothing() -> Self {
        Self {
            read_at: None,
            limits: Vec::new(),
            roles: 0,
            users: Vec::new(),
        }
    }
}

/// A row of `outbox.publisher_limits`. `None` allows any.
struct Limit {
    role: pg_sys::Oid,
    backends: Option<Patterns>,
    streams: Option<Patterns>,
}

struct Patterns(Vec<WildMatch>);

impl Patterns {
    fn matches(&self, name: &str) -> bool {
        self.0.iter().any(|pattern| pattern.matches(name))
    }
}

impl fmt::Display for Patterns {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.0.is_empty() {
            return f.write_str("none");
        }
        for (index, pattern) in self.0.iter().enumerate() {
            write!(f, "{}{pattern}", if index > 0 { ", " } else { "" })?;
        }
        Ok(())
    }
}

/// The limits of a user: an event is allowed if one of these rows allows it.
#[derive(Clone)]
pub(crate) struct Limits(Rc<[Rc<Limit>]>);

/// Which limit an event exceeds, with the patterns that are allowed.
pub(crate) enum Beyond {
    Backend(String),
    Stream(String),
}

impl Limits {
    /// Whether an event may go to this stream of this backend.
    pub(crate) fn check(&self, backend: &str, stream: &str) -> Result<(), Beyond> {
        let allows = |patterns: &Option<Patterns>, name| patterns.as_ref().is_none_or(|p| p.matches(name));
        let of_backend: Vec<&Limit> = self
            .0
            .iter()
            .map(Rc::as_ref)
            .filter(|l| allows(&l.backends, backend))
            .collect();
        let all = |patterns: Vec<&Patterns>| patterns.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ");
        if of_backend.is_empty() {
            return Err(Beyond::Backend(all(self
                .0
                .iter()
                .filter_map(|l| l.backends.as_ref())
                .collect())));
        }
        match of_backend.iter().any(|limit| allows(&limit.streams, stream)) {
            true => Ok(()),
            false => Err(Beyond::Stream(all(of_backend
                .iter()
                .filter_map(|l| l.streams.as_ref())
                .collect()))),
        }
    }
}

/// The limits of the current user; `None`: there are none. Needs a transaction that has processed pending
/// invalidations.
pub(crate) fn of_user() -> Option<Limits> {
    match standing(current_user()) {
        Standing::Free => None,
        Standing::Limited(limits) => Some(limits),
        Standing::Rightless => BEGUN_BY.with_borrow(|begun| {
            let begun = begun.as_ref().filter(|(at, _)| *at == transaction());
            begun.map(|(_, limits)| limits.clone())
        }),
    }
}

/// Whether this user has only the right to publish within limits.
pub(crate) fn is_limited(user: pg_sys::Oid) -> bool {
    matches!(standing(user), Standing::Limited(_))
}

/// Whether the current user has no right to publish. False if there are no limits at all.
pub(crate) fn is_rightless() -> bool {
    matches!(standing(current_user()), Standing::Rightless)
}

/// Notes that the current user begins an INSERT. If its limits are to be seen by the trigger, the role may be another
/// one by then: an expression of the statement may change it.
pub(crate) fn note_insert() {
    if let Standing::Limited(limits) = standing(current_user()) {
        BEGUN_BY.set(Some((transaction(), limits)));
    }
}

fn current_user() -> pg_sys::Oid {
    // SAFETY: a plain read.
    unsafe { pg_sys::GetUserId() }
}

/// When the current transaction began.
fn transaction() -> pg_sys::TimestampTz {
    // SAFETY: a plain read.
    unsafe { pg_sys::GetCurrentTransactionStartTimestamp() }
}

fn standing(user: pg_sys::Oid) -> Standing {
    match NONE_AT.get() == Some(catalog::generation()) {
        true => Standing::Free,
        false => looked_up(user),
    }
}

#[cold]
fn looked_up(user: pg_sys::Oid) -> Standing {
    // SAFETY: a look-up within a transaction.
    let is_superuser = unsafe { pg_sys::superuser_arg(user) };
    let relations = catalog::expect_relations();
    if relations.publisher_limits == pg_sys::InvalidOid {
        // The cache may still hold an earlier result for this user.
        return match is_superuser {
            true => Standing::Free,
            false => missing::table(c"publisher_limits"),
        };
    }
    expect_read(relations.publisher_limits);
    if is_superuser || KNOWN.with_borrow(|known| known.limits.is_empty()) {
        return Standing::Free;
    }
    let roles = ROLES.get();
    let found = KNOWN.with_borrow(|known| {
        let mut users = known.users.iter().filter(|_| known.roles == roles);
        users.find(|(of, _)| *of == user).map(|(_, standing)| standing.clone())
    });
    found.unwrap_or_else(|| {
        let all = KNOWN.with_borrow(|known| known.limits.clone());
        let standing = standing_among(user, &all, &relations);
        KNOWN.with_borrow_mut(|known| {
            if known.roles != roles || known.users.len() >= MOST_USERS {
                known.users.clear();
            }
            known.roles = roles;
            known.users.push((user, standing.clone()));
        });
        standing
    })
}

/// Reads the table, unless it has not changed since the last time.
fn expect_read(table: pg_sys::Oid) {
    // Opening the table processes invalidations, which may change this: then the next use reads the table once more.
    let generation = catalog::generation();
    if KNOWN.with_borrow(|known| known.read_at == Some(generation)) {
        return;
    }
    let limits = read(table);
    if !limits.is_empty() {
        hear_of_roles();
    }
    NONE_AT.set(limits.is_empty().then_some(generation));
    KNOWN.with_borrow_mut(|known| {
        *known = Known {
            read_at: Some(generation),
            limits,
            ..Known::nothing()
        }
    });
}

fn read(table: pg_sys::Oid) -> Vec<Rc<Limit>> {
    let mut found = Vec::new();
    each_row(table, &["role", "backends", "streams"], |row| {
        let patterns = |column| {
            // SAFETY: the column is a text[].
            let texts = row.datum(column).map(|array| unsafe { texts_of_array(array) });
            texts.map(|texts| Patterns(texts.iter().map(|text| WildMatch::new(text)).collect()))
        };
        let role = row.datum("role").map_or(0, |role| role.value() as u32);
        found.push(Rc::new(Limit {
            role: pg_sys::Oid::from(role),
            backends: patterns("backends"),
            streams: patterns("streams"),
        }));
    });
    found
}

/// What a user may publish, through all roles through which it has the right.
fn standing_among(user: pg_sys::Oid, all: &[Rc<Limit>], relations: &Relations) -> Standing {
    // SAFETY: look-ups within a transaction.
    let is_in = |role| unsafe { pg_sys::has_privs_of_role(user, role) };
    if is_in(pg_sys::Oid::from(pg_sys::ROLE_PG_WRITE_ALL_DATA)) {
        return Standing::Free;
    }
    let mine: Rc<[Rc<Limit>]> = all.iter().filter(|limit| is_in(limit.role)).cloned().collect();
    let is_public = |grantee: &pg_sys::Oid| *grantee == pg_sys::Oid::from(pg_sys::ACL_ID_PUBLIC);
    let grantees = publishers(relations);
    let mut own = grantees
        .iter()
        .filter(|grantee| is_public(grantee) || is_in(**grantee))
        .peekable();
    let has_right = own.peek().is_some();
    // One of these roles has no limit.
    let is_free = own.any(|grantee| is_public(grantee) || !all.iter().any(|limit| limit.role == *grantee));
    match (is_free, mine.is_empty()) {
        (true, _) => Standing::Free,
        (false, false) => Standing::Limited(Limits(mine)),
        (false, true) if has_right => Standing::Free,
        (false, true) => Standing::Rightless,
    }
}

/// The roles to which the right to publish was granted, in any way.
fn publishers(relations: &Relations) -> Vec<pg_sys::Oid> {
    use pg_sys::SysCacheIdentifier::{ATTNUM, PROCNAMEARGSNSP, RELOID};
    const INSERT: pg_sys::AclMode = pg_sys::ACL_INSERT as pg_sys::AclMode;
    const EXECUTE: pg_sys::AclMode = pg_sys::ACL_EXECUTE as pg_sys::AclMode;
    let mut found = Vec::new();
    // SAFETY: look-ups within a transaction, with keys of the caches' types; each tuple is released after it is read.
    unsafe {
        let events = pg_sys::Datum::from(relations.events);
        let table = pg_sys::SearchSysCache1(RELOID as i32, events);
        if !table.is_null() {
            found.extend(grantees(RELOID as i32, table, pg_sys::Anum_pg_class_relacl, INSERT));
            pg_sys::ReleaseSysCache(table);
        }
        let column = pg_sys::SearchSysCache2(ATTNUM as i32, events, pg_sys::Datum::from(attribute::EVENT_TYPE));
        if !column.is_null() {
            found.extend(grantees(
                ATTNUM as i32,
                column,
                pg_sys::Anum_pg_attribute_attacl,
                INSERT,
            ));
            pg_sys::ReleaseSysCache(column);
        }
        let schema = pg_sys::get_namespace_oid(c"outbox".as_ptr(), true);
        for name in FUNCTIONS {
            let none = pg_sys::Datum::from(0);
            let name = pg_sys::Datum::from(name.as_ptr());
            let list = pg_sys::SearchSysCacheList(PROCNAMEARGSNSP as i32, 1, name, none, none);
            for member in (*list).members.as_slice((*list).n_members as usize) {
                let function = &raw mut (**member).tuple;
                let mut is_null = false;
                let column = pg_sys::Anum_pg_proc_pronamespace as i16;
                let of = pg_sys::SysCacheGetAttr(PROCNAMEARGSNSP as i32, function, column, &mut is_null);
                if of.value() as u32 == schema.to_u32() {
                    found.extend(grantees(
                        PROCNAMEARGSNSP as i32,
                        function,
                        pg_sys::Anum_pg_proc_proacl,
                        EXECUTE,
                    ));
                }
            }
            pg_sys::ReleaseCatCacheList(list);
        }
    }
    found
}

/// The roles to which the access control list of a catalog's row grants this right.
///
/// # Safety
/// A tuple of this cache, whose attribute is of type aclitem[].
unsafe fn grantees(cache: i32, tuple: pg_sys::HeapTuple, list: u32, right: pg_sys::AclMode) -> Vec<pg_sys::Oid> {
    let (mut is_null, mut size, mut is_by_value, mut align) = (false, 0, false, 0);
    let (mut items, mut nulls, mut count) = (std::ptr::null_mut(), std::ptr::null_mut(), 0);
    // SAFETY: the caller's promise; items are passed by reference, and their array has no nulls.
    unsafe {
        let rights = pg_sys::SysCacheGetAttr(cache, tuple, list as i16, &mut is_null);
        if is_null {
            return Vec::new();
        }
        let array = pg_sys::pg_detoast_datum(rights.cast_mut_ptr()).cast();
        pg_sys::get_typlenbyvalalign(pg_sys::ACLITEMOID, &mut size, &mut is_by_value, &mut align);
        let kind = pg_sys::ACLITEMOID;
        let size = i32::from(size);
        pg_sys::deconstruct_array(
            array,
            kind,
            size,
            is_by_value,
            align,
            &mut items,
            &mut nulls,
            &mut count,
        );
        (0..count as usize)
            .map(|index| &*(*items.add(index)).cast_mut_ptr::<pg_sys::AclItem>())
            .filter(|item| item.ai_privs & right != 0)
            .map(|item| item.ai_grantee)
            .collect()
    }
}

#[pg_guard]
// SAFETY: only Postgres calls this, in this process; it touches only variables of this thread.
unsafe extern "C-unwind" fn on_change(_arg: pg_sys::Datum, _cache: std::ffi::c_int, _hash: pg_sys::uint32) {
    ROLES.set(ROLES.get() + 1);
}

/// From now on counts changes of roles, memberships and functions, and of databases, whose owners are members of
/// pg_database_owner. Only a session that has seen a limit needs this.
fn hear_of_roles() {
    use pg_sys::SysCacheIdentifier::{AUTHMEMROLEMEM, AUTHOID, DATABASEOID, PROCOID};
    REGISTERED.with(|registered| {
        registered.get_or_init(|| {
            for cache in [AUTHMEMROLEMEM, AUTHOID, DATABASEOID, PROCOID] {
                // SAFETY: registers a callback of this library for the life of the process.
                unsafe { pg_sys::CacheRegisterSyscacheCallback(cache as i32, Some(on_change), pg_sys::Datum::from(0)) };
            }
        });
    });
}
