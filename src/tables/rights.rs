//! The rights that our SQL runs with.
//!
//! The worker is a superuser. A function that reads our tables for a caller without the right to read them has more
//! rights than the caller, too. What others have put on these tables (triggers, policies, rules, expressions) must not
//! run with such rights. So each statement is executed as the tables' owner, in a security context in which that
//! owner's code cannot gain further rights and finds operators and functions only in pg_catalog. Triggers of roles that
//! were granted TRIGGER do not run at all: `session_replication_role` is `replica` wherever we write, and only an owner
//! can make a trigger fire under it.

use crate::server::encoding::{has_utf8_form, utf8};
use crate::server::error::{internal, raise, strict_arguments};
use crate::server::process::set_for_now;
use crate::server::report;
use crate::server::scoped;
use crate::server::silence;
use crate::tables::catalog;
use pgrx::pg_sys::panic::ErrorReport;
use pgrx::{PgSqlErrorCode, pg_extern, pg_sys};
use std::cell::Cell;
use std::ffi::CStr;

#[derive(Clone, Copy, PartialEq, Eq)]
enum RunAs {
    /// With the caller's rights.
    Caller,
    /// With the rights of the tables' owner, for a caller who has not all of them.
    Owner,
    /// With the rights of the tables' owner, always. The settings are pinned already.
    Worker,
}

thread_local! {
    static RUN_AS: Cell<RunAs> = const { Cell::new(RunAs::Caller) };
}

/// Notes that this process is a worker.
pub(crate) fn run_as_worker() {
    RUN_AS.set(RunAs::Worker);
}

/// Runs `f`, whose statements may do more than the caller may. EXECUTE decides who may call the SQL function.
pub(crate) fn of_owner<R>(f: impl FnOnce() -> R) -> R {
    if RUN_AS.get() != RunAs::Caller {
        return f();
    }
    // For what needs rights outside of statements. Each statement looks up the owner again when its tables are locked.
    scoped::with(&RUN_AS, RunAs::Owner, || as_user(catalog::owner(), f))
}

const SEARCH_PATH: (&CStr, &CStr) = (c"search_path", c"pg_catalog, pg_temp");

/// Runs `f`, which makes and executes a statement that writes, without the session's settings in effect.
pub(crate) fn writing<R>(f: impl FnOnce() -> R) -> R {
    match RUN_AS.get() {
        RunAs::Worker => f(),
        RunAs::Owner => with_settings(&[SEARCH_PATH], || {
            silence::begin();
            f()
        }),
        RunAs::Caller => with_settings(&[SEARCH_PATH], f),
    }
}

/// The same of a statement that reads only: it fires no triggers.
pub(crate) fn reading<R>(f: impl FnOnce() -> R) -> R {
    match RUN_AS.get() {
        RunAs::Worker => f(),
        RunAs::Owner | RunAs::Caller => with_settings(&[SEARCH_PATH], f),
    }
}

/// `outbox.silence_triggers()`, called first by each function that writes with its owner's rights. (If the function had
/// this as a SET clause, Postgres's error would not say what to do.)
#[pg_extern(sql = false)]
fn silence_triggers() {
    let silence = || {
        let (owner, user) = (catalog::owner(), current_user());
        // The owner's own triggers do fire. They must not run with a superuser's rights.
        if owner != user && !is_superuser(owner) {
            refuse_owner(owner);
        }
        if !silence::is_silent() && !is_superuser(user) {
            refuse_owner(user);
        }
        silence::begin();
    };
    // SAFETY: this frame has nothing to be dropped, nor has pgrx's, which calls it.
    unsafe { report::guard(silence) };
}

fn current_user() -> pg_sys::Oid {
    // SAFETY: a plain read.
    unsafe { pg_sys::GetUserId() }
}

fn is_superuser(role: pg_sys::Oid) -> bool {
    // SAFETY: a look-up within a transaction.
    unsafe { pg_sys::superuser_arg(role) }
}

fn refuse_owner(role: pg_sys::Oid) -> ! {
    // SAFETY: a look-up within a transaction; the texts are in the transaction's memory.
    let [name, quoted] = unsafe {
        let name = pg_sys::GetUserNameFromId(role, false);
        [name.cast_const(), pg_sys::quote_identifier(name)].map(|text| CStr::from_ptr(text).to_bytes())
    };
    // Roles belong to the whole server: the name may have been given in a database with another encoding.
    let words = |text| match has_utf8_form(text) {
        // SAFETY: the line above has checked that the text can be converted.
        Ok(()) => unsafe { utf8(text) },
        Err(_) => String::from_utf8_lossy(text),
    };
    let (name, quoted) = (words(name), words(quoted));
    raise(
        ErrorReport::new(
            PgSqlErrorCode::ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE,
            "the owner of the tables and functions in schema outbox is not a superuser",
            "",
        )
        .set_detail(format!(
            "It is \"{name}\", whose rights do not suffice to keep the triggers of others from running."
        ))
        .set_hint(format!(
            "Run ALTER ROLE {quoted} SUPERUSER, or REASSIGN OWNED BY {quoted} to a superuser."
        )),
    )
}

/// Runs `f` with these settings.
pub(crate) fn with_settings<R>(settings: &[(&CStr, &CStr)], f: impl FnOnce() -> R) -> R {
    // SAFETY: within a transaction. An ERROR in between restores the settings when it aborts.
    unsafe {
        let level = pg_sys::NewGUCNestLevel();
        for (name, value) in settings {
            set_for_now(
                name,
                value,
                pg_sys::GucContext::PGC_SUSET,
                pg_sys::GucAction::GUC_ACTION_SAVE,
            );
        }
        let result = f();
        pg_sys::AtEOXact_GUC(true, level);
        result
    }
}

/// Runs `f`, which executes a statement that is already parsed: its tables are locked, so their owner cannot change.
pub(crate) fn execution<R>(f: impl FnOnce() -> R) -> R {
    match RUN_AS.get() {
        RunAs::Caller => f(),
        RunAs::Owner | RunAs::Worker => as_user(catalog::owner(), f),
    }
}

/// Runs `f` with the rights of the owner of `relation`, which is locked.
pub(crate) fn as_owner_of<R>(relation: pg_sys::Oid, f: impl FnOnce() -> R) -> R {
    as_user(catalog::owner_of(relation), f)
}

crate::sql_function!(analyse_as, pg_finfo_analyse_as);

/// `outbox.analyse_as(role, query)`: parses a query, whose types may run code of that role, with the role's rights.
/// Settings that such code changes are restored.
fn analyse_as(fcinfo: pg_sys::FunctionCallInfo) -> pg_sys::Datum {
    if let Some([role, query]) = strict_arguments(fcinfo) {
        let role = pg_sys::Oid::from(role.value() as u32);
        expect_may_become(role);
        // SAFETY: within a transaction, with a text by the SQL declaration. An ERROR in between restores the
        // settings when it aborts.
        unsafe {
            let query = CStr::from_ptr(pg_sys::text_to_cstring(query.cast_mut_ptr()));
            let level = pg_sys::NewGUCNestLevel();
            as_user(role, || analyse(query));
            pg_sys::AtEOXact_GUC(false, level);
        }
    }
    pg_sys::Datum::from(0)
}

fn analyse(query: &CStr) {
    // SAFETY: within a transaction; what is prepared goes with the connection.
    unsafe {
        pg_sys::SPI_connect();
        if pg_sys::SPI_prepare(query.as_ptr(), 0, std::ptr::null_mut()).is_null() {
            internal("a query cannot be analysed");
        }
        pg_sys::SPI_finish();
    }
}

/// Raises an ERROR unless the caller may SET ROLE to this role.
fn expect_may_become(role: pg_sys::Oid) {
    // SAFETY: look-ups within a transaction.
    unsafe {
        #[cfg(feature = "pg15")]
        pg_sys::check_is_member_of_role(current_user(), role);
        #[cfg(not(feature = "pg15"))]
        pg_sys::check_can_set_role(current_user(), role);
    }
}

fn as_user<R>(other: pg_sys::Oid, f: impl FnOnce() -> R) -> R {
    let (mut user, mut context) = (pg_sys::InvalidOid, 0);
    // SAFETY: saved here and restored below, or by the abort after an ERROR.
    unsafe {
        pg_sys::GetUserIdAndSecContext(&mut user, &mut context);
        let restricted =
            context | pg_sys::SECURITY_LOCAL_USERID_CHANGE as i32 | pg_sys::SECURITY_RESTRICTED_OPERATION as i32;
        pg_sys::SetUserIdAndSecContext(other, restricted);
    }
    let result = f();
    // SAFETY: as above.
    unsafe { pg_sys::SetUserIdAndSecContext(user, context) };
    result
}
