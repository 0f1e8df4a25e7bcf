//! Plans of statements on tables with rules. Which rules are in a plan depends on `session_replication_role`.
//!
//! [`silence`](super::silence) changes the variable behind that setting and leaves the session's plans alone. A trigger
//! that an owner has enabled for a silence, or a function that it calls, may write to a table with rules, and so may its
//! cascading foreign keys. What is kept of such a statement must not be used on the other side of a silence. So this
//! module notes that there may be such a plan, and only then all plans are made again.
//!
//! A statement is looked at when it is analysed, since it may be planned later, and when it is planned, since what is
//! stored as a tree (functions with BEGIN ATOMIC) is not analysed again.

use crate::server::query_tree::{each_that_changes, item, length, target};
use pgrx::pg_sys;
use std::cell::Cell;
use std::ffi::c_void;

/// How many views upon each other are followed. Views of which one is made of the other have no end.
const MOST_VIEWS: usize = 32;

static mut ANALYSED_BEFORE: pg_sys::post_parse_analyze_hook_type = None;
static mut PLANNED_BEFORE: pg_sys::create_upper_paths_hook_type = None;

thread_local! {
    /// Whether such a plan may have been made since all plans were forgotten.
    static MAY_BE: Cell<bool> = const { Cell::new(false) };
}

// SAFETY: the declarations of utils/relcache.h and utils/plancache.h. Without pgrx's guard: ERRORs pass through.
unsafe extern "C-unwind" {
    fn RelationIdGetRelation(relation: pg_sys::Oid) -> pg_sys::Relation;
    fn RelationClose(relation: pg_sys::Relation);
    fn ResetPlanCache();
}

/// Called once, when the library is loaded.
pub(crate) fn install() {
    // SAFETY: a process loads its libraries in its one thread.
    unsafe {
        ANALYSED_BEFORE = pg_sys::post_parse_analyze_hook;
        pg_sys::post_parse_analyze_hook = Some(on_analysed);
        PLANNED_BEFORE = pg_sys::create_upper_paths_hook;
        pg_sys::create_upper_paths_hook = Some(on_planned);
        // A session that loads it later may have plans already.
        MAY_BE.set(!pg_sys::process_shared_preload_libraries_in_progress);
    }
}

/// Called when a silence begins or ends. Cannot fail.
pub(crate) fn forget() {
    if MAY_BE.replace(false) {
        // SAFETY: within a transaction or its end, as Postgres calls it when the setting changes.
        unsafe { ResetPlanCache() };
    }
}

// No pg_guard: an ERROR of Postgres or of another library's hook passes through; nothing here needs to be dropped.
// SAFETY: only Postgres calls this, with a query that was just made.
unsafe extern "C-unwind" fn on_analysed(
    state: *mut pg_sys::ParseState,
    query: *mut pg_sys::Query,
    jumble: *mut pg_sys::JumbleState,
) {
    // SAFETY: Postgres passes a valid query.
    unsafe {
        if let Some(previous) = ANALYSED_BEFORE {
            previous(state, query, jumble);
        }
        each_that_changes(query, note);
    }
}

// No pg_guard: as above.
// SAFETY: only Postgres calls this, with a query that it plans.
unsafe extern "C-unwind" fn on_planned(
    root: *mut pg_sys::PlannerInfo,
    stage: pg_sys::UpperRelationKind::Type,
    input: *mut pg_sys::RelOptInfo,
    output: *mut pg_sys::RelOptInfo,
    extra: *mut c_void,
) {
    // SAFETY: what Postgres gave us. This stage is reached for each part of a statement that changes data.
    unsafe {
        if let Some(previous) = PLANNED_BEFORE {
            previous(root, stage, input, output, extra);
        }
        if stage == pg_sys::UpperRelationKind::UPPERREL_FINAL {
            note((*root).parse);
        }
    }
}

/// Notes that a statement changes a table with rules.
///
/// # Safety
/// A valid query within a transaction, in a frame that holds nothing.
unsafe fn note(query: *mut pg_sys::Query) {
    // SAFETY: the caller's promise.
    unsafe {
        if (*query).resultRelation != 0 && !MAY_BE.get() && has_rules((*target(query)).relid) {
            MAY_BE.set(true);
        }
    }
}

/// Whether a table, or a table that is changed through a view, has rules for other statements than SELECT.
///
/// # Safety
/// Within a transaction, in a frame that holds nothing.
unsafe fn has_rules(table: pg_sys::Oid) -> bool {
    let mut table = table;
    for _ in 0..MOST_VIEWS {
        // SAFETY: a statement or a view that is locked refers to it, so that it is there. It is not closed by an ERROR,
        // but by the transaction's end.
        unsafe {
            let relation = RelationIdGetRelation(table);
            if relation.is_null() {
                return false;
            }
            let (has_rules, base) = look_at((*relation).rd_rules);
            RelationClose(relation);
            match base {
                _ if has_rules => return true,
                None => return false,
                Some(base) => table = base,
            }
        }
    }
    true
}

/// Whether there are rules for other statements than SELECT; the only table of the view that the rule for SELECT makes.
///
/// # Safety
/// Rules of an open table, or null.
unsafe fn look_at(rules: *const pg_sys::RuleLock) -> (bool, Option<pg_sys::Oid>) {
    let mut base = None;
    // SAFETY: the caller's promise. The rule for SELECT has one action, which is a query.
    unsafe {
        for index in 0..rules.as_ref().map_or(0, |rules| rules.numLocks as usize) {
            let rule = *(*rules).rules.add(index);
            if (*rule).event != pg_sys::CmdType::CMD_SELECT {
                return (true, None);
            }
            let view = item((*rule).actions, 0).cast::<pg_sys::Query>();
            let from = (*(*view).jointree).fromlist;
            if length(from) == 1 && (*item(from, 0).cast::<pg_sys::Node>()).type_ == pg_sys::NodeTag::T_RangeTblRef {
                let index = (*item(from, 0).cast::<pg_sys::RangeTblRef>()).rtindex as usize;
                let entry = item((*view).rtable, index - 1).cast::<pg_sys::RangeTblEntry>();
                if (*entry).rtekind == pg_sys::RTEKind::RTE_RELATION {
                    base = Some((*entry).relid);
                }
            }
        }
    }
    (false, base)
}
