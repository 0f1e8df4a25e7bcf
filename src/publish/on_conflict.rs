//! Gives `ON CONFLICT (event_id)` its meaning: the event is already there.
//!
//! Postgres looks for a unique index on exactly the columns that the clause names. The index of `outbox.events` is on
//! (event_id, branch), because routes can give an event several rows. The row that a statement inserts is always the
//! first, of branch 0, so this index and one on event_id alone decide alike. Where the clause names only `event_id`,
//! this module adds `branch` before the statement is planned. So it also works in functions and rules that were parsed
//! long ago.
//!
//! The hook runs for each statement that is planned, and examines only INSERTs with ON CONFLICT. It also passes the
//! statement's tables to [`crate::publish::refused_rights`].

use crate::publish::refused_rights;
use crate::server::query_tree::{each_that_changes, item, length, target};
use crate::tables::catalog::has_our_name;
use crate::tables::row::attribute;
use pgrx::pg_sys;
use std::ffi::{CStr, c_char};

static mut PREVIOUS_HOOK: pg_sys::planner_hook_type = None;

// SAFETY: the declarations of optimizer/planner.h, nodes/nodes.h, nodes/pg_list.h and utils/lsyscache.h. Without pgrx's
// guard: ERRORs pass through.
unsafe extern "C-unwind" {
    fn copyObjectImpl(node: *const std::ffi::c_void) -> *mut std::ffi::c_void;
    fn lappend(list: *mut pg_sys::List, node: *mut std::ffi::c_void) -> *mut pg_sys::List;
    fn get_attname(relation: pg_sys::Oid, column: i16, missing_ok: bool) -> *mut c_char;
    fn standard_planner(
        query: *mut pg_sys::Query,
        text: *const c_char,
        options: std::ffi::c_int,
        params: pg_sys::ParamListInfo,
    ) -> *mut pg_sys::PlannedStmt;
}

/// Called once, when the library is loaded.
pub(crate) fn install() {
    // SAFETY: a process loads its libraries in its one thread.
    unsafe {
        PREVIOUS_HOOK = pg_sys::planner_hook;
        pg_sys::planner_hook = Some(on_planning);
    }
}

// No pg_guard: an ERROR of the planner or of another library's hook passes through; nothing here needs to be dropped.
// SAFETY: only Postgres calls this, with a query that may be changed.
unsafe extern "C-unwind" fn on_planning(
    query: *mut pg_sys::Query,
    text: *const c_char,
    options: std::ffi::c_int,
    params: pg_sys::ParamListInfo,
) -> *mut pg_sys::PlannedStmt {
    // SAFETY: Postgres passes a valid query.
    unsafe {
        refused_rights::expect_rights(query);
        each_that_changes(query, complete);
        match PREVIOUS_HOOK {
            Some(previous) => previous(query, text, options, params),
            None => standard_planner(query, text, options, params),
        }
    }
}

/// Adds `branch` to the clause of an INSERT that names `event_id` alone.
///
/// # Safety
/// A valid query, in a frame that holds nothing.
pub(super) unsafe fn complete(query: *mut pg_sys::Query) {
    // SAFETY: the caller's promise. The new nodes live as long as the plan.
    unsafe {
        if (*query).commandType != pg_sys::CmdType::CMD_INSERT || (*query).onConflict.is_null() {
            return;
        }
        let conflict = (*query).onConflict;
        if !is_event_id_alone((*conflict).arbiterElems) || !is_ours((*target(query)).relid) {
            return;
        }
        let element = copyObjectImpl(item((*conflict).arbiterElems, 0)).cast::<pg_sys::InferenceElem>();
        let column = (*element).expr.cast::<pg_sys::Var>();
        (*column).varattno = attribute::BRANCH as i16;
        (*column).varattnosyn = attribute::BRANCH as i16;
        (*column).vartype = pg_sys::INT2OID;
        (*element).infercollid = pg_sys::InvalidOid;
        (*element).inferopclass = pg_sys::InvalidOid;
        (*conflict).arbiterElems = lappend((*conflict).arbiterElems, element.cast());
    }
}

/// Whether a relation is `outbox.events` or `outbox.scheduled_events` with a column `branch`. It reads only caches and
/// never raises an ERROR.
///
/// # Safety
/// Within a transaction, in a frame that holds nothing.
unsafe fn is_ours(relation: pg_sys::Oid) -> bool {
    // SAFETY: the caller's promise; the name is a copy in the current memory context.
    unsafe {
        if !has_our_name(relation, c"events") && !has_our_name(relation, c"scheduled_events") {
            return false;
        }
        let name = get_attname(relation, attribute::BRANCH as i16, true);
        !name.is_null() && CStr::from_ptr(name) == c"branch"
    }
}

/// Whether the clause names `event_id` and nothing else, of any table.
///
/// # Safety
/// A list of inference elements, or null.
unsafe fn is_event_id_alone(elements: *const pg_sys::List) -> bool {
    // SAFETY: the caller's promise.
    unsafe {
        if length(elements) != 1 {
            return false;
        }
        let column = (*item(elements, 0).cast::<pg_sys::InferenceElem>()).expr;
        (*column).type_ == pg_sys::NodeTag::T_Var
            && (*column.cast::<pg_sys::Var>()).varattno as usize == attribute::EVENT_ID
    }
}
