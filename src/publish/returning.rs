//! RETURNING and ON CONFLICT for publishers, who may insert events but not read them. ORMs write both by default.
//!
//! Postgres requires SELECT on each column that these clauses name, but that right would open the column in all rows.
//! Row security could limit it to the transaction's own rows, but it refuses COPY. So no right is granted. Instead, the
//! analysed statement loses the requirement of SELECT on the target table if the statement can show only what the
//! publisher itself gives: an INSERT into `outbox.events` that changes no row and returns only its own rows, in columns
//! that publishers fill in. All other rights that the statement needs are checked as before. ON CONFLICT (event_id)
//! reveals whether an id is taken, as the error for a repeated id does.
//!
//! Statements that are still refused are refused here, with a better message. This looks at each statement that is
//! analysed, and examines only INSERTs with such a clause.

use crate::publish::refused_rights::{INSERT, SELECT, UPDATE, column_name, has_anywhere, refuse};
use crate::server::query_tree::{columns, each_that_changes, rights, target};
use crate::server::report;
use crate::tables::catalog::{self, has_our_name};
use crate::tables::row::attribute;
use pgrx::pg_sys;

/// As [`permit`], for a statement that was analysed.
///
/// # Safety
/// As [`permit`].
pub(crate) unsafe fn permit_statement(query: *mut pg_sys::Query) {
    // SAFETY: the caller's promise.
    unsafe { each_that_changes(query, permit) };
}

/// Takes SELECT off what an INSERT asks for, where that shows nothing of others.
///
/// # Safety
/// A valid query that nobody else uses yet, in a frame that holds nothing.
pub(super) unsafe fn permit(query: *mut pg_sys::Query) {
    // SAFETY: the caller's promise.
    unsafe {
        if (*query).commandType != pg_sys::CmdType::CMD_INSERT
            || ((*query).returningList.is_null() && (*query).onConflict.is_null())
        {
            return;
        }
        let entry = target(query);
        if !has_our_name((*entry).relid, c"events") {
            return;
        }
        let Some(rights) = rights(query, entry) else {
            return;
        };
        let updates = !(*query).onConflict.is_null()
            && (*(*query).onConflict).action == pg_sys::OnConflictAction::ONCONFLICT_UPDATE;
        let needed = NeededColumns {
            table: (*entry).relid,
            user: match (*rights).checkAsUser {
                pg_sys::InvalidOid => pg_sys::GetUserId(),
                owner => owner,
            },
            columns: (*rights).selectedCols,
            updates,
        };
        if (*rights).requiredPerms & SELECT != 0 && report::guard(|| is_own_alone(&needed)) {
            (*rights).requiredPerms &= !SELECT;
        }
    }
}

/// Which rights an INSERT needs besides INSERT.
struct NeededColumns {
    table: pg_sys::Oid,
    /// Whose rights count: the caller's, or those of a view's or a rule's owner.
    user: pg_sys::Oid,
    columns: *const pg_sys::Bitmapset,
    updates: bool,
}

/// Whether it needs only what a publisher itself gives. Raises an ERROR with an explanation if the caller is a
/// publisher and lacks the remaining rights.
fn is_own_alone(needed: &NeededColumns) -> bool {
    let ours = catalog::relations().is_some_and(|relations| relations.events == needed.table);
    // With row security, Postgres checks the policies for SELECT only if the statement requires SELECT, so the
    // requirement stays.
    if !ours || has_row_security(needed.table) {
        return false;
    }
    // SAFETY: a set of the statement, which is valid during its analysis.
    let others: Vec<i16> = unsafe { columns(needed.columns) }
        .filter(|column| !is_given(*column))
        .collect();
    if others.is_empty() && !needed.updates {
        return true;
    }
    let has = |right| has_anywhere(needed.table, needed.user, right);
    if has(INSERT) && !has(SELECT) && !(needed.updates && has(UPDATE)) {
        explain(needed, &others);
    }
    false
}

/// Columns that publishers fill in, and the branch, which is 0 in all that they insert: Rails names both columns of the
/// unique index.
fn is_given(column: i16) -> bool {
    let column = column as usize;
    column != attribute::BACKEND_NUMBER
        && ([attribute::EVENT_ID, attribute::BRANCH].contains(&column)
            || (attribute::EVENT_TYPE..=attribute::MAX_RETRIES).contains(&column))
}

fn has_row_security(table: pg_sys::Oid) -> bool {
    // SAFETY: the analysis of the statement has locked the table.
    unsafe {
        let relation = pg_sys::table_open(table, pg_sys::NoLock as pg_sys::LOCKMODE);
        let has = (*(*relation).rd_rel).relrowsecurity;
        pg_sys::table_close(relation, pg_sys::NoLock as pg_sys::LOCKMODE);
        has
    }
}

fn explain(needed: &NeededColumns, others: &[i16]) -> ! {
    let name = |column: &i16| column_name(needed.table, *column).unwrap_or_else(|| "the whole row".to_owned());
    let (detail, hint) = match needed.updates {
        true => (
            "ON CONFLICT DO UPDATE would change an event, but events never change.".to_owned(),
            "Use ON CONFLICT (event_id) DO NOTHING.",
        ),
        false => (
            format!(
                "The statement reads columns that a publisher may not read: {}.",
                others.iter().map(name).collect::<Vec<_>>().join(", ")
            ),
            "Name columns that publishers fill in, such as RETURNING event_id, or call outbox.publish_event(), which returns the id.",
        ),
    };
    refuse(detail, hint)
}
