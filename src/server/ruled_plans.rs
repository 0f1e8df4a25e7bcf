//! Plans of statements on tables with rules. Which rules are in a plan depends on `session_replication_role`.
//!
//! [`silence`](super::silence) changes the variable behind that setting and leaves the session's plans alone. A trigger
//! that an owner has enabled for a silence, or a function that it calls, may write to a table with rules, and so may
//! its cascading foreign keys. What is kept of such a statement must not be used on the other side of a silence. So
//! this module notes that there may be such a plan, and only then all plans are made again.
//!
//! A statement is looked at when it is analysed, since it may be planned later, and when it is planned, since what is
//! stored as a tree (functions with BEGIN ATOMIC) is not analysed again.

use crate::server::query_tree::{each_that_changes, item, length, target};
use pgrx::pg_sys;
use std::cell::Cell;

/// How many views upon each other are followed. Views of which one is made of the other have no end.
const MOST_VIEWS: usize = 32;

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

/// Called once by a session that loads the library after its start: it may have plans already.
pub(crate) fn suspect_earlier_plans() {
    MAY_BE.set(true);
}

/// Called when a silence begins or ends. Cannot fail.
pub(crate) fn forget() {
    if MAY_BE.replace(false) {
        // SAFETY: within a transaction or its end, as Postgres calls it when the setting changes.
        unsafe { ResetPlanCache() };
    }
}

/// Looks at a statement that was analysed.
///
/// # Safety
/// A valid query within a transaction, in a frame that holds nothing.
pub(crate) unsafe fn note_statement(query: *mut pg_sys::Query) {
    // SAFETY: the caller's promise.
    unsafe { each_that_changes(query, note) };
}

/// Looks at one query of a statement that is planned: notes that it changes a table with rules.
///
/// # Safety
/// As [`note_statement`].
pub(crate) unsafe fn note(query: *mut pg_sys::Query) {
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
