//! What Redis reports about consumer groups: `outbox.consumer_groups`. Needs a transaction.

use crate::tables::cursors::lane_number;
use crate::tables::sql::{all_words, query_named, run_named};
use relay::consumers::group::Surveyed;

/// Streams of a backend, or of one of its lanes, that a survey has asked about lately; at most `limit`.
pub(crate) fn known_streams(number: i32, lane: Option<u16>, limit: usize) -> Vec<String> {
    let found = query_named(
        "select g.stream from outbox.consumer_groups g
        where g.backend_number = $number and g.slot = $slot
        group by g.stream order by max(g.asked_at) desc, g.stream limit $limit",
        [
            ("number", number.into()),
            ("slot", lane_number(lane).into()),
            ("limit", (limit as i64).into()),
        ],
        |row| row.text("stream"),
    );
    found.into_iter().flatten().collect()
}

/// Deletes the rows of deleted backends.
pub(crate) fn forget_deleted() {
    run_named(
        "delete from outbox.consumer_groups g
        where not exists (select from outbox.backends b where b.number = g.backend_number)",
        [],
    );
}

/// The columns of the rows to write: one row for each group, or for a stream without groups.
struct Rows<'a> {
    streams: Vec<&'a str>,
    groups: Vec<String>,
    errors: Vec<&'a str>,
    lengths: Vec<i64>,
    consumers: Vec<Option<i64>>,
    pending: Vec<Option<i64>>,
    lags: Vec<Option<i64>>,
    unread: Vec<Option<i64>>,
    oldest_ms: Vec<Option<i64>>,
}

/// Saves the result of a survey. Deletes rows of streams that no survey has asked about for a long time.
pub(crate) fn save(number: i32, lane: Option<u16>, found: &[Surveyed]) {
    let slot = lane_number(lane);
    let asked: Vec<&str> = found.iter().map(|surveyed| &*surveyed.stream).collect();
    run_named(
        "delete from outbox.consumer_groups g
        where g.backend_number = $number and g.slot = $slot
            and (g.stream = any($asked) or g.asked_at < clock_timestamp() - '1 hour'::interval)",
        [
            ("number", number.into()),
            ("slot", slot.into()),
            ("asked", all_words(&asked)),
        ],
    );
    let rows = rows_of(found);
    let groups: Vec<&str> = rows.groups.iter().map(String::as_str).collect();
    run_named(
        "insert into outbox.consumer_groups (backend_number, slot, stream, length, consumer_group, consumers, pending, lag,
            unread, oldest_pending_at, error, asked_at)
        select $number, $slot, f.stream, f.length, case when f.consumers is not null then f.consumer_group end,
            f.consumers, f.pending, f.lag, f.unread, to_timestamp(f.oldest_ms / 1000.0), nullif(f.error, ''), clock_timestamp()
        from unnest($streams, $groups, $errors, $lengths, $consumers, $pending, $lags, $unread, $oldest)
            as f(stream, consumer_group, error, length, consumers, pending, lag, unread, oldest_ms)",
        [
            ("number", number.into()),
            ("slot", slot.into()),
            ("streams", all_words(&rows.streams)),
            ("groups", all_words(&groups)),
            ("errors", all_words(&rows.errors)),
            ("lengths", rows.lengths.into()),
            ("consumers", rows.consumers.into()),
            ("pending", rows.pending.into()),
            ("lags", rows.lags.into()),
            ("unread", rows.unread.into()),
            ("oldest", rows.oldest_ms.into()),
        ],
    );
}

fn rows_of(found: &[Surveyed]) -> Rows<'_> {
    let mut rows = Rows {
        streams: Vec::new(),
        groups: Vec::new(),
        errors: Vec::new(),
        lengths: Vec::new(),
        consumers: Vec::new(),
        pending: Vec::new(),
        lags: Vec::new(),
        unread: Vec::new(),
        oldest_ms: Vec::new(),
    };
    for surveyed in found {
        let error = surveyed.failure.as_ref().map_or("", |failure| failure.message.as_str());
        let groups = match error {
            "" => surveyed.groups.as_slice(),
            _ => &[],
        };
        for group in groups.iter().map(Some).chain(groups.is_empty().then_some(None)) {
            rows.streams.push(&surveyed.stream);
            rows.errors.push(error);
            rows.lengths.push(surveyed.length);
            rows.groups.push(group.map_or_else(String::new, |g| g.name.to_string()));
            rows.consumers.push(group.map(|g| g.consumers));
            rows.pending.push(group.map(|g| g.pending));
            rows.lags.push(group.and_then(|g| g.lag));
            rows.unread.push(group.and_then(|g| g.unread(surveyed.length)));
            let oldest = group.and_then(|g| g.oldest_pending);
            // Only a time that Postgres can represent.
            let in_range = oldest.map(|id| id.ms).filter(|ms| *ms < 1 << 52);
            rows.oldest_ms.push(in_range.map(|ms| ms as i64));
        }
    }
    rows
}
