//! `outbox.published_here()`: what the transaction has published with rights of the caller. It reads the tables with
//! their owner's rights.

use crate::server::error::{expect_arguments, internal};
use crate::tables::{catalog, lent_numbers, rights};
use pgrx::pg_sys;
use std::cell::Cell;
use std::ffi::CStr;

/// The columns that are shown, and two more.
const EVENTS: &CStr = c"select p.event_id, p.event_type, p.source, p.subject, coalesce(b.name, p.backend),
        coalesce(p.stream, b.own_stream, (select outbox.common_stream())), p.data::jsonb, p.seq, p.published_by
    from (
            select e.seq, e.event_id, e.event_type, e.source, e.subject, e.backend_number, e.backend, e.stream, e.data, e.published_by
            from outbox.events e where e.xid = pg_current_xact_id_if_assigned()
            union all
            select s.seq, s.event_id, s.event_type, s.source, s.subject, s.backend_number, s.backend, s.stream, s.data, s.published_by
            from outbox.scheduled_events s where s.xid = pg_current_xact_id_if_assigned()
        ) p
        left join outbox.backends b on b.number = p.backend_number
    order by p.seq";
/// Types of the columns that are shown.
const SHOWN: [pg_sys::Oid; 7] = [
    pg_sys::UUIDOID,
    pg_sys::TEXTOID,
    pg_sys::TEXTOID,
    pg_sys::TEXTOID,
    pg_sys::TEXTOID,
    pg_sys::TEXTOID,
    pg_sys::JSONBOID,
];
const SEQ: usize = SHOWN.len();
const PUBLISHED_BY: usize = SHOWN.len() + 1;
/// How many rows are in memory at once.
const PIECE: std::ffi::c_long = 1_000;

crate::sql_function!(published_here, pg_finfo_published_here);

/// `outbox.published_here()`
fn published_here(fcinfo: pg_sys::FunctionCallInfo) -> pg_sys::Datum {
    expect_arguments(fcinfo, 0);
    let reader = Reader::caller();
    // SAFETY: called by Postgres, in a transaction.
    unsafe {
        #[cfg(feature = "pg15")]
        pg_sys::SetSingleFuncCall(fcinfo, 0);
        #[cfg(not(feature = "pg15"))]
        pg_sys::InitMaterializedSRF(fcinfo, 0);
        let results = (*fcinfo).resultinfo.cast::<pg_sys::ReturnSetInfo>();
        expect_columns((*results).setDesc);
        rights::of_owner(|| rights::reading(|| show(&reader, results)));
        (*fcinfo).isnull = true;
    }
    pg_sys::Datum::from(0)
}

/// Who asks: the role with whose rights the function was called.
struct Reader {
    role: pg_sys::Oid,
    may_read_all: bool,
    xid: u64,
    /// The role of the last event, and whether the reader has its rights.
    last: Cell<Option<(pg_sys::Oid, bool)>>,
}

impl Reader {
    fn caller() -> Self {
        let table = catalog::expect_relations().events;
        // SAFETY: look-ups within a transaction.
        unsafe {
            let role = pg_sys::GetUserId();
            let select = pg_sys::ACL_SELECT as pg_sys::AclMode;
            let has_right = pg_sys::pg_class_aclcheck(table, role, select) == pg_sys::AclResult::ACLCHECK_OK;
            let is_free =
                || pg_sys::check_enable_rls(table, role, true) != pg_sys::CheckEnableRlsResult::RLS_ENABLED as i32;
            Self {
                role,
                may_read_all: has_right && is_free(),
                xid: pg_sys::GetTopFullTransactionIdIfAny().value,
                last: Cell::new(None),
            }
        }
    }

    /// Whether an event is shown. `publisher`: the role that its row names.
    fn sees(&self, seq: i64, publisher: Option<pg_sys::Oid>) -> bool {
        self.may_read_all
            || lent_numbers::role_of(self.xid, seq)
                .or(publisher)
                .is_some_and(|role| self.has_rights_of(role))
    }

    fn has_rights_of(&self, role: pg_sys::Oid) -> bool {
        if let Some((_, has)) = self.last.get().filter(|(last, _)| *last == role) {
            return has;
        }
        // SAFETY: a look-up within a transaction.
        let has = unsafe { pg_sys::has_privs_of_role(self.role, role) };
        self.last.set(Some((role, has)));
        has
    }
}

/// Raises an ERROR unless the function is declared with the columns that are shown.
///
/// # Safety
/// A valid descriptor.
unsafe fn expect_columns(descriptor: pg_sys::TupleDesc) {
    // SAFETY: the caller's promise; columns are counted from 1.
    let are_ours = unsafe {
        (*descriptor).natts as usize == SHOWN.len()
            && (1..)
                .zip(SHOWN)
                .all(|(column, kind)| pg_sys::SPI_gettypeid(descriptor, column) == kind)
    };
    if !are_ours {
        internal("published_here is declared with other columns");
    }
}

/// Adds the rows that the reader sees to the results.
///
/// # Safety
/// A place for results with these columns, in a transaction.
unsafe fn show(reader: &Reader, results: *mut pg_sys::ReturnSetInfo) {
    let mut values = [pg_sys::Datum::from(0); SHOWN.len() + 2];
    let mut nulls = [true; SHOWN.len() + 2];
    // SAFETY: the caller's promise. What is opened is closed below, or by the abort after an ERROR. The arrays are as
    // long as the query's rows.
    unsafe {
        pg_sys::SPI_connect();
        // Not read-only: it sees what the transaction has published so far, in this statement too.
        let cursor = pg_sys::SPI_cursor_open_with_args(
            std::ptr::null(),
            EVENTS.as_ptr(),
            0,
            std::ptr::null_mut(),
            std::ptr::null_mut(),
            std::ptr::null(),
            false,
            0,
        );
        loop {
            pg_sys::SPI_cursor_fetch(cursor, true, PIECE);
            let (found, rows) = (pg_sys::SPI_tuptable, pg_sys::SPI_processed as usize);
            for index in 0..rows {
                let row = *(*found).vals.add(index);
                pg_sys::heap_deform_tuple(row, (*found).tupdesc, values.as_mut_ptr(), nulls.as_mut_ptr());
                let publisher = (!nulls[PUBLISHED_BY]).then(|| pg_sys::Oid::from(values[PUBLISHED_BY].value() as u32));
                if reader.sees(values[SEQ].value() as i64, publisher) {
                    let (store, columns) = ((*results).setResult, (*results).setDesc);
                    pg_sys::tuplestore_putvalues(store, columns, values.as_mut_ptr(), nulls.as_mut_ptr());
                }
            }
            pg_sys::SPI_freetuptable(found);
            if rows == 0 {
                break;
            }
        }
        pg_sys::SPI_cursor_close(cursor);
        pg_sys::SPI_finish();
    }
}
