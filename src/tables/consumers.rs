//! What Redis reports about consumer groups: `outbox.consumer_groups`. Needs a transaction.

use crate::tables::cursors::lane_number;
use crate::tables::sql::{all_words, query_kept, run_kept, run_named};
use relay::consumers::group::Surveyed;

/// How many of the latest rows are looked at to find streams: a stream has a row for each of its groups.
const ROWS_OF_STREAM: usize = 4;

/// Streams of a backend, or of one of its lanes, that a survey has asked about lately; at most `limit`.
pub(crate) fn known_streams(number: i32, lane: Option<u16>, limit: usize) -> Vec<String> {
    let found = query_kept(
        "select distinct g.stream from (
            select a.stream from outbox.consumer_groups a where a.backend_number = $1 and a.slot = $2
            order by a.asked_at desc limit $3) g
        limit $4",
        &[
            number.into(),
            lane_number(lane).into(),
            ((limit * ROWS_OF_STREAM) as i64).into(),
            (limit as i64).into(),
        ],
        |row| row.text("stream"),
    );
    found.into_iter().flatten().collect()
}

/// Deletes the rows of deleted backends. It looks for the next number in the index, and so passes all other rows.
pub(crate) fn forget_deleted() {
    run_kept(
        "with recursive numbers (number) as (
            select min(g.backend_number) from outbox.consumer_groups g
            union all
            select (select min(g.backend_number) from outbox.consumer_groups g where g.backend_number > n.number) from numbers n
            where n.number is not null)
        delete from outbox.consumer_groups g where g.backend_number = any(array(select n.number from numbers n
            where not exists (select from outbox.backends b where b.number = n.number)))",
        &[],
        |_| (),
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

/// Of the rows of streams that no survey has asked about for a long time, this many are deleted whenever a result is
/// saved, and as many again as are written: streams may come and go as fast as Redis can be asked about them.
const OLD_ROWS: i64 = 1_000;

/// Saves the result of a survey. There may be very many rows of other streams, which are left alone.
pub(crate) fn save(number: i32, lane: Option<u16>, found: &[Surveyed]) {
    let slot = lane_number(lane);
    let asked: Vec<&str> = found.iter().map(|surveyed| &*surveyed.stream).collect();
    let rows = rows_of(found);
    run_kept(
        "delete from outbox.consumer_groups g where g.backend_number = $1 and g.slot = $2 and g.stream = any($3)",
        &[number.into(), slot.into(), all_words(&asked)],
        |_| (),
    );
    let old_rows = OLD_ROWS + rows.streams.len() as i64;
    run_kept(
        "delete from outbox.consumer_groups g where g.ctid = any(array(select o.ctid from outbox.consumer_groups o
            where o.backend_number = $1 and o.slot = $2 and o.asked_at < now() - '1 hour'::interval
            order by o.asked_at limit $3))",
        &[number.into(), slot.into(), old_rows.into()],
        |_| (),
    );
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
