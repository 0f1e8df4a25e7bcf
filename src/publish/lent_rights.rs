//! Whose right to publish counts. Postgres checks rights when a statement begins, and the limits of a publisher are
//! checked for each event. In between, the user may be another one:
//!
//! - A view or a rule lends the right of its owner to whoever uses it. A publisher whose events are limited cannot lend
//!   its right in this way, because the limits would not hold. A function with SECURITY DEFINER can, because it runs as
//!   its owner. What is published so is shown by `outbox.published_here()` to members of the lender only.
//! - An expression of the statement may change the role, or a cursor may be read on after SET ROLE.

use crate::publish::refused_rights::INSERT;
use crate::server::error::raise;
use crate::server::query_tree::{Rights, item, length};
use crate::server::report;
use crate::tables::catalog::{self, has_our_name};
use crate::tables::{lent_numbers, publisher_limits};
use pgrx::pg_sys::panic::ErrorReport;
use pgrx::{PgSqlErrorCode, pg_sys};
use std::ffi::CStr;

/// Whether no table of a statement lends more than its lender may do. Notes who begins to publish.
///
/// # Safety
/// A list of the rights that a statement needs, within a transaction, in a frame that holds nothing.
pub(crate) unsafe fn lends_no_more(rights: *mut pg_sys::List, raises: bool) -> bool {
    // SAFETY: the caller's promise.
    unsafe {
        for index in 0..length(rights) {
            let needed = item(rights, index).cast::<Rights>();
            if (*needed).requiredPerms & INSERT == 0 || !has_our_name((*needed).relid, c"events") {
                continue;
            }
            let lender = (*needed).checkAsUser;
            let is_lent = lender != pg_sys::InvalidOid && lender != pg_sys::GetUserId();
            if report::guard(|| may_begin(is_lent.then_some(lender))) {
                continue;
            }
            if raises {
                report::guard::<()>(|| refuse(lender));
            }
            return false;
        }
    }
    true
}

fn may_begin(lender: Option<pg_sys::Oid>) -> bool {
    // SAFETY: within a transaction. The limits may have changed since.
    unsafe { pg_sys::AcceptInvalidationMessages() };
    if catalog::relations().is_none() {
        return true;
    }
    match lender {
        Some(lender) => {
            let may = !publisher_limits::is_limited(lender);
            if may {
                lent_numbers::note_lender(lender);
            }
            may
        }
        None => {
            publisher_limits::note_insert();
            true
        }
    }
}

/// Raises an ERROR if the user who calls a function to publish has no right to: it had another role when that was
/// checked. Only if some publishers have limits: all others may do the same as anybody who has the right.
pub(super) fn expect_own_right() {
    if publisher_limits::is_rightless() {
        raise(
            ErrorReport::new(
                PgSqlErrorCode::ERRCODE_INSUFFICIENT_PRIVILEGE,
                "permission denied to publish",
                "",
            )
            .set_detail("The role was changed after the statement began, and the present one may not publish.")
            .set_hint("Change the role before the statement, and close cursors before that."),
        );
    }
}

fn refuse(lender: pg_sys::Oid) -> ! {
    // SAFETY: a look-up within a transaction; the name lives as long as its memory.
    let name = unsafe { CStr::from_ptr(pg_sys::GetUserNameFromId(lender, false)) };
    raise(
        ErrorReport::new(
            PgSqlErrorCode::ERRCODE_INSUFFICIENT_PRIVILEGE,
            format!(
                "permission denied to publish through a view or rule of \"{}\"",
                name.to_string_lossy()
            ),
            "",
        )
        .set_detail(
            "That role may publish only to some backends and streams, and would lend its right without these limits.",
        )
        .set_hint("Let it make a function with SECURITY DEFINER instead: limits hold there."),
    )
}
