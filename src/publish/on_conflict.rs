//! What `ON CONFLICT (event_id)` means: that the event is there already.
//!
//! Postgres looks for a unique index on just the columns that stand there. That of `outbox.events` is on (event_id,
//! branch), because routes can give an event several rows. The row that a statement inserts is always the first, of
//! branch 0, so the index decides about the same rows as one on event_id would. Here `branch` is added where `event_id`
//! stands alone, before the statement is planned: then this also holds in functions and rules that were parsed long ago.
//!
//! The hook runs for each statement that is planned, and looks at those alone that are an INSERT with ON CONFLICT. It also
//! has their tables looked at: see [`crate::publish::refused_rights`].

use crate::publish::refused_rights;
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

// No pg_guard: an ERROR of the planner, or of another library's hook, passes; nothing here needs to be dropped.
// SAFETY: called by Postgres alone, with a query that is its own to change.
unsafe extern "C-unwind" fn on_planning(
    query: *mut pg_sys::Query,
    text: *const c_char,
    options: std::ffi::c_int,
    params: pg_sys::ParamListInfo,
) -> *mut pg_sys::PlannedStmt {
    // SAFETY: what Postgres gave us; statements that change something stand in the outermost WITH alone.
    unsafe {
        refused_rights::expect_rights(query);
        complete(query);
        if (*query).hasModifyingCTE {
            for index in 0..(*(*query).cteList).length as usize {
                let cte = item((*query).cteList, index).cast::<pg_sys::CommonTableExpr>();
                let inner = (*cte).ctequery;
                if (*inner).type_ == pg_sys::NodeTag::T_Query {
                    complete(inner.cast());
                }
            }
        }
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
    // SAFETY: the caller's promise; relations are counted from 1 in the range table. The new nodes live as long as what
    // the planner makes.
    unsafe {
        if (*query).commandType != pg_sys::CmdType::CMD_INSERT || (*query).onConflict.is_null() {
            return;
        }
        let conflict = (*query).onConflict;
        let entry = item((*query).rtable, (*query).resultRelation as usize - 1).cast::<pg_sys::RangeTblEntry>();
        if !is_event_id_alone((*conflict).arbiterElems) || !is_ours((*entry).relid) {
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

/// Whether a relation is `outbox.events` or `outbox.scheduled_events` with a column `branch`. Looks at caches alone, and
/// fails for nobody.
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

/// Whether that is all that the clause names; of whichever table.
///
/// # Safety
/// A list of inference elements, or null.
unsafe fn is_event_id_alone(elements: *const pg_sys::List) -> bool {
    // SAFETY: the caller's promise.
    unsafe {
        if elements.is_null() || (*elements).length != 1 {
            return false;
        }
        let column = (*item(elements, 0).cast::<pg_sys::InferenceElem>()).expr;
        (*column).type_ == pg_sys::NodeTag::T_Var
            && (*column.cast::<pg_sys::Var>()).varattno as usize == attribute::EVENT_ID
    }
}

/// # Safety
/// A list of nodes that has such an element.
unsafe fn item(list: *const pg_sys::List, index: usize) -> *mut std::ffi::c_void {
    // SAFETY: the caller's promise.
    unsafe { (*(*list).elements.add(index)).ptr_value }
}
