//! A database that is a copy of another one sends nothing of its backends until `outbox.take_over()`, see the table `copied_backends`.
//!
//! Made by CREATE DATABASE ... TEMPLATE, it has another oid than its tables say (`outbox.note_copy()`). Made with its whole server (base backup,
//! snapshot, recovery to a target), it is in another place than the run before this one, and no standby that was promoted.

use crate::server::guc::{self, TakeOver};
use crate::tables::row::Row;
use crate::tables::sql::{query_value, run};
use pgrx::iter::TableIterator;
use pgrx::{name, pg_extern, pg_sys};

/// What a backend is copied from.
#[derive(Clone, PartialEq, Eq)]
pub struct Original {
    /// In words: a database, or where a server lives.
    pub words: String,
    /// It is a database of this server: that is still there, as a rule, and nothing of the copy's is in its guard.
    pub is_database: bool,
}

impl Original {
    /// Whether that keeps the copy from sending.
    pub fn counts(&self) -> bool {
        self.is_database || guc::TAKE_OVER.get() == TakeOver::Standby
    }
}

/// Within the worker's transaction: whether this database was made of another one, which is noted.
pub fn note_copy() -> bool {
    let is_copy = "select i.database <> d.oid from outbox.installation i, pg_catalog.pg_database d where d.datname = current_database()";
    let is_copy = query_value(is_copy, &[]).unwrap_or(false);
    if is_copy {
        run("select outbox.note_copy()", &[]);
    }
    is_copy
}

/// `outbox.database_made_by()`: the transaction that made this database. Not certain: its row of pg_database was changed since, and what
/// is known is one of those that did that.
#[pg_extern(sql = false)]
fn database_made_by() -> TableIterator<'static, (name!(xid, Option<i64>), name!(is_certain, bool))> {
    // SAFETY: reads the counter under its lock, and a variable of this process.
    let (next, database) = unsafe { (pg_sys::ReadNextFullTransactionId().value, pg_sys::MyDatabaseId) };
    let versions = versions_of(database);
    let made = versions
        .iter()
        .filter(|version| !version.is_update)
        .max_by_key(|v| v.xid);
    let oldest = versions.iter().min_by_key(|version| version.xid);
    let xid = made.or(oldest).map(|version| widened(version.xid, next) as i64);
    TableIterator::once((xid, made.is_some()))
}

/// The id of a transaction that began before `next`, and not 2^32 of them before.
fn widened(xid: u32, next: u64) -> u64 {
    let epoch = next >> 32;
    let same_epoch = (epoch << 32) | u64::from(xid);
    if same_epoch < next || epoch == 0 {
        same_epoch
    } else {
        same_epoch - (1 << 32)
    }
}

/// A version of a row.
struct Version {
    /// Who wrote it,
    xid: u32,
    /// in place of an earlier one.
    is_update: bool,
}

/// All versions of a database's row that no vacuum has taken away.
fn versions_of(database: pg_sys::Oid) -> Vec<Version> {
    let mut found = Vec::new();
    // SAFETY: a scan of a shared catalog, with a snapshot that needs no registration; the tuple's fixed columns are never null, and its
    // header is valid until the next one is asked for.
    unsafe {
        let rel = pg_sys::table_open(pg_sys::DatabaseRelationId, pg_sys::AccessShareLock as _);
        let any = &raw mut pg_sys::SnapshotAnyData;
        let scan = pg_sys::table_beginscan(rel, any, 0, std::ptr::null_mut());
        loop {
            let tuple = pg_sys::heap_getnext(scan, pg_sys::ScanDirection::ForwardScanDirection);
            if tuple.is_null() {
                break;
            }
            let row = Row::of(tuple, (*rel).rd_att);
            let oid = row.get(pg_sys::Anum_pg_database_oid as usize);
            let oid = oid.map(|oid| oid.value() as u32);
            if oid == Some(database.to_u32()) {
                let header = (*tuple).t_data;
                found.push(Version {
                    xid: (*header).t_choice.t_heap.t_xmin.into_inner(),
                    is_update: u32::from((*header).t_infomask) & pg_sys::HEAP_UPDATED != 0,
                });
            }
        }
        pg_sys::table_endscan(scan);
        pg_sys::table_close(rel, pg_sys::AccessShareLock as _);
    }
    found
}
