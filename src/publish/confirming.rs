//! Whether a row that a statement inserts is still as it was checked, whatever other triggers have done to it.

use crate::publish::destinations::check;
use crate::publish::error::PublishError;
use crate::publish::inserted_row::{is_copy, request_of, row_key};
use crate::publish::request::Request;
use crate::publish::restoring::is_restored_all_the_same;
use crate::server::trigger_call::{When, expect_trigger};
use crate::tables::applied;
use crate::tables::catalog;
use crate::tables::insertion;
use crate::tables::row::Row;
use crate::tables::trusted::{RowKey, is_moving};
use pgrx::pg_sys;
use std::cell::RefCell;

thread_local! {
    /// Rows that `complete_event` has filled in and `confirm_event` has not seen yet.
    static COMPLETED: RefCell<Vec<RowKey>> = const { RefCell::new(Vec::new()) };
}

/// Most rows that wait to be confirmed: one for each statement within a statement, and rows that a trigger has left
/// out.
const MOST_COMPLETED: usize = 64;

crate::sql_function!(confirm_event, pg_finfo_confirm_event);

/// Trigger of `outbox.events`, before each row and after all other triggers. What `complete_event` has filled in must
/// be unchanged, and what others have changed since must still be a valid event.
fn confirm_event(fcinfo: pg_sys::FunctionCallInfo) -> pg_sys::Datum {
    let relations = catalog::expect_relations();
    // SAFETY: called by Postgres; a trigger of this kind has a row.
    unsafe {
        let trigger = expect_trigger(fcinfo, "confirm_event", When::BeforeInsertOfRow, &[relations.events]);
        let triggers = (*trigger.tg_relation).trigdesc;
        let is_new = !applied::puts_back();
        if is_new && insertion::has_other_triggers(triggers, &relations.triggers) {
            let row = Row::of(trigger.tg_trigtuple, (*trigger.tg_relation).rd_att);
            confirm(&row);
        } else {
            COMPLETED.with_borrow_mut(Vec::clear);
        }
        (*fcinfo).isnull = false;
        pg_sys::Datum::from(trigger.tg_trigtuple)
    }
}

/// Notes a row that was checked and filled in.
pub(super) fn note_completed(key: RowKey) {
    COMPLETED.with_borrow_mut(|completed| {
        if completed.len() >= MOST_COMPLETED {
            completed.remove(0);
        }
        completed.push(key);
    });
}

fn confirm(row: &Row) {
    let key = row_key(row);
    let is_completed = COMPLETED.with_borrow_mut(|completed| {
        let place = completed.iter().rposition(|known| *known == key);
        completed.truncate(place.unwrap_or(completed.len()));
        place.is_some()
    });
    if !is_completed {
        PublishError::Changed.raise();
    }
    if is_moving() {
        return;
    }
    match check_as_it_is(row) {
        // The backend's name may come from a dump, or somebody has changed it. The number decides.
        Ok(()) | Err(PublishError::UnknownBackend(_)) => {}
        Err(e) if is_copy() && is_restored_all_the_same(&e) => {}
        Err(e) => e.raise(),
    }
}

/// The checks of an event, for a row as other triggers have left it, with the stream that it already has.
fn check_as_it_is(row: &Row) -> Result<(), PublishError> {
    let request = Request {
        keeps_stream: true,
        ..request_of(row)
    };
    check(&request).map(drop)
}

/// A row of `publish_event` that other triggers may have changed: it must still be a valid event.
pub(super) fn confirm_published(key: RowKey, row: &Row) {
    if row_key(row) != key {
        PublishError::Changed.raise();
    }
    check_as_it_is(row).map_or_else(|e| e.raise(), |()| note_completed(key));
}
