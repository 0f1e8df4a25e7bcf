//! Rows from a dump.

use crate::publish::destinations::{Destination, Destinations, check};
use crate::publish::error::PublishError;
use crate::publish::inserted_row::is_copy;
use crate::publish::request::Request;
use crate::server::datum::bytes_of;
use crate::server::encoding::{has_utf8_form, utf8};
use crate::tables::restores;
use crate::tables::row::{Row, attribute};
use crate::tables::trusted::subtransaction;
use std::cell::RefCell;
use std::collections::BTreeSet;

thread_local! {
    /// The backends for which the transaction with this id has noted a restore, with the subtransaction that noted it.
    static RESTORED: RefCell<(u64, BTreeSet<(u32, i32)>)> = const { RefCell::new((0, BTreeSet::new())) };
}

/// The transaction id of a scheduled event that was overdue when a dump brought it: recovery looks for it before it is
/// sent.
pub(super) const RESTORED_OVERDUE: u64 = 0;

/// Notes that some of a dump's events may have been sent since it was taken, so that the worker looks for them first.
/// This is noted once in a transaction, and again in each subtransaction, because an earlier one may be rolled back
/// alone.
pub(super) fn note_restore(number: i32, xid: u64) {
    let key = (subtransaction(), number);
    let is_noted = RESTORED.with_borrow_mut(|(of, noted)| {
        if *of != xid {
            (*of, *noted) = (xid, BTreeSet::new());
        }
        noted.contains(&key)
    });
    if !is_noted {
        restores::note_restore(number, xid);
        RESTORED.with_borrow_mut(|(_, noted)| noted.insert(key));
    }
}

/// As [`check`], but for rows from a dump. They carry a backend's number, and may come before the backend itself or
/// under a name that it no longer has. Only COPY can give a number, and then the number decides.
pub(super) fn check_restorable(request: &Request<'_>, row: &Row) -> Destinations {
    let number = row.i32(attribute::BACKEND_NUMBER);
    match (check(request), number) {
        (Ok(checked), None) => checked,
        (Ok(checked), Some(number)) if checked.first.backend_number == number => checked,
        // An event that cannot be sent was accepted by an earlier version. It must fail when its turn comes, and must
        // not stop the restore of all others.
        (Ok(_) | Err(PublishError::UnknownBackend(_) | PublishError::NoUtf8Form { .. }), Some(number)) if is_copy() => {
            // SAFETY: a text of the row, if it is there.
            let name = row.get(attribute::BACKEND).map(|d| unsafe { bytes_of(d) });
            let name = name.filter(|name| has_utf8_form(name).is_ok());
            // SAFETY: a text of the row.
            let backend = name.map(|name| unsafe { utf8(name) }.into_owned());
            Destinations {
                first: Destination {
                    backend: backend.unwrap_or_default(),
                    backend_number: number,
                    stream: None,
                },
                further: Vec::new(),
            }
        }
        (Ok(checked), Some(_)) => checked,
        (Err(e), _) => e.raise(),
    }
}
