//! How much `outbox.backends` and `outbox.routes` may hold. The worker and the sessions of publishers keep their rows
//! in memory, and read them all when one has changed: a role that may write such a table could take the memory and the
//! time of all others.

use crate::server::error::raise;
use crate::server::trigger_call::{When, expect_trigger};
use crate::tables::catalog;
use crate::tables::whole_table::each_row;
use pgrx::pg_sys::panic::ErrorReport;
use pgrx::{PgSqlErrorCode, pg_sys};

/// Rows of a table, and bytes of their texts together.
#[derive(Clone, Copy)]
struct Size {
    rows: usize,
    bytes: usize,
}

const MOST: Size = Size {
    rows: 5_000,
    bytes: 4 << 20,
};
/// So much is always accepted, without waiting for other transactions.
const LITTLE: Size = Size {
    rows: 100,
    bytes: 64 << 10,
};

/// The columns of variable length, as the CHECK of the row names them: without names of backends, and words of a list,
/// which are short.
const OF_BACKENDS: [&str; 13] = [
    "host",
    "username",
    "stream_name",
    "own_stream",
    "unix_socket",
    "nodes",
    "sentinel_master",
    "password_file",
    "allowed_streams",
    "static_fields",
    "tls_ca_file",
    "tls_cert_file",
    "tls_key_file",
];
const OF_ROUTES: [&str; 3] = ["event_type", "source", "stream"];

impl Size {
    fn is_within(self, most: Size) -> bool {
        self.rows <= most.rows && self.bytes <= most.bytes
    }

    /// Of all rows that are committed, or that this transaction has written.
    fn of(table: pg_sys::Oid, columns: &[&str]) -> Self {
        let mut size = Size { rows: 0, bytes: 0 };
        each_row(table, columns, |row| {
            size.rows += 1;
            for value in row.values() {
                // SAFETY: a value of variable length. Its size is known without reading what is stored elsewhere.
                size.bytes += unsafe { pg_sys::toast_raw_datum_size(value) };
            }
        });
        size
    }
}

crate::sql_function!(expect_room, pg_finfo_expect_room);

/// `outbox.expect_room()`, after a statement on `backends` or `routes`
fn expect_room(fcinfo: pg_sys::FunctionCallInfo) -> pg_sys::Datum {
    let relations = catalog::expect_relations();
    let tables = [relations.backends, relations.routes];
    // SAFETY: called by Postgres. What the statement has written is seen by later commands, of which this is one.
    let table = unsafe {
        let trigger = expect_trigger(fcinfo, "expect_room", When::AfterStatement, &tables);
        pg_sys::CommandCounterIncrement();
        (*trigger.tg_relation).rd_id
    };
    let (what, columns) = match table == relations.routes {
        true => ("routes", &OF_ROUTES[..]),
        false => ("backends", &OF_BACKENDS[..]),
    };
    if !Size::of(table, columns).is_within(LITTLE) {
        // Transactions that do not see each other's rows would all find room. Only those wait for each other, and
        // VACUUM: no reader, and nobody who deletes.
        // SAFETY: a lock that the transaction's end releases.
        unsafe { pg_sys::LockRelationOid(table, pg_sys::ShareUpdateExclusiveLock as pg_sys::LOCKMODE) };
        let size = Size::of(table, columns);
        if !size.is_within(MOST) {
            refuse(what, size);
        }
    }
    // SAFETY: an AFTER trigger's result is ignored.
    unsafe { (*fcinfo).isnull = false };
    pg_sys::Datum::from(0)
}

fn refuse(what: &str, size: Size) -> ! {
    raise(
        ErrorReport::new(
            PgSqlErrorCode::ERRCODE_PROGRAM_LIMIT_EXCEEDED,
            format!("there would be too many {what}"),
            "",
        )
        .set_detail(format!(
            "outbox.{what} would have {} rows, with {} bytes of text; at most {} and {} are allowed.",
            size.rows, size.bytes, MOST.rows, MOST.bytes
        ))
        .set_hint(format!(
            "The worker and each publisher's session keep all {what} in memory. Delete those that are not needed."
        )),
    )
}
