//! Clear errors for what a publisher may not do with `outbox.events`: read, change or delete events, as an ORM does
//! that looks for a row before it inserts, and fill in columns that the trigger fills in.
//!
//! Postgres would refuse these a moment later, when the statement starts, but only with "permission denied". A
//! statement that is only prepared or defined is not planned, so a driver can still ask for its columns. Rights that a
//! view or an expression needs are left to Postgres.

use crate::server::error::raise;
use crate::server::query_tree::{columns, item, length, rights};
use crate::server::report;
use crate::tables::catalog::{self, has_our_name, named};
use crate::tables::row::attribute;
use pgrx::pg_sys::panic::ErrorReport;
use pgrx::{PgSqlErrorCode, pg_sys};
use std::ffi::CStr;

pub(super) const SELECT: pg_sys::AclMode = pg_sys::ACL_SELECT as pg_sys::AclMode;
pub(super) const INSERT: pg_sys::AclMode = pg_sys::ACL_INSERT as pg_sys::AclMode;
pub(super) const UPDATE: pg_sys::AclMode = pg_sys::ACL_UPDATE as pg_sys::AclMode;
const DELETE: pg_sys::AclMode = pg_sys::ACL_DELETE as pg_sys::AclMode;

/// Checks the rights on the tables of a statement that is planned.
///
/// # Safety
/// A valid query after its rewriting, in a frame that holds nothing.
pub(crate) unsafe fn expect_rights(query: *mut pg_sys::Query) {
    // SAFETY: the caller's promise; a list may be null.
    unsafe {
        let mut events = None;
        for index in 0..length((*query).rtable) {
            let entry = item((*query).rtable, index).cast::<pg_sys::RangeTblEntry>();
            if (*entry).rtekind == pg_sys::RTEKind::RTE_SUBQUERY {
                expect_rights((*entry).subquery);
            }
            if (*entry).rtekind != pg_sys::RTEKind::RTE_RELATION {
                continue;
            }
            let Some(rights) = rights(query, entry) else {
                continue;
            };
            // A view is checked with another user's rights.
            if (*rights).requiredPerms == 0 || (*rights).checkAsUser != pg_sys::InvalidOid {
                continue;
            }
            if *events.get_or_insert_with(|| named(c"events")) == Some((*entry).relid) {
                // What RETURNING and ON CONFLICT ask for is the matter of `returning`, which may take it off later.
                let is_inserted_into = (*query).commandType == pg_sys::CmdType::CMD_INSERT
                    && (*query).resultRelation as usize == index + 1;
                let needed = NeededRights {
                    table: (*entry).relid,
                    rights: (*rights).requiredPerms & if is_inserted_into { INSERT } else { !0 },
                    filled_in: (*rights).insertedCols,
                    is_query: (*query).commandType == pg_sys::CmdType::CMD_SELECT,
                };
                report::guard(|| needed.expect());
            }
        }
    }
}

/// The same for a statement that is analysed: COPY is not planned.
///
/// # Safety
/// A valid query, in a frame that holds nothing.
pub(crate) unsafe fn expect_rights_of_copy(query: *mut pg_sys::Query) {
    // SAFETY: the caller's promise; a name is looked up without a lock, and may be none.
    unsafe {
        let copy = (*query).utilityStmt.cast::<pg_sys::CopyStmt>();
        if copy.is_null() || (*copy).type_ != pg_sys::NodeTag::T_CopyStmt || (*copy).relation.is_null() {
            return;
        }
        let given = (*copy).relation;
        if CStr::from_ptr((*given).relname) == c"events" {
            report::guard(|| {
                let (no_lock, missing_ok) = (pg_sys::NoLock as pg_sys::LOCKMODE, pg_sys::RVROption::RVR_MISSING_OK);
                let table = pg_sys::RangeVarGetRelidExtended(given, no_lock, missing_ok, None, std::ptr::null_mut());
                if table != pg_sys::InvalidOid && has_our_name(table, c"events") {
                    expect_copy(table, &*copy);
                }
            });
        }
    }
}

fn expect_copy(table: pg_sys::Oid, copy: &pg_sys::CopyStmt) {
    let mut filled_in: *mut pg_sys::Bitmapset = std::ptr::null_mut();
    // SAFETY: the list is of names, or null: all columns. The set lives in the current memory context.
    unsafe {
        let mut fill_in = |column: i16| {
            let member = i32::from(column) - pg_sys::FirstLowInvalidHeapAttributeNumber;
            filled_in = pg_sys::bms_add_member(filled_in, member);
        };
        match copy.attlist.as_ref() {
            None => (1..=attribute::COUNT as i16).for_each(&mut fill_in),
            Some(names) => (0..names.length as usize).for_each(|index| {
                let name = (*names.elements.add(index)).ptr_value.cast::<pg_sys::String>();
                match pg_sys::get_attnum(table, (*name).sval) {
                    // Postgres reports that.
                    0 => {}
                    column => fill_in(column),
                }
            }),
        }
    }
    let rights = if copy.is_from { INSERT } else { SELECT };
    NeededRights {
        table,
        rights,
        filled_in,
        is_query: false,
    }
    .expect();
}

/// The rights that a statement needs on the table.
struct NeededRights {
    table: pg_sys::Oid,
    rights: pg_sys::AclMode,
    filled_in: *const pg_sys::Bitmapset,
    /// It changes no row, but may lock some.
    is_query: bool,
}

impl NeededRights {
    /// Raises an ERROR if the caller is a publisher without these rights.
    fn expect(&self) {
        // Without a right to publish, the error of Postgres is enough.
        if !self.has_anywhere(INSERT) {
            return;
        }
        if let Some((detail, hint)) = self.lacking()
            && catalog::relations().is_some_and(|relations| relations.events == self.table)
        {
            refuse(detail, hint);
        }
    }

    /// The DETAIL and the HINT: what the caller may not do, and what to do instead.
    fn lacking(&self) -> Option<(String, &'static str)> {
        let lacks = |right| self.rights & right != 0 && !self.has_anywhere(right);
        // FOR UPDATE needs the right to read, too.
        if lacks(UPDATE) && !(self.is_query && lacks(SELECT)) {
            return Some((
                "Events are never changed.".into(),
                "Publish another event. If an ORM's save() updates because the row has a key, have it insert; INSERT ... \
                 ON CONFLICT (event_id) DO NOTHING publishes once.",
            ));
        }
        if lacks(DELETE) {
            return Some((
                "A publisher cannot delete events. They are deleted when their retention ends.".into(),
                "Set outbox_relay.published_retention instead.",
            ));
        }
        if lacks(SELECT) {
            return Some((
                "A publisher can insert events, but not read them.".into(),
                "Publish without reading first: with outbox.publish_event(), or with INSERT ... ON CONFLICT (event_id) \
                 DO NOTHING. outbox.published_here() shows what this transaction has published.",
            ));
        }
        let others: Vec<String> = match self.rights & INSERT != 0 && !has(self.table, current_user(), INSERT) {
            // SAFETY: a set that lives as long as the statement.
            true => unsafe { columns(self.filled_in) }
                .filter(|c| !self.may_fill_in(*c))
                .map(|c| self.name(c))
                .collect(),
            false => Vec::new(),
        };
        (!others.is_empty()).then(|| {
            (
                format!("A publisher cannot fill in: {}.", others.join(", ")),
                "Name only the other columns, and leave these out of an ORM's model: the server fills them in.",
            )
        })
    }

    fn has_anywhere(&self, right: pg_sys::AclMode) -> bool {
        has_anywhere(self.table, current_user(), right)
    }

    fn may_fill_in(&self, column: i16) -> bool {
        // SAFETY: a catalog look-up within a transaction; the column is one of the table's.
        unsafe {
            pg_sys::pg_attribute_aclcheck(self.table, column, current_user(), INSERT) == pg_sys::AclResult::ACLCHECK_OK
        }
    }

    fn name(&self, column: i16) -> String {
        column_name(self.table, column).unwrap_or_else(|| column.to_string())
    }
}

fn current_user() -> pg_sys::Oid {
    // SAFETY: a plain read.
    unsafe { pg_sys::GetUserId() }
}

/// Whether a role has a right on the table.
fn has(table: pg_sys::Oid, role: pg_sys::Oid, right: pg_sys::AclMode) -> bool {
    // SAFETY: a catalog look-up within a transaction.
    unsafe { pg_sys::pg_class_aclcheck(table, role, right) == pg_sys::AclResult::ACLCHECK_OK }
}

/// Whether a role has a right on the table, or on one of its columns.
pub(super) fn has_anywhere(table: pg_sys::Oid, role: pg_sys::Oid, right: pg_sys::AclMode) -> bool {
    let any = pg_sys::AclMaskHow::ACLMASK_ANY;
    // SAFETY: as above.
    let on_columns = || unsafe { pg_sys::pg_attribute_aclcheck_all(table, role, right, any) };
    // Nobody has DELETE on a column.
    has(table, role, right) || (right != DELETE && on_columns() == pg_sys::AclResult::ACLCHECK_OK)
}

/// `None`: it is the whole row, or there is no such column.
pub(super) fn column_name(table: pg_sys::Oid, column: i16) -> Option<String> {
    // SAFETY: a catalog look-up; the name lives in the current memory context.
    unsafe {
        let name = pg_sys::get_attname(table, column, true);
        (!name.is_null()).then(|| CStr::from_ptr(name).to_string_lossy().into_owned())
    }
}

/// The error of Postgres, with a DETAIL and a HINT.
pub(super) fn refuse(detail: String, hint: &'static str) -> ! {
    raise(
        ErrorReport::new(
            PgSqlErrorCode::ERRCODE_INSUFFICIENT_PRIVILEGE,
            "permission denied for table events",
            "",
        )
        .set_detail(detail)
        .set_hint(hint),
    )
}
