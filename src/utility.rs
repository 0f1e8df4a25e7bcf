//! Utility statements that concern the relay: those that need a database to themselves make its worker leave first, and those that
//! bring or take the extension tell the launcher.

use crate::shmem::{self, Slot};
use crate::txn;
use pgrx::{PgTryBuilder, pg_guard, pg_sys};
use std::ffi::{CStr, c_char};
use std::panic::AssertUnwindSafe;
use std::time::{Duration, Instant};

/// How long a worker may take to leave; it does within milliseconds.
const LEAVE_TIMEOUT: Duration = Duration::from_secs(5);

static mut PREVIOUS_HOOK: pg_sys::ProcessUtility_hook_type = None;

/// Called once, by the postmaster.
pub fn install() {
    // SAFETY: the postmaster is single-threaded and calls this once.
    unsafe {
        PREVIOUS_HOOK = pg_sys::ProcessUtility_hook;
        pg_sys::ProcessUtility_hook = Some(process_utility);
    }
}

// The hook's signature is Postgres's.
#[allow(clippy::too_many_arguments)]
#[pg_guard]
// SAFETY: called by Postgres alone, with the arguments of its hook.
unsafe extern "C-unwind" fn process_utility(
    statement: *mut pg_sys::PlannedStmt,
    query: *const c_char,
    read_only_tree: bool,
    context: pg_sys::ProcessUtilityContext::Type,
    params: pg_sys::ParamListInfo,
    environment: *mut pg_sys::QueryEnvironment,
    destination: *mut pg_sys::DestReceiver,
    completion: *mut pg_sys::QueryCompletion,
) {
    // SAFETY: the arguments that Postgres gave us, passed on unchanged; the statement's tree is read before that.
    unsafe {
        let tree = (*statement).utilityStmt;
        let held = database_needed(tree).and_then(shmem::slot_of);
        let news = news_of(tree);
        let run = || match PREVIOUS_HOOK {
            Some(previous) => {
                previous(
                    statement,
                    query,
                    read_only_tree,
                    context,
                    params,
                    environment,
                    destination,
                    completion,
                );
            }
            None => pg_sys::standard_ProcessUtility(
                statement,
                query,
                read_only_tree,
                context,
                params,
                environment,
                destination,
                completion,
            ),
        };
        match held {
            Some(slot) => holding(slot, run),
            None => run(),
        }
        match news {
            Some(News::Extension) => txn::extension_changed(),
            Some(News::Database) => txn::databases_changed(),
            Some(News::Prepared) => txn::prepared_committed(),
            None => {}
        }
    }
}

enum News {
    Extension,
    Database,
    Prepared,
}

/// # Safety
/// A utility statement's tree.
unsafe fn news_of(tree: *mut pg_sys::Node) -> Option<News> {
    use pg_sys::NodeTag::*;
    // SAFETY: the tag tells the node's type.
    unsafe {
        match (*tree).type_ {
            T_CreateExtensionStmt => {
                is_ours((*tree.cast::<pg_sys::CreateExtensionStmt>()).extname).then_some(News::Extension)
            }
            T_AlterExtensionStmt => {
                is_ours((*tree.cast::<pg_sys::AlterExtensionStmt>()).extname).then_some(News::Extension)
            }
            T_DropStmt => {
                let kind = (*tree.cast::<pg_sys::DropStmt>()).removeType;
                let may_take_it =
                    [pg_sys::ObjectType::OBJECT_EXTENSION, pg_sys::ObjectType::OBJECT_SCHEMA].contains(&kind);
                may_take_it.then_some(News::Extension)
            }
            T_CreatedbStmt | T_AlterDatabaseStmt => Some(News::Database),
            T_TransactionStmt => {
                let kind = (*tree.cast::<pg_sys::TransactionStmt>()).kind;
                (kind == pg_sys::TransactionStmtKind::TRANS_STMT_COMMIT_PREPARED).then_some(News::Prepared)
            }
            _ => None,
        }
    }
}

/// # Safety
/// A zero-terminated text.
unsafe fn is_ours(extension: *const c_char) -> bool {
    // SAFETY: the caller's promise.
    unsafe { CStr::from_ptr(extension) == c"outbox_relay" }
}

/// The database in which a statement suffers nobody else.
///
/// # Safety
/// A utility statement's tree, within a transaction.
unsafe fn database_needed(tree: *mut pg_sys::Node) -> Option<pg_sys::Oid> {
    use pg_sys::NodeTag::*;
    // SAFETY: the tag tells the node's type.
    unsafe {
        let name: *const c_char = match (*tree).type_ {
            T_DropdbStmt => (*tree.cast::<pg_sys::DropdbStmt>()).dbname,
            T_RenameStmt => {
                let rename = tree.cast::<pg_sys::RenameStmt>();
                if (*rename).renameType != pg_sys::ObjectType::OBJECT_DATABASE {
                    return None;
                }
                (*rename).subname
            }
            T_CreatedbStmt => {
                let options = (*tree.cast::<pg_sys::CreatedbStmt>()).options;
                option_text(options, c"template").unwrap_or(c"template1".as_ptr())
            }
            T_AlterDatabaseStmt => {
                let alter = tree.cast::<pg_sys::AlterDatabaseStmt>();
                option_text((*alter).options, c"tablespace")?;
                (*alter).dbname
            }
            _ => return None,
        };
        let oid = pg_sys::get_database_oid(name, true);
        (oid != pg_sys::InvalidOid).then_some(oid)
    }
}

/// The text of an option in a list of `DefElem`s.
///
/// # Safety
/// A valid list, or null.
unsafe fn option_text(options: *mut pg_sys::List, name: &CStr) -> Option<*const c_char> {
    // SAFETY: the list's cells are DefElems with zero-terminated names.
    unsafe {
        let count = if options.is_null() { 0 } else { (*options).length };
        (0..count).find_map(|i| {
            let element = pg_sys::list_nth(options, i).cast::<pg_sys::DefElem>();
            let found = CStr::from_ptr((*element).defname) == name && !(*element).arg.is_null();
            found.then(|| pg_sys::defGetString(element).cast_const())
        })
    }
}

/// Runs a statement while the database's worker is away.
fn holding(slot: &'static Slot, run: impl FnOnce()) {
    // SAFETY: a plain read of the process's own variable.
    let pid = unsafe { pg_sys::MyProcPid };
    PgTryBuilder::new(AssertUnwindSafe(|| {
        slot.hold(pid);
        let deadline = Instant::now() + LEAVE_TIMEOUT;
        while slot.pid() != 0 && Instant::now() < deadline {
            slot.wake();
            crate::process::wait_briefly(Duration::from_millis(5));
            pg_sys::check_for_interrupts!();
        }
        run();
    }))
    .finally(|| {
        slot.release(pid);
        shmem::wake_launcher();
    })
    .execute();
}
