//! Transactions that brought events from a dump: `outbox.restores`.

use crate::tables::rights;
use crate::tables::sql::{query_value, run};
use relay::reading::snapshot::Snapshot;

/// Whether there are restores that a snapshot does not see.
pub(crate) fn has_later_restores(seen: &Snapshot) -> bool {
    query_value(
        "select exists (select from outbox.restores r where not pg_visible_in_snapshot(r.xid, $1::pg_snapshot))",
        &[seen.to_string().into()],
    )
    .unwrap_or(false)
}

/// Records that this transaction, with the id `xid`, restores events from a dump. Called in the session that restores.
pub(crate) fn note_restore(number: i32, xid: u64) {
    rights::of_owner(|| {
        run(
            "insert into outbox.restores (backend_number, xid) values ($1, $2::text::xid8)",
            &[number.into(), xid.to_string().into()],
        )
    });
}

/// Records that the worker's transaction moves events that came from a dump.
pub(crate) fn note_restored_here(number: i32) {
    run(
        "insert into outbox.restores (backend_number, xid) values ($1, pg_current_xact_id())",
        &[number.into()],
    );
}

/// How many events these restores have brought.
pub(crate) fn count_restored(restores: &[i64]) -> i64 {
    query_value(
        "select count(*) from outbox.restores r join outbox.events e on e.xid = r.xid and e.backend_number = r.backend_number
        where r.number = any($1)",
        &[restores.to_vec().into()],
    )
    .unwrap_or(0)
}

/// Records that recovery has looked for the events of these restores. For each backend, only the latest such restore is
/// kept. Returns the transaction id of the latest.
pub(crate) fn note_looked_for(restores: &[i64]) -> u64 {
    let latest: Option<String> = query_value(
        "select max(xid)::text from outbox.restores where number = any($1)",
        &[restores.to_vec().into()],
    );
    run(
        "update outbox.restores set is_looked_for = true where number = any($1)",
        &[restores.to_vec().into()],
    );
    run(
        "delete from outbox.restores r where r.is_looked_for and exists (select from outbox.restores l
            where l.backend_number = r.backend_number and l.is_looked_for and (l.xid, l.number) > (r.xid, r.number))",
        &[],
    );
    latest.and_then(|xid| xid.parse().ok()).unwrap_or_default()
}
