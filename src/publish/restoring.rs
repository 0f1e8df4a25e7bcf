//! Rows from a dump.

use crate::publish::destinations::{Destination, Destinations, check};
use crate::publish::error::PublishError;
use crate::publish::inserted_row::is_copy;
use crate::publish::request::Request;
use crate::server::datum::bytes_of;
use crate::server::encoding::{has_utf8_form, utf8};
use crate::tables::catalog;
use crate::tables::restores;
use crate::tables::row::{Row, attribute};
use crate::tables::trusted::subtransaction;
use pgrx::pg_sys;
use relay::event::ConfigError;
use relay::event::stream_name::RESERVED;
use std::borrow::Cow;
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
/// under a name that it no longer has. Then the number decides, if whoever restores has the rights of the table's
/// owner. All others may only go where the name leads. `is_dumped`: the row has the transaction id of another server.
pub(super) fn check_restorable(request: &Request<'_>, row: &Row, is_dumped: bool) -> Destinations {
    let Some(number) = row.i32(attribute::BACKEND_NUMBER) else {
        return check(request).unwrap_or_else(|e| e.raise());
    };
    match check(request) {
        Ok(checked) if checked.first.backend_number == number => checked,
        Ok(_) if is_copy() && may_restore() => as_dumped(row, number),
        Ok(checked) => checked,
        Err(e) if (is_copy() || is_dumped) && is_restored_all_the_same(&e) => as_dumped(row, number),
        Err(e) => e.raise(),
    }
}

/// Whether an event of a dump is restored although it would be refused now. It was accepted when it was published, and
/// would be sent where it was: `allowed_streams`, the backend's format or the limit of the size have changed since, or
/// an earlier version has accepted it. It must not stop the restore of all others. If it cannot be sent, it fails when
/// its turn comes.
pub(super) fn is_restored_all_the_same(error: &PublishError) -> bool {
    let may_have_been_accepted = match error {
        // No version has accepted it.
        PublishError::StreamNotAllowed { stream, .. } => !stream.starts_with(RESERVED),
        PublishError::UnknownBackend(_)
        | PublishError::NoUtf8Form { .. }
        | PublishError::TooLarge { .. }
        | PublishError::Config(ConfigError::BuiltIn(_)) => true,
        _ => false,
    };
    may_have_been_accepted && may_restore()
}

/// Whether the current user has the rights of the table's owner, as superusers have.
fn may_restore() -> bool {
    let owner = catalog::owner_of(catalog::expect_relations().events);
    // SAFETY: look-ups within a transaction.
    unsafe { pg_sys::has_privs_of_role(pg_sys::GetUserId(), owner) }
}

/// The destination that a row names, unchecked.
fn as_dumped(row: &Row, number: i32) -> Destinations {
    // SAFETY: texts of the row, if they are there.
    let text = |column| row.get(column).map(|d| unsafe { bytes_of(d) });
    let readable = |column| text(column).filter(|text| has_utf8_form(text).is_ok());
    // SAFETY: as above; they can be converted.
    let [backend, stream] =
        [attribute::BACKEND, attribute::STREAM].map(|column| readable(column).map(|text| unsafe { utf8(text) }));
    let backend = backend.map(Cow::into_owned).unwrap_or_default();
    if let Some(stream) = stream.filter(|stream| stream.starts_with(RESERVED)) {
        let stream = stream.into_owned();
        PublishError::StreamNotAllowed { backend, stream }.raise();
    }
    Destinations {
        first: Destination {
            backend,
            backend_number: number,
            stream: None,
        },
        further: Vec::new(),
    }
}
