//! Plain INSERT and COPY into `outbox.events`: the trigger that checks a row as `publish_event` does, and fills in what is ours.

use crate::catalog;
use crate::error::{PublishError, raise};
use crate::outbox;
use crate::publish::{draw_numbers, refuse_repeated_id, text_datum};
use crate::request::{Checked, Request, check};
use crate::rows::{Row, attribute, bytes_of, to_server, utf8_of};
use crate::txn;
use crate::uuid;
use pgrx::pg_sys::panic::ErrorReport;
use pgrx::{PgSqlErrorCode, pg_guard, pg_sys};
use std::borrow::Cow;
use std::cell::{Cell, RefCell};
use std::collections::BTreeSet;

thread_local! {
    /// The worker is moving events that were checked when they were scheduled.
    static MOVING: Cell<bool> = const { Cell::new(false) };
    /// Backends, with the subtransactions that have noted a restore for them, in the transaction of this id.
    static RESTORED: RefCell<(u64, BTreeSet<(u32, i32)>)> = const { RefCell::new((0, BTreeSet::new())) };
}

/// Runs `f` while the trigger takes rows as they are, but for their numbers: they were checked when they were scheduled.
pub fn moving<R>(f: impl FnOnce() -> R) -> R {
    struct Reset;
    impl Drop for Reset {
        fn drop(&mut self) {
            MOVING.set(false);
        }
    }
    MOVING.set(true);
    let _reset = Reset;
    f()
}

crate::sql_function!(complete_event, pg_finfo_complete_event);

/// Trigger of `outbox.events`, before each row.
#[pg_guard]
#[unsafe(no_mangle)]
extern "C-unwind" fn complete_event(fcinfo: pg_sys::FunctionCallInfo) -> pg_sys::Datum {
    // SAFETY: called as a trigger, the context is its TriggerData; otherwise this refuses.
    unsafe {
        let trigger = (*fcinfo).context.cast::<pg_sys::TriggerData>();
        if trigger.is_null() || (*trigger).type_ != pg_sys::NodeTag::T_TriggerData {
            raise(ErrorReport::new(
                PgSqlErrorCode::ERRCODE_E_R_I_E_TRIGGER_PROTOCOL_VIOLATED,
                "complete_event() can only be called as a trigger",
                "",
            ));
        }
        // A row of another table has other columns.
        if (*(*trigger).tg_relation).rd_id != catalog::expect_relations().events {
            raise(ErrorReport::new(
                PgSqlErrorCode::ERRCODE_E_R_I_E_TRIGGER_PROTOCOL_VIOLATED,
                "complete_event() can only be the trigger of outbox.events",
                "",
            ));
        }
        (*fcinfo).isnull = false;
        pg_sys::Datum::from(completed((*trigger).tg_trigtuple, (*(*trigger).tg_relation).rd_att))
    }
}

/// The row with what the trigger fills in.
///
/// # Safety
/// A row of `outbox.events` and its descriptor.
unsafe fn completed(tuple: pg_sys::HeapTuple, descriptor: pg_sys::TupleDesc) -> pg_sys::HeapTuple {
    // SAFETY: the caller's promise.
    let row = unsafe { Row::of(tuple, descriptor) };
    let relations = catalog::expect_relations();
    let mut columns: [i32; 6] = [0; 6];
    let mut values = [pg_sys::Datum::from(0); 6];
    let mut count = 0;
    let mut set = |attribute: usize, datum: pg_sys::Datum| {
        columns[count] = attribute as i32;
        values[count] = datum;
        count += 1;
    };
    // SAFETY: reads the clock.
    let now = unsafe { pg_sys::GetCurrentTimestamp() };
    let event_id = row.uuid(attribute::EVENT_ID).unwrap_or_else(|| uuid::new_v7(now));
    let mut restored_for = None;
    if !MOVING.get() {
        // SAFETY: the attributes are of varlena types.
        let text = |attribute: usize| row.get(attribute).map(|d| unsafe { Cow::Borrowed(bytes_of(d)) });
        let request = Request {
            event_type: text(attribute::EVENT_TYPE),
            source: text(attribute::SOURCE),
            data: text(attribute::DATA),
            subject: text(attribute::SUBJECT),
            backend: text(attribute::BACKEND),
            scheduled_at: None,
            max_retries: row.i32(attribute::MAX_RETRIES),
            publisher_config: text(attribute::PUBLISHER_CONFIG),
            stream: text(attribute::STREAM),
            data_schema: text(attribute::DATA_SCHEMA),
            event_id: row.uuid(attribute::EVENT_ID),
        };
        let checked = check_restorable(&request, &row);
        if request.event_id.is_some() {
            refuse_repeated_id(&relations, &event_id, false);
        }
        // A transaction id is given by nobody but a dump; or by the publisher of a replica, each time.
        // SAFETY: a plain read.
        if row.get(attribute::XID).is_some() && !unsafe { pg_sys::IsLogicalWorker() } {
            restored_for = Some(checked.backend_number);
        }
        set(attribute::BACKEND_NUMBER, pg_sys::Datum::from(checked.backend_number));
        set(attribute::BACKEND, text_datum(&to_server(&checked.backend)));
        if row
            .i64(attribute::CREATED_AT)
            .is_none_or(|at| at == i64::MIN || at == i64::MAX)
        {
            set(attribute::CREATED_AT, pg_sys::Datum::from(now));
        }
        set(attribute::EVENT_ID, pg_sys::Datum::from(event_id.as_ptr()));
    }
    let (xid, seq) = draw_numbers(&relations);
    if let Some(number) = restored_for {
        note_restore(number, xid);
    }
    set(attribute::XID, pg_sys::Datum::from(xid));
    set(attribute::SEQ, pg_sys::Datum::from(seq));
    let mut nulls = [false; 6];
    txn::published();
    // SAFETY: `count` columns of the table with values of their types; the new tuple lives in the caller's context.
    unsafe {
        pg_sys::heap_modify_tuple_by_cols(
            tuple,
            descriptor,
            count as i32,
            columns.as_mut_ptr(),
            values.as_mut_ptr(),
            nulls.as_mut_ptr(),
        )
    }
}

/// Some of a dump's events may have been sent since it was taken: the worker is to look for them first. Once in a transaction, and
/// again in a subtransaction, since the other may be rolled back alone.
fn note_restore(number: i32, xid: u64) {
    // SAFETY: a plain read.
    let key = (unsafe { pg_sys::GetCurrentSubTransactionId() }, number);
    let is_noted = RESTORED.with_borrow_mut(|(of, noted)| {
        if *of != xid {
            (*of, *noted) = (xid, BTreeSet::new());
        }
        noted.contains(&key)
    });
    if !is_noted {
        outbox::note_restore(number, xid);
        RESTORED.with_borrow_mut(|(_, noted)| noted.insert(key));
    }
}

/// As [`check`]; but a dump's rows carry a backend's number, and may come before the backend itself, or under a name that it
/// no longer has: COPY alone can give a number, and then the number is what counts.
fn check_restorable(request: &Request<'_>, row: &Row) -> Checked {
    let number = row.i32(attribute::BACKEND_NUMBER);
    match (check(request), number) {
        (Ok(checked), None) => checked,
        (Ok(checked), Some(number)) if checked.backend_number == number => checked,
        (Ok(_) | Err(PublishError::UnknownBackend(_)), Some(number)) if is_copy() => {
            // SAFETY: a text of the row, if it is there.
            let backend = row.get(attribute::BACKEND).map(|d| unsafe { utf8_of(d).into_owned() });
            Checked {
                backend: backend.unwrap_or_default(),
                backend_number: number,
            }
        }
        (Ok(checked), Some(_)) => checked,
        (Err(e), _) => e.raise(),
    }
}

/// Whether the session runs a COPY, as a restore does.
fn is_copy() -> bool {
    // SAFETY: the active portal of the session, if any, while it runs.
    unsafe {
        let portal = pg_sys::ActivePortal;
        !portal.is_null() && (*portal).commandTag == pg_sys::CommandTag::CMDTAG_COPY
    }
}
