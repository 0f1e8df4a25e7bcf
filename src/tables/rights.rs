//! With whose rights our SQL runs.
//!
//! The worker is a superuser, and so are for a moment the functions that look into our tables for somebody who may not.
//! What others have put on those tables (triggers, policies, rules, expressions) must not run with these rights: each
//! statement is executed as the tables' owner, in a context in which that owner's code can do nothing beyond its own
//! rights, and finds operators and functions in pg_catalog alone. Triggers of those who were granted TRIGGER do not run
//! at all: `session_replication_role` is `replica` wherever we write, and only an owner can have a trigger fire in
//! that.

use crate::server::encoding::{has_utf8_form, utf8};
use crate::server::error::raise;
use crate::server::report;
use crate::server::scoped;
use crate::tables::catalog;
use pgrx::pg_sys::panic::ErrorReport;
use pgrx::{PgSqlErrorCode, pg_extern, pg_sys};
use std::cell::Cell;
use std::ffi::CStr;

#[derive(Clone, Copy, PartialEq, Eq)]
enum Name {
    /// The caller.
    Caller,
    /// The tables' owner, for a caller who may not do it itself.
    Owner,
    /// The tables' owner, for good. The settings are pinned already.
    Worker,
}

thread_local! {
    static NAME: Cell<Name> = const { Cell::new(Name::Caller) };
}

/// This process is a worker.
pub(crate) fn are_the_workers() {
    NAME.set(Name::Worker);
}

/// Runs `f`, whose statements may do what the caller may not: who may call it is a matter of EXECUTE.
pub(crate) fn of_owner<R>(f: impl FnOnce() -> R) -> R {
    if NAME.get() != Name::Caller {
        return f();
    }
    // For what needs rights beside the statements; each of them asks again, when its tables are locked.
    scoped::with(&NAME, Name::Owner, || as_user(catalog::owner(), f))
}

/// Runs `f`, which makes and executes a statement, with the settings of the session out of its way.
pub(crate) fn statement<R>(f: impl FnOnce() -> R) -> R {
    if NAME.get() == Name::Worker {
        return f();
    }
    // SAFETY: within a transaction. An ERROR in between puts the settings back when it aborts.
    unsafe {
        let level = pg_sys::NewGUCNestLevel();
        set_here(c"search_path", c"pg_catalog, pg_temp");
        if NAME.get() == Name::Owner {
            set_here(c"session_replication_role", c"replica");
        }
        let result = f();
        pg_sys::AtEOXact_GUC(true, level);
        result
    }
}

/// `outbox.silence_triggers()`, at the beginning of a function that writes with its owner's rights. (As a setting of
/// the function itself, Postgres would refuse it with words that tell nobody what to do.)
#[pg_extern(sql = false)]
fn silence_triggers() {
    report::guard(|| {
        let (owner, user) = (catalog::owner(), current_user());
        // Triggers of a table's owner do fire: with the rights of a superuser they must not.
        if owner != user && !is_superuser(owner) {
            refuse_owner(owner);
        }
        // SAFETY: a plain read of the process's own variable.
        if unsafe { pg_sys::SessionReplicationRole } == pg_sys::SESSION_REPLICATION_ROLE_REPLICA as i32 {
            return;
        }
        if !is_superuser(user) {
            refuse_owner(user);
        }
        // SAFETY: within the nest level of the function that calls, which has a setting of its own; or the
        // transaction's.
        unsafe { set_here(c"session_replication_role", c"replica") };
    });
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
    // Roles are the whole server's: the name may have been given in a database of another encoding.
    let words = |text| match has_utf8_form(text) {
        // SAFETY: it was checked.
        Ok(()) => unsafe { utf8(text) },
        Err(_) => String::from_utf8_lossy(text),
    };
    let (name, quoted) = (words(name), words(quoted));
    raise(
        ErrorReport::new(
            PgSqlErrorCode::ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE,
            "the owner of schema outbox's tables and functions is no superuser",
            "",
        )
        .set_detail(format!(
            "It is \"{name}\", whose rights are not enough to keep triggers of others from running."
        ))
        .set_hint(format!(
            "Run ALTER ROLE {quoted} SUPERUSER, or REASSIGN OWNED BY {quoted} to a superuser."
        )),
    )
}

/// # Safety
/// Within a nest level of settings, with the name and a value of an existing one.
unsafe fn set_here(name: &CStr, value: &CStr) {
    // SAFETY: the caller's promise.
    unsafe {
        pg_sys::set_config_option(
            name.as_ptr(),
            value.as_ptr(),
            pg_sys::GucContext::PGC_SUSET,
            pg_sys::GucSource::PGC_S_SESSION,
            pg_sys::GucAction::GUC_ACTION_SAVE,
            true,
            0,
            false,
        );
    }
}

/// Runs `f` with these settings.
pub(crate) fn with_settings<R>(settings: &[(&CStr, &CStr)], f: impl FnOnce() -> R) -> R {
    // SAFETY: within a transaction. An ERROR in between puts the settings back when it aborts.
    unsafe {
        let level = pg_sys::NewGUCNestLevel();
        for (name, value) in settings {
            set_here(name, value);
        }
        let result = f();
        pg_sys::AtEOXact_GUC(true, level);
        result
    }
}

/// Runs `f`, which executes a statement that is parsed already: its tables are locked, so that their owner stays what
/// it is.
pub(crate) fn execution<R>(f: impl FnOnce() -> R) -> R {
    match NAME.get() {
        Name::Caller => f(),
        Name::Owner | Name::Worker => as_user(catalog::owner(), f),
    }
}

/// Runs `f` in the name of the owner of `relation`, which is locked.
pub(crate) fn as_owner_of<R>(relation: pg_sys::Oid, f: impl FnOnce() -> R) -> R {
    as_user(catalog::owner_of(relation), f)
}

fn as_user<R>(other: pg_sys::Oid, f: impl FnOnce() -> R) -> R {
    let (mut user, mut context) = (pg_sys::InvalidOid, 0);
    // SAFETY: saved and put back; an ERROR's abort puts them back as well.
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
