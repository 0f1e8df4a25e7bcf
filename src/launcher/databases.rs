//! The list of databases, read from the shared catalogs.

use crate::server::guc::LogLevel;
use crate::server::process::{self, log};
use crate::tables::row::Row;
use pgrx::pg_sys;

/// A database.
pub(super) struct FoundDatabase {
    pub oid: pg_sys::Oid,
    pub name: String,
    pub is_template: bool,
    /// Whether it accepts connections.
    pub is_open: bool,
}

/// All databases. `None`: they cannot be listed now.
pub(super) fn list() -> Option<Vec<FoundDatabase>> {
    let found = process::transaction(|| {
        let mut found = Vec::new();
        // SAFETY: a scan of a shared catalog; the tuple's fixed columns are never null.
        unsafe {
            let rel = pg_sys::table_open(pg_sys::DatabaseRelationId, pg_sys::AccessShareLock as _);
            let scan = pg_sys::table_beginscan_catalog(rel, 0, std::ptr::null_mut());
            loop {
                let tuple = pg_sys::heap_getnext(scan, pg_sys::ScanDirection::ForwardScanDirection);
                if tuple.is_null() {
                    break;
                }
                let row = Row::of(tuple, (*rel).rd_att);
                let (Some(oid), Some(name)) = (
                    row.get(pg_sys::Anum_pg_database_oid as usize),
                    row.get(pg_sys::Anum_pg_database_datname as usize),
                ) else {
                    continue;
                };
                let is = |column: u32| row.get(column as usize).is_some_and(|d| d.value() as u8 != 0);
                let limit = row.i32(pg_sys::Anum_pg_database_datconnlimit as usize);
                let name = std::ffi::CStr::from_ptr((*name.cast_mut_ptr::<pg_sys::NameData>()).data.as_ptr());
                found.push(FoundDatabase {
                    oid: pg_sys::Oid::from(oid.value() as u32),
                    name: name.to_string_lossy().into_owned(),
                    is_template: is(pg_sys::Anum_pg_database_datistemplate),
                    is_open: is(pg_sys::Anum_pg_database_datallowconn) && limit != Some(INVALID),
                });
            }
            pg_sys::table_endscan(scan);
            pg_sys::table_close(rel, pg_sys::AccessShareLock as _);
        }
        found
    });
    found
        .inspect_err(|error| {
            log(
                LogLevel::Warning,
                &format!("could not list the databases: {error}"),
                None,
                None,
            );
        })
        .ok()
}

/// Connection limit of a database whose DROP was interrupted (DATCONNLIMIT_INVALID_DB). Nobody can connect to it.
const INVALID: i32 = -2;

/// Whether a statement holds the database exclusively. A new connection would have to wait, and would fail if the
/// database is dropped or renamed.
pub(super) fn is_locked(database: pg_sys::Oid) -> bool {
    let tag = pg_sys::LOCKTAG {
        locktag_field1: 0,
        locktag_field2: pg_sys::DatabaseRelationId.to_u32(),
        locktag_field3: database.to_u32(),
        locktag_field4: 0,
        locktag_type: pg_sys::LockTagType::LOCKTAG_OBJECT as u8,
        locktag_lockmethodid: pg_sys::DEFAULT_LOCKMETHOD as u8,
    };
    // The lock mode that a connecting session takes. It is released when the transaction ends.
    let mode = pg_sys::RowExclusiveLock as pg_sys::LOCKMODE;
    // SAFETY: tries to take a lock without waiting, within a transaction.
    let taken = process::transaction(|| unsafe { pg_sys::LockAcquire(&tag, mode, false, true) });
    taken.is_ok_and(|taken| taken == pg_sys::LockAcquireResult::LOCKACQUIRE_NOT_AVAIL)
}
