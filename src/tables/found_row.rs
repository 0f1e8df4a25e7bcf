//! A row that a query has found. Its columns are read by name, so adding a column to a statement or moving one does not
//! affect the others.

use crate::server::datum::utf8_of;
use crate::server::error::internal;
use crate::tables::row::texts_of_array;
use pgrx::pg_sys;
use pgrx::spi::SpiTupleTable;
use std::cell::{Cell, RefCell};

/// The current row of a query's result.
pub(crate) struct FoundRow<'a> {
    table: SpiTupleTable<'a>,
    /// Columns that were read before, with their ordinals. A name is looked up only for the first row.
    columns: RefCell<Vec<(&'static str, usize)>>,
    /// The index in `columns` where the next column is expected: each row is read in the same order.
    next: Cell<usize>,
}

impl<'a> FoundRow<'a> {
    /// Calls `each` for each row of a result.
    pub(super) fn for_all<R>(table: SpiTupleTable<'a>, mut each: impl FnMut(&FoundRow<'a>) -> R) -> Vec<R> {
        let count = table.len();
        let mut found = Vec::with_capacity(count);
        let mut row = FoundRow {
            table: table.first(),
            columns: RefCell::default(),
            next: Cell::new(0),
        };
        for _ in 0..count {
            row.next.set(0);
            found.push(each(&row));
            row.table.next();
        }
        found
    }

    fn ordinal(&self, name: &'static str) -> usize {
        let mut columns = self.columns.borrow_mut();
        let expected = self.next.get();
        // Compared by address, because names are literals. A name that occurs twice in the source is looked up twice.
        let is_it = |(known, _): &(&'static str, usize)| std::ptr::eq(*known, name);
        let index = match columns.get(expected).is_some_and(is_it) {
            true => expected,
            false => columns.iter().position(is_it).unwrap_or_else(|| {
                let ordinal = self.table.column_ordinal(name);
                let ordinal = ordinal.unwrap_or_else(|_| internal(format!("a query has no column \"{name}\"")));
                columns.push((name, ordinal));
                columns.len() - 1
            }),
        };
        self.next.set(index + 1);
        columns[index].1
    }

    /// The value of a column. Another type than expected is an internal error.
    pub(crate) fn value<T: pgrx::IntoDatum + pgrx::FromDatum>(&self, column: &'static str) -> Option<T> {
        let value = self.table.get(self.ordinal(column));
        value.unwrap_or_else(|e| internal(format!("column \"{column}\": {e}")))
    }

    /// The value of the only column.
    pub(super) fn only_value<T: pgrx::IntoDatum + pgrx::FromDatum>(&self) -> Option<T> {
        self.table.get(1).unwrap_or_else(|e| internal(e.to_string()))
    }

    pub(super) fn datum(&self, column: &'static str) -> Option<pg_sys::Datum> {
        let datum = self.table.get_datum_by_ordinal(self.ordinal(column));
        datum.unwrap_or_else(|e| internal(e.to_string()))
    }

    /// A text in UTF-8, whatever the database's encoding.
    pub(crate) fn text(&self, column: &'static str) -> Option<String> {
        // SAFETY: a column of type text, in a row that is there.
        self.datum(column).map(|d| unsafe { utf8_of(d).into_owned() })
    }

    /// An array of texts in UTF-8.
    pub(crate) fn texts(&self, column: &'static str) -> Option<Vec<String>> {
        // SAFETY: a column of type text[], in a row that is there.
        self.datum(column).map(|d| unsafe { texts_of_array(d) })
    }
}
