//! How our SQL runs: reading and writing through SPI, arguments and values.

use crate::server::datum::text_datum;
use crate::server::datum::utf8_of;
use crate::server::encoding;
use crate::server::error::internal;
use crate::tables::rights;
use crate::tables::row::texts_of_array;
use pgrx::datum::DatumWithOid;
use pgrx::pg_sys::{self, PgOid};
use pgrx::spi::{Spi, SpiTupleTable};
use std::borrow::Cow;

/// Reads what is committed now. Takes no transaction id, as SPI's `update` would: looking writes no WAL, and works on a standby.
pub fn query<R>(sql: &str, args: &[DatumWithOid<'_>], each: impl FnMut(&SpiTupleTable<'_>) -> R) -> Vec<R> {
    // SAFETY: within a transaction; popped below, or by its abort. A transaction without an id reads with the active
    // snapshot, which may be older than the invalidations that were taken in.
    unsafe { pg_sys::PushActiveSnapshot(pg_sys::GetLatestSnapshot()) };
    let found = rights::statement(|| {
        Spi::connect(|client| {
            let statement = client.prepare(sql, &types_of(args));
            let statement = statement.unwrap_or_else(|e| internal(e.to_string()));
            let table = rights::execution(|| client.select(&statement, None, args));
            read_all(table.unwrap_or_else(|e| internal(e.to_string())), each)
        })
    });
    // SAFETY: the snapshot pushed above is the active one again.
    unsafe { pg_sys::PopActiveSnapshot() };
    found
}

pub(super) fn read_all<R>(mut table: SpiTupleTable<'_>, mut each: impl FnMut(&SpiTupleTable<'_>) -> R) -> Vec<R> {
    let mut found = Vec::with_capacity(table.len());
    if !table.is_empty() {
        table = table.first();
        for _ in 0..table.len() {
            found.push(each(&table));
            table.next();
        }
    }
    found
}

/// Writes; returns how many rows.
pub fn run(sql: &str, args: &[DatumWithOid<'_>]) -> u64 {
    rights::statement(|| {
        Spi::connect_mut(|client| {
            let statement = client.prepare_mut(sql, &types_of(args));
            let statement = statement.unwrap_or_else(|e| internal(e.to_string()));
            let table = rights::execution(|| client.update(&statement, None, args));
            table.unwrap_or_else(|e| internal(e.to_string())).len() as u64
        })
    })
}

pub(super) fn types_of(args: &[DatumWithOid<'_>]) -> Vec<PgOid> {
    args.iter().map(|a| PgOid::from(a.oid())).collect()
}

/// A value of the current row; a value of another type than expected is an internal error.
pub fn value<T: pgrx::IntoDatum + pgrx::FromDatum>(row: &SpiTupleTable<'_>, ordinal: usize) -> Option<T> {
    row.get(ordinal).unwrap_or_else(|e| internal(e.to_string()))
}

/// A text of the current row, in UTF-8 whatever the database's encoding.
pub fn text(row: &SpiTupleTable<'_>, ordinal: usize) -> Option<String> {
    let datum = row
        .get_datum_by_ordinal(ordinal)
        .unwrap_or_else(|e| internal(e.to_string()));
    // SAFETY: a column of type text, in a row that is there.
    datum.map(|d| unsafe { utf8_of(d).into_owned() })
}

/// An array of texts of the current row, likewise.
pub(super) fn texts(row: &SpiTupleTable<'_>, ordinal: usize) -> Vec<String> {
    let datum = row
        .get_datum_by_ordinal(ordinal)
        .unwrap_or_else(|e| internal(e.to_string()));
    // SAFETY: a column of type text[], in a row that is there.
    datum.map_or_else(Vec::new, |d| unsafe { texts_of_array(d) })
}

/// A text as an argument, in the database's encoding; one that came from there fits.
pub fn argument<'a>(text: &str) -> DatumWithOid<'a> {
    // SAFETY: to_server() gives valid text, which is copied; text has the form of bytea.
    unsafe { DatumWithOid::new(&*encoding::to_server(text), pg_sys::TEXTOID) }
}

/// Several texts as one argument, an array; as [`argument`].
pub fn arguments<'a>(texts: &[&str]) -> DatumWithOid<'a> {
    array_of(texts.iter().map(|text| encoding::to_server(text)))
}

pub(super) fn array_of<'a, 'b>(texts: impl Iterator<Item = Cow<'b, [u8]>>) -> DatumWithOid<'a> {
    let mut datums: Vec<_> = texts.map(|text| text_datum(&text)).collect();
    // SAFETY: an array of texts of the current memory context, which lives as long as the transaction.
    unsafe {
        let array = pg_sys::construct_array(
            datums.as_mut_ptr(),
            datums.len() as i32,
            pg_sys::TEXTOID,
            -1,
            false,
            pg_sys::TYPALIGN_INT as _,
        );
        DatumWithOid::new(pg_sys::Datum::from(array), pg_sys::TEXTARRAYOID)
    }
}

/// As [`argument`], for words of Redis or of the system: what the database's encoding may not have is left out.
pub fn words<'a>(text: &str) -> DatumWithOid<'a> {
    // SAFETY: valid text, which is copied; text has the form of bytea.
    unsafe { DatumWithOid::new(&*encoding::words_to_server(text), pg_sys::TEXTOID) }
}

/// Several of them as one argument, an array.
pub fn all_words<'a>(texts: &[&str]) -> DatumWithOid<'a> {
    array_of(texts.iter().map(|text| encoding::words_to_server(text)))
}

pub(super) fn uuids<'a>(ids: &[[u8; 16]]) -> DatumWithOid<'a> {
    let ids: Vec<pgrx::Uuid> = ids.iter().map(|id| pgrx::Uuid::from_bytes(*id)).collect();
    ids.into()
}

pub(super) fn timestamp<'a>(us: i64) -> DatumWithOid<'a> {
    // SAFETY: a timestamptz is passed by value, as microseconds since 2000.
    unsafe { DatumWithOid::new(pg_sys::Datum::from(us), pg_sys::TIMESTAMPTZOID) }
}
