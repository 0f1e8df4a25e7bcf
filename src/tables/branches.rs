//! Rows of one event: routes may give it several, for several backends.

use crate::tables::sql::query;
use relay::reading::range::Key;

/// The row of an event, and when it was published in microseconds since 1970, if it is this backend's and there is no
/// other. Two backends may share a stream, and their rows of one event lead to entries that cannot be told apart. Needs
/// a transaction.
pub(crate) fn only_row_of(number: i32, event_id: [u8; 16]) -> Option<(Key, i64)> {
    let rows = query(
        "select e.backend_number, e.xid::text as xid, e.seq,
            case when isfinite(e.created_at) then (extract(epoch from e.created_at) * 1000000)::bigint end as created_at_us
        from outbox.events e where e.event_id = $1 limit 2",
        &[pgrx::Uuid::from_bytes(event_id).into()],
        |row| {
            let xid = row.value::<String>("xid").and_then(|xid| xid.parse().ok());
            let seq = row.value::<i64>("seq").unwrap_or_default();
            let key = xid.map(|xid| Key { xid, seq });
            (
                row.value::<i32>("backend_number"),
                key.zip(row.value::<i64>("created_at_us")),
            )
        },
    );
    match rows.as_slice() {
        [(Some(found), row)] if *found == number => *row,
        _ => None,
    }
}
