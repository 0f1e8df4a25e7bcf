//! Runs our SQL through SPI and passes parameters. Results are read by the names of their columns ([`FoundRow`]).

use crate::server::datum::text_datum;
use crate::server::encoding;
use crate::server::error::internal;
use crate::tables::found_row::FoundRow;
use crate::tables::rights;
use pgrx::datum::DatumWithOid;
use pgrx::pg_sys::{self, PgOid};
use pgrx::spi::{OwnedPreparedStatement, PreparedStatement, Spi, SpiTupleTable};
use std::borrow::Cow;
use std::cell::RefCell;
use std::collections::HashMap;
use std::ffi::CString;
use std::fmt::Write;

/// Reads what is committed now. Unlike SPI's `update`, this assigns no transaction id, so reading writes no WAL and
/// works on a standby.
pub(crate) fn query<R>(sql: &str, args: &[DatumWithOid<'_>], each: impl FnMut(&FoundRow<'_>) -> R) -> Vec<R> {
    rights::reading(|| {
        Spi::connect(|client| {
            // Locks the tables.
            let statement = client.prepare(sql, &types_of(args));
            let statement = statement.unwrap_or_else(|e| internal(e.to_string()));
            // SAFETY: within a transaction; popped below, or by its abort. A transaction without an id reads with the
            // active snapshot, which may be older than the invalidations that were processed. And to one that is older
            // than the lock, a table that ALTER TABLE has rewritten meanwhile is empty.
            unsafe { pg_sys::PushActiveSnapshot(pg_sys::GetLatestSnapshot()) };
            let table = rights::execution(|| client.select(&statement, None, args));
            let found = FoundRow::for_all(table.unwrap_or_else(|e| internal(e.to_string())), each);
            // SAFETY: the snapshot pushed above is the active one again.
            unsafe { pg_sys::PopActiveSnapshot() };
            found
        })
    })
}

/// A statement that runs often.
#[derive(Clone, Copy)]
struct KeptStatement {
    statement: &'static OwnedPreparedStatement,
    /// The same statement, never executed. Whoever gets its plan locks its tables. Only of a statement that reads.
    locks: pg_sys::SPIPlanPtr,
}

thread_local! {
    /// Plans by their statements. They are kept as long as the process lives.
    static KEPT: RefCell<HashMap<String, KeptStatement>> = RefCell::default();
}

/// What SPI makes of a statement.
type Prepared<'c> = Result<PreparedStatement<'c>, pgrx::spi::Error>;

/// A statement that runs often, parsed and planned once. The plan must be good however large its tables become, so it
/// uses indexes where it can.
fn kept<'c>(sql: &str, make: impl FnOnce() -> (Prepared<'c>, pg_sys::SPIPlanPtr)) -> KeptStatement {
    let known = KEPT.with_borrow(|kept| kept.get(sql).copied());
    known.unwrap_or_else(|| {
        let (made, locks) = make();
        let made = made.unwrap_or_else(|e| internal(e.to_string())).keep();
        // It is never freed: the process's memory ends with the process.
        let statement: &'static OwnedPreparedStatement = Box::leak(Box::new(made));
        let kept = KeptStatement { statement, locks };
        KEPT.with_borrow_mut(|all| all.insert(sql.to_owned(), kept));
        kept
    })
}

fn kept_plan(sql: &str, args: &[DatumWithOid<'_>]) -> pg_sys::SPIPlanPtr {
    let mut types: Vec<pg_sys::Oid> = args.iter().map(DatumWithOid::oid).collect();
    let sql = CString::new(sql).unwrap_or_else(|e| internal(e.to_string()));
    // SAFETY: connected to SPI; the text and the types are read before it returns.
    unsafe {
        let plan = pg_sys::SPI_prepare(sql.as_ptr(), types.len() as i32, types.as_mut_ptr());
        if plan.is_null() || pg_sys::SPI_keepplan(plan) != 0 {
            internal("a statement cannot be kept");
        }
        plan
    }
}

/// Locks the tables of a statement that reads, until the transaction ends.
fn lock_tables(kept: KeptStatement) {
    // SAFETY: connected to SPI, a kept plan of one statement; what was got is released with the same owner.
    unsafe {
        let plan = pg_sys::SPI_plan_get_cached_plan(kept.locks);
        if !plan.is_null() {
            pg_sys::ReleaseCachedPlan(plan, pg_sys::CurrentResourceOwner);
        }
    }
}

/// Executes a cached statement. It is planned when it is first executed.
fn execution_of_kept<R>(f: impl FnOnce() -> R) -> R {
    let settings = [
        (c"plan_cache_mode", c"force_generic_plan"),
        (c"enable_seqscan", c"off"),
        // The first rows of a range come in the index's order; all of it would be read and sorted for them otherwise.
        (c"enable_bitmapscan", c"off"),
    ];
    rights::with_settings(&settings, || rights::execution(f))
}

/// As [`query`], for a statement that runs often.
pub(crate) fn query_kept<R>(sql: &str, args: &[DatumWithOid<'_>], each: impl FnMut(&FoundRow<'_>) -> R) -> Vec<R> {
    rights::reading(|| {
        Spi::connect(|client| {
            let kept = kept(sql, || (client.prepare(sql, &types_of(args)), kept_plan(sql, args)));
            execution_of_kept(|| lock_tables(kept));
            // SAFETY: as in `query`; also here the tables are locked before.
            unsafe { pg_sys::PushActiveSnapshot(pg_sys::GetLatestSnapshot()) };
            let table = execution_of_kept(|| client.select(kept.statement, None, args));
            let found = FoundRow::for_all(table.unwrap_or_else(|e| internal(e.to_string())), each);
            // SAFETY: as in `query`.
            unsafe { pg_sys::PopActiveSnapshot() };
            found
        })
    })
}

/// As [`run_returning`], for a statement that runs often.
pub(crate) fn run_kept<R>(sql: &str, args: &[DatumWithOid<'_>], each: impl FnMut(&FoundRow<'_>) -> R) -> Vec<R> {
    rights::writing(|| {
        Spi::connect_mut(|client| {
            let kept = kept(sql, || (client.prepare_mut(sql, &types_of(args)), std::ptr::null_mut()));
            let table = execution_of_kept(|| client.update(kept.statement, None, args));
            FoundRow::for_all(table.unwrap_or_else(|e| internal(e.to_string())), each)
        })
    })
}

/// Runs a statement that writes. Returns the rows that it returns.
pub(crate) fn run_returning<R>(sql: &str, args: &[DatumWithOid<'_>], each: impl FnMut(&FoundRow<'_>) -> R) -> Vec<R> {
    write_once(sql, args, |table| FoundRow::for_all(table, each))
}

fn write_once<R>(sql: &str, args: &[DatumWithOid<'_>], f: impl FnOnce(SpiTupleTable<'_>) -> R) -> R {
    rights::writing(|| {
        Spi::connect_mut(|client| {
            let statement = client.prepare_mut(sql, &types_of(args));
            let statement = statement.unwrap_or_else(|e| internal(e.to_string()));
            let table = rights::execution(|| client.update(&statement, None, args));
            f(table.unwrap_or_else(|e| internal(e.to_string())))
        })
    })
}

/// The values of a query's only column.
pub(crate) fn query_column<T>(sql: &str, args: &[DatumWithOid<'_>]) -> Vec<T>
where
    T: pgrx::IntoDatum + pgrx::FromDatum,
{
    let found = query(sql, args, |row| row.only_value());
    found.into_iter().flatten().collect()
}

/// The only value of a query; `None`: it is null, or there is no row.
pub(crate) fn query_value<T>(sql: &str, args: &[DatumWithOid<'_>]) -> Option<T>
where
    T: pgrx::IntoDatum + pgrx::FromDatum,
{
    query(sql, args, |row| row.only_value()).into_iter().next().flatten()
}

/// Runs a statement that writes. Returns the number of rows.
pub(crate) fn run(sql: &str, args: &[DatumWithOid<'_>]) -> u64 {
    write_once(sql, args, |table| table.len() as u64)
}

/// A parameter of a statement, with its name.
pub(crate) type Parameter<'a> = (&'static str, DatumWithOid<'a>);

/// As [`query`], with parameters that have names: `$name` in the statement.
pub(crate) fn query_named<'a, R>(
    sql: &str,
    parameters: impl IntoIterator<Item = Parameter<'a>>,
    each: impl FnMut(&FoundRow<'_>) -> R,
) -> Vec<R> {
    let (sql, args) = numbered(sql, parameters);
    query(&sql, &args, each)
}

/// As [`run`], with parameters that have names: `$name` in the statement.
pub(crate) fn run_named<'a>(sql: &str, parameters: impl IntoIterator<Item = Parameter<'a>>) -> u64 {
    let (sql, args) = numbered(sql, parameters);
    run(&sql, &args)
}

/// Replaces the names of parameters by numbers.
fn numbered<'a>(sql: &str, parameters: impl IntoIterator<Item = Parameter<'a>>) -> (String, Vec<DatumWithOid<'a>>) {
    let (names, values): (Vec<&str>, Vec<DatumWithOid<'a>>) = parameters.into_iter().unzip();
    let mut pieces = sql.split('$');
    let mut numbered = String::with_capacity(sql.len());
    numbered.push_str(pieces.next().unwrap_or_default());
    for piece in pieces {
        let end = piece.find(|c: char| !c.is_ascii_lowercase() && c != '_');
        let (name, rest) = piece.split_at(end.unwrap_or(piece.len()));
        let index = names.iter().position(|known| *known == name);
        let index = index.unwrap_or_else(|| internal(format!("a statement has no parameter \"{name}\"")));
        let _ = write!(numbered, "${}{rest}", index + 1);
    }
    (numbered, values)
}

/// A column and its new value.
pub(crate) struct Assignment<'a> {
    column: &'static str,
    /// The value as an SQL expression in which `$` stands for the parameter.
    expression: &'static str,
    parameter: Option<DatumWithOid<'a>>,
}

impl<'a> Assignment<'a> {
    /// Sets the column to a value.
    pub(crate) fn new(column: &'static str, value: impl Into<DatumWithOid<'a>>) -> Self {
        Self::by(column, "$", value)
    }

    /// Sets the column to an expression in which `$` stands for the value.
    pub(crate) fn by(column: &'static str, expression: &'static str, value: impl Into<DatumWithOid<'a>>) -> Self {
        Self {
            column,
            expression,
            parameter: Some(value.into()),
        }
    }

    /// Sets the column to an expression without a parameter.
    pub(crate) fn computed(column: &'static str, expression: &'static str) -> Self {
        Self {
            column,
            expression,
            parameter: None,
        }
    }
}

/// Inserts a row, or updates the row with this key.
pub(crate) fn upsert<const KEYS: usize, const REST: usize>(
    table: &str,
    key: [Assignment<'_>; KEYS],
    rest: [Assignment<'_>; REST],
) {
    let (mut columns, mut values, mut keys, mut updates) = (String::new(), String::new(), String::new(), String::new());
    let mut args = Vec::with_capacity(KEYS + REST);
    for (index, assignment) in key.into_iter().chain(rest).enumerate() {
        let Assignment {
            column,
            expression,
            parameter,
        } = assignment;
        let comma = if index > 0 { ", " } else { "" };
        let _ = write!(columns, "{comma}{column}");
        if index < KEYS {
            let _ = write!(keys, "{comma}{column}");
        } else {
            let comma = if index > KEYS { ", " } else { "" };
            let _ = write!(updates, "{comma}{column} = excluded.{column}");
        }
        match parameter {
            Some(parameter) => {
                args.push(parameter);
                let value = expression.replace('$', &format!("${}", args.len()));
                let _ = write!(values, "{comma}{value}");
            }
            None => {
                let _ = write!(values, "{comma}{expression}");
            }
        }
    }
    run_kept(
        &format!("insert into {table} ({columns}) values ({values}) on conflict ({keys}) do update set {updates}"),
        &args,
        |_| (),
    );
}

fn types_of(args: &[DatumWithOid<'_>]) -> Vec<PgOid> {
    args.iter().map(|a| PgOid::from(a.oid())).collect()
}

/// A text as a parameter, in the database's encoding. It came from the database, so the encoding has all its
/// characters.
pub(crate) fn argument<'a>(text: &str) -> DatumWithOid<'a> {
    // SAFETY: to_server() gives valid text, which is copied; text has the form of bytea.
    unsafe { DatumWithOid::new(&*encoding::to_server(text), pg_sys::TEXTOID) }
}

/// Several texts for [`argument`] as one array parameter.
pub(crate) fn arguments<'a>(texts: &[&str]) -> DatumWithOid<'a> {
    array_of(texts.iter().map(|text| encoding::to_server(text)))
}

pub(super) fn array_of<'a, 'b>(texts: impl Iterator<Item = Cow<'b, [u8]>>) -> DatumWithOid<'a> {
    // SAFETY: an array of texts.
    unsafe { DatumWithOid::new(text_array(texts), pg_sys::TEXTARRAYOID) }
}

/// A `text[]` of texts in the database's encoding.
pub(crate) fn text_array<'b>(texts: impl Iterator<Item = Cow<'b, [u8]>>) -> pg_sys::Datum {
    let mut datums: Vec<_> = texts.map(|text| text_datum(&text)).collect();
    // SAFETY: an array of texts of the current memory context, which lives as long as the transaction.
    unsafe {
        pg_sys::Datum::from(pg_sys::construct_array(
            datums.as_mut_ptr(),
            datums.len() as i32,
            pg_sys::TEXTOID,
            -1,
            false,
            pg_sys::TYPALIGN_INT as _,
        ))
    }
}

/// As [`argument`], for texts from Redis or the operating system. Characters that the database's encoding lacks become
/// question marks.
pub(crate) fn words<'a>(text: &str) -> DatumWithOid<'a> {
    // SAFETY: valid text, which is copied; text has the form of bytea.
    unsafe { DatumWithOid::new(&*encoding::words_to_server(text), pg_sys::TEXTOID) }
}

/// Several texts for [`words`] as one array parameter.
pub(crate) fn all_words<'a>(texts: &[&str]) -> DatumWithOid<'a> {
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
