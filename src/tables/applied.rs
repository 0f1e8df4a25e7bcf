//! Logical replication: rows that a subscription brings from another server's tables. The SQL script decides what
//! happens to them; this module answers its questions.

use crate::server::guc::LogLevel;
use crate::server::process::log;
use crate::server::scoped;
use crate::server::trigger_call::{When, depth, expect_trigger};
use crate::tables::catalog;
use crate::tables::sql;
use pgrx::{pg_extern, pg_sys};
use std::cell::Cell;

thread_local! {
    /// Whether rows of this server are being put back.
    static PUTS_BACK: Cell<bool> = const { Cell::new(false) };
}

/// Whether a trigger of ours, which asks this, was called for a row that this process applies or copies for a
/// subscription. What triggers of users' tables do in such a process, one level deeper, is done by this server, as are
/// rows that it puts back.
pub(crate) fn is_applied_here() -> bool {
    // SAFETY: a plain read.
    unsafe { pg_sys::IsLogicalWorker() && !puts_back() && depth() <= 1 }
}

/// Whether rows are inserted unchanged.
pub(crate) fn puts_back() -> bool {
    PUTS_BACK.get()
}

/// `outbox.put_back(statement)`
#[pg_extern(sql = false)]
fn put_back(statement: &str) {
    scoped::with(&PUTS_BACK, true, || sql::run(statement, &[]));
}

/// `outbox.is_applied()`
#[pg_extern(sql = false)]
fn is_applied() -> bool {
    is_applied_here()
}

/// Publications that contain tables which must not leave this server, such as the destinations of backends and the
/// sealed passwords. Roles that may decode the WAL would get them.
pub(crate) fn publications() -> Vec<String> {
    sql::query(
        "select p.pubname::text from pg_publication p
        where p.puballtables
            or exists (select from pg_publication_namespace n where n.pnpubid = p.oid and n.pnnspid = 'outbox'::regnamespace)
            or exists (select from pg_publication_rel r where r.prpubid = p.oid and r.prrelid in ('outbox.backend_passwords'::regclass,
                'outbox.backends'::regclass, 'outbox.moved_backends'::regclass, 'outbox.ticks'::regclass, 'outbox.installation'::regclass,
                'outbox.incarnations'::regclass, 'outbox.take_overs'::regclass, 'outbox.restores'::regclass,
                'outbox.replays'::regclass, 'outbox.known_triggers'::regclass))
        order by 1",
        &[],
        |row| row.text("pubname").unwrap_or_default(),
    )
}

/// Names of the backends for which events of another server are held.
pub(crate) fn held() -> Vec<String> {
    sql::query(
        "select distinct h.backend from (select backend from outbox.held_events order by number limit 1000) h order by 1",
        &[],
        |row| row.text("backend").unwrap_or_default(),
    )
}

pub(crate) fn say_held(backend: &str) {
    log(
        LogLevel::Info,
        &format!("events of another server are held for backend \"{backend}\""),
        Some("A subscription has brought them, and the other server sends them."),
        Some("To send here what the other server has not sent, call outbox.take_over() for the backend."),
    );
}

pub(crate) fn say_published(name: &str) {
    log(
        LogLevel::Warning,
        &format!("publication \"{name}\" has tables of outbox_relay that must not leave this server"),
        Some("It sends hosts, users and sealed passwords of backends. A subscriber with this extension ignores them."),
        Some("Publish only events, scheduled_events, failed_events, refused_events and cursors of schema outbox."),
    );
}

crate::sql_function!(leave_local, pg_finfo_leave_local);

/// Trigger of tables whose rows must not be replicated, before each row.
fn leave_local(fcinfo: pg_sys::FunctionCallInfo) -> pg_sys::Datum {
    let relations = catalog::expect_relations();
    // SAFETY: called by Postgres; a trigger of this kind has a row, and on UPDATE a new one.
    unsafe {
        let trigger = expect_trigger(fcinfo, "leave_local", When::BeforeRow, relations.tables());
        (*fcinfo).isnull = false;
        let is_update = trigger.tg_event & pg_sys::TRIGGER_EVENT_OPMASK == pg_sys::TRIGGER_EVENT_UPDATE;
        match (is_applied_here(), is_update) {
            // A row from a subscription is left out.
            (true, _) => pg_sys::Datum::from(0),
            (false, true) => pg_sys::Datum::from(trigger.tg_newtuple),
            (false, false) => pg_sys::Datum::from(trigger.tg_trigtuple),
        }
    }
}
