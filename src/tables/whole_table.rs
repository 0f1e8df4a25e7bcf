//! Reads small tables completely and without SQL, because publishers may have no rights on them.

use crate::server::datum::bytes_of;
use crate::server::error;
use crate::tables::row::Row;
use pgrx::pg_sys::panic::ErrorReport;
use pgrx::{PgSqlErrorCode, pg_sys};
use std::borrow::Cow;

/// Bytes that the texts of a backend may have together, by the CHECK of outbox.backends.
const LONGEST: usize = 65_536;
const LOCK: pg_sys::LOCKMODE = pg_sys::AccessShareLock as pg_sys::LOCKMODE;

/// Calls `f` with some columns of each row of a table, as of now and not as of the transaction's snapshot.
pub(crate) fn each_row(table: pg_sys::Oid, names: &[&str], mut f: impl FnMut(&NamedRow<'_>)) {
    // SAFETY: a heap scan under a registered snapshot; what is opened is closed, or released by the transaction's
    // abort. table_open locks the table, which stays open while its descriptor is used.
    unsafe {
        let table = pg_sys::table_open(table, LOCK);
        let columns = Columns::of(table, names);
        let snapshot = pg_sys::RegisterSnapshot(pg_sys::GetLatestSnapshot());
        let scan = pg_sys::systable_beginscan(table, pg_sys::InvalidOid, false, snapshot, 0, std::ptr::null_mut());
        loop {
            let tuple = pg_sys::systable_getnext(scan);
            if tuple.is_null() {
                break;
            }
            f(&columns.take_apart(tuple));
        }
        pg_sys::systable_endscan(scan);
        pg_sys::UnregisterSnapshot(snapshot);
        pg_sys::table_close(table, LOCK);
    }
}

/// Some columns of a table that is read whole, by their names.
pub(crate) struct Columns<'n> {
    descriptor: pg_sys::TupleDesc,
    attributes: Vec<(&'n str, usize)>,
}

/// The values of some named columns.
pub(crate) struct NamedRow<'a> {
    columns: &'a Columns<'a>,
    row: Row,
}

impl<'n> Columns<'n> {
    /// # Safety
    /// `relation` is open, and stays so.
    pub(crate) unsafe fn of(relation: pg_sys::Relation, names: &[&'n str]) -> Self {
        // SAFETY: an open relation has a descriptor; attribute names are zero-terminated.
        unsafe {
            let descriptor = (*relation).rd_att;
            let attribute = |name: &'n str| {
                let text = std::ffi::CString::new(name).unwrap_or_default();
                (name, pg_sys::get_attnum((*relation).rd_id, text.as_ptr()) as usize)
            };
            let attributes = names.iter().copied().map(attribute).collect();
            Self { descriptor, attributes }
        }
    }

    /// # Safety
    /// As [`Row::of`].
    pub(crate) unsafe fn take_apart(&self, tuple: pg_sys::HeapTuple) -> NamedRow<'_> {
        // SAFETY: the caller's promise.
        let row = unsafe { Row::of(tuple, self.descriptor) };
        NamedRow { columns: self, row }
    }
}

impl NamedRow<'_> {
    pub(crate) fn datum(&self, column: &str) -> Option<pg_sys::Datum> {
        self.row.get(self.attribute(column))
    }

    pub(crate) fn text(&self, column: &str) -> Option<String> {
        self.row.text(self.attribute(column)).map(Cow::into_owned)
    }

    pub(crate) fn bool(&self, column: &str) -> Option<bool> {
        self.datum(column).map(|datum| datum.value() as u8 != 0)
    }

    pub(crate) fn i32(&self, column: &str) -> Option<i32> {
        self.row.i32(self.attribute(column))
    }

    /// Raises an ERROR for a text that no option has, before it is copied: where Rust gets no memory, it ends the
    /// process. All columns are texts.
    pub(crate) fn expect_short(&self) {
        for (name, number) in &self.columns.attributes {
            // SAFETY: a text of the row.
            let size = self.row.get(*number).map_or(0, |text| unsafe { bytes_of(text) }.len());
            if size > LONGEST {
                error::raise(
                    ErrorReport::new(
                        PgSqlErrorCode::ERRCODE_PROGRAM_LIMIT_EXCEEDED,
                        format!("{name} is too long"),
                        "",
                    )
                    .set_detail(format!("It has {size} bytes; at most {LONGEST} are allowed.")),
                );
            }
        }
    }

    /// The values of all these columns that are not null.
    pub(crate) fn values(&self) -> impl Iterator<Item = pg_sys::Datum> {
        self.columns
            .attributes
            .iter()
            .filter_map(|(_, number)| self.row.get(*number))
    }

    fn attribute(&self, column: &str) -> usize {
        let found = self.columns.attributes.iter().find(|(name, _)| *name == column);
        match found {
            Some((_, number)) => *number,
            None => error::internal(format!("column \"{column}\" is not among those that are read")),
        }
    }
}
