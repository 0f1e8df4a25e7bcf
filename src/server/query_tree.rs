//! Query trees as the hooks of the parser and the planner see them: lists of nodes, tables, and the rights that a
//! statement needs.

use pgrx::pg_sys;
use std::ffi::c_void;

/// The rights that a query needs on one of its tables. Before Postgres 16, the table's entry has them.
#[cfg(feature = "pg15")]
pub(crate) type Rights = pg_sys::RangeTblEntry;
#[cfg(not(feature = "pg15"))]
pub(crate) type Rights = pg_sys::RTEPermissionInfo;

/// # Safety
/// A list or null.
pub(crate) unsafe fn length(list: *const pg_sys::List) -> usize {
    // SAFETY: the caller's promise.
    unsafe { list.as_ref() }.map_or(0, |list| list.length as usize)
}

/// # Safety
/// A list of nodes that has an element at this index.
pub(crate) unsafe fn item(list: *const pg_sys::List, index: usize) -> *mut c_void {
    // SAFETY: the caller's promise.
    unsafe { (*(*list).elements.add(index)).ptr_value }
}

/// Calls `f` with a statement, and with each part of its WITH that changes data. Such parts can only be in the
/// outermost WITH.
///
/// # Safety
/// A valid query, with which `f` may be called.
pub(crate) unsafe fn each_that_changes(query: *mut pg_sys::Query, f: unsafe fn(*mut pg_sys::Query)) {
    // SAFETY: the caller's promise.
    unsafe {
        f(query);
        if !(*query).hasModifyingCTE {
            return;
        }
        for index in 0..length((*query).cteList) {
            let cte = item((*query).cteList, index).cast::<pg_sys::CommonTableExpr>();
            let inner = (*cte).ctequery;
            if (*inner).type_ == pg_sys::NodeTag::T_Query {
                f(inner.cast());
            }
        }
    }
}

/// The table that a statement changes.
///
/// # Safety
/// A valid INSERT, UPDATE, DELETE or MERGE.
pub(crate) unsafe fn target(query: *const pg_sys::Query) -> *mut pg_sys::RangeTblEntry {
    // SAFETY: the caller's promise; relations are counted from 1 in the range table.
    unsafe { item((*query).rtable, (*query).resultRelation as usize - 1).cast() }
}

/// What a query needs on a table in its range table. `None`: nothing.
///
/// # Safety
/// A valid query, and an entry of its range table.
#[cfg_attr(feature = "pg15", allow(unused_variables))]
pub(crate) unsafe fn rights(query: *const pg_sys::Query, entry: *mut pg_sys::RangeTblEntry) -> Option<*mut Rights> {
    #[cfg(feature = "pg15")]
    return Some(entry);
    // SAFETY: the caller's promise; the index counts from 1, and 0 is none.
    #[cfg(not(feature = "pg15"))]
    unsafe {
        let index = ((*entry).perminfoindex as usize).checked_sub(1)?;
        Some(item((*query).rteperminfos, index).cast())
    }
}

/// The rights that a query needs, of each of its tables.
///
/// # Safety
/// A valid query.
pub(crate) unsafe fn all_rights(query: *const pg_sys::Query) -> *mut pg_sys::List {
    // SAFETY: the caller's promise.
    #[cfg(feature = "pg15")]
    return unsafe { (*query).rtable };
    // SAFETY: as above.
    #[cfg(not(feature = "pg15"))]
    unsafe {
        (*query).rteperminfos
    }
}

/// The columns in a set of them. 0 is the whole row; system columns are negative.
///
/// # Safety
/// A valid set, or null, as long as the iterator is used.
pub(crate) unsafe fn columns(set: *const pg_sys::Bitmapset) -> impl Iterator<Item = i16> {
    let mut member = -1;
    std::iter::from_fn(move || {
        // SAFETY: the caller's promise.
        member = unsafe { pg_sys::bms_next_member(set, member) };
        (member >= 0).then_some((member + pg_sys::FirstLowInvalidHeapAttributeNumber) as i16)
    })
}
