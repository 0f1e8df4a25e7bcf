//! Gives `ON CONFLICT (event_id)` its meaning: the event is already there.
//!
//! Postgres looks for a unique index on exactly the columns that the clause names. The index of `outbox.events` is on
//! (event_id, branch), because routes can give an event several rows. The row that a statement inserts is always the
//! first, of branch 0, so this index and one on event_id alone decide alike. Where the clause names only `event_id`,
//! this module adds `branch` before the statement is planned. So it also works in functions and rules that were parsed
//! long ago.
//!
//! This looks at each statement that is planned, and examines only INSERTs with ON CONFLICT.

use crate::server::query_tree::{each_that_changes, item, length, target};
use crate::tables::catalog::has_our_name;
use crate::tables::row::attribute;
use pgrx::pg_sys;
use std::ffi::{CStr, c_char};

// SAFETY: the declarations of nodes/nodes.h, nodes/pg_list.h and utils/lsyscache.h. Without pgrx's guard: ERRORs pass
// through.
unsafe extern "C-unwind" {
    fn copyObjectImpl(node: *const std::ffi::c_void) -> *mut std::ffi::c_void;
    fn lappend(list: *mut pg_sys::List, node: *mut std::ffi::c_void) -> *mut pg_sys::List;
    fn get_attname(relation: pg_sys::Oid, column: i16, missing_ok: bool) -> *mut c_char;
}

/// As [`complete`], for a statement that is about to be planned.
///
/// # Safety
/// As [`complete`].
pub(crate) unsafe fn complete_statement(query: *mut pg_sys::Query) {
    // SAFETY: the caller's promise.
    unsafe { each_that_changes(query, complete) };
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
