//! A database that is a copy of another one sends nothing until `outbox.take_over()` is called in it: see the table
//! `copied_backends`.
//!
//! A copy made by CREATE DATABASE ... TEMPLATE has another OID than its tables record (`outbox.note_copy()`). A copy of
//! a whole server (base backup, snapshot, recovery to a target) is in another place than its previous run, and was not
//! promoted as a standby.

use crate::server::guc::{self, TakeOver};
use crate::tables::row::Row;
use crate::tables::sql::{query_value, run};
use pgrx::iter::TableIterator;
use pgrx::{name, pg_extern, pg_sys};

/// The original of a copied backend.
#[derive(Clone, PartialEq, Eq)]
pub(crate) struct Original {
    /// A description: the name of a database, or where a server runs.
    pub words: String,
    /// Whether it is a database of this server. Usually it still exists, and the copy's guards have other keys.
    pub is_database: bool,
}

impl Original {
    /// Whether the copy must not send because of this original.
    pub(crate) fn counts(&self) -> bool {
        self.is_database || guc::TAKE_OVER.get() == TakeOver::Standby
    }
}

/// Checks whether this database was made from another one, and records that in the tables. Called within the worker's
/// transaction.
pub(crate) fn note_copy() -> bool {
    let is_copy = "select i.database <> d.oid from outbox.installation i, pg_catalog.pg_database d where d.datname = current_database()";
    let is_copy = query_value(is_copy, &[]).unwrap_or(false);
    if is_copy {
        run("select outbox.note_copy()", &[]);
    }
    is_copy
}

/// `outbox.database_made_by()`: the transaction that made this database. It is not certain if the database's row of
/// pg_database was changed since: then it is one of the transactions that changed the row.
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

/// The full id of a transaction that began less than 2^32 transactions before `next`.
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
    /// The transaction that wrote this version.
    xid: u32,
    /// Whether it replaces an earlier version.
    is_update: bool,
}

/// All versions of a database's row that vacuum has not removed.
fn versions_of(database: pg_sys::Oid) -> Vec<Version> {
    let mut found = Vec::new();
    // SAFETY: a scan of a shared catalog, with a snapshot that needs no registration; the tuple's fixed columns are
    // never null, and its header is valid until the next tuple is fetched.
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
