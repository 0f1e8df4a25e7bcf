//! Events that are appended again: `outbox.replay()` and its table `outbox.replays`.

use crate::tables::sql::{argument, query, query_value, run_named};
use crate::tables::trusted;
use pgrx::datum::TimestampWithTimeZone;
use relay::reading::range::Key;

/// The replays of a backend, as long as not all of their events are purged.
pub(crate) struct Replays {
    /// Transaction id, first and last number of each replay.
    all: Vec<(u64, i64, i64)>,
}

impl Replays {
    pub(crate) fn of(number: i32) -> Self {
        let all = query(
            "select xid::text, first_seq, last_seq from outbox.replays where backend_number = $1",
            &[number.into()],
            |row| {
                let seq = |column| row.value::<i64>(column).unwrap_or_default();
                let xid = row.value::<String>("xid").and_then(|xid| xid.parse().ok());
                (xid.unwrap_or_default(), seq("first_seq"), seq("last_seq"))
            },
        );
        Self { all }
    }

    /// Whether a row belongs to one of these replays.
    pub(crate) fn has(&self, key: Key) -> bool {
        let is_its = |(xid, first, last): &(u64, i64, i64)| *xid == key.xid && (*first..=*last).contains(&key.seq);
        self.all.iter().any(is_its)
    }
}

/// Gives the published events of a backend from `since` to before `until` new numbers, in their order, so that they are
/// sent as if they had just been published. One statement does it, so that the memory does not depend on the number of
/// events: beyond work_mem, rows are kept in temporary files. Returns the number of events.
pub(crate) fn replay(
    number: i32,
    since: TimestampWithTimeZone,
    until: TimestampWithTimeZone,
    event_type: Option<&str>,
) -> i64 {
    // The events were checked when they were published.
    let noted = trusted::moving(|| {
        run_named(
            REPLAY,
            [
                ("number", number.into()),
                ("since", since.into()),
                ("until", until.into()),
                ("type", argument(event_type.unwrap_or_default())),
                ("any_type", event_type.is_none().into()),
            ],
        )
    });
    match noted {
        0 => 0,
        _ => query_value("select events from outbox.replays order by number desc limit 1", &[]).unwrap_or(0),
    }
}

const REPLAY: &str = "with gone as (
        delete from outbox.events e using outbox.backends b
        where e.backend_number = $number and b.number = e.backend_number
            and e.created_at >= $since and e.created_at < $until and ($any_type or e.event_type = $type)
            and coalesce((select outbox.is_delivered(c, e.xid, e.seq) from outbox.cursors c
                where c.backend_number = e.backend_number and c.slot in (-1, outbox.hash_slot(coalesce(e.stream, b.own_stream, '')))
                order by c.slot desc limit 1), false)
            and not exists (select from outbox.refused_events r where r.seq = e.seq and r.accepted_in is null)
            and not exists (select from outbox.failed_events f where f.event_id = e.event_id and f.seq = e.seq)
        returning e.*
    ), accepted_late as (
        delete from outbox.refused_events r using gone g where r.seq = g.seq
    ), replayed as (
        insert into outbox.events (xid, seq, created_at, event_id, backend_number, branch, event_type, source, backend, data, subject,
            stream, data_schema, publisher_config, max_retries, published_by)
        select pg_current_xact_id(), outbox.draw_seq(), g.created_at, g.event_id, g.backend_number, g.branch, g.event_type, g.source, g.backend,
            g.data, g.subject, g.stream, g.data_schema, g.publisher_config, g.max_retries, g.published_by
        from (select * from gone order by seq) g
        returning seq
    )
    insert into outbox.replays (backend_number, xid, first_seq, last_seq, events)
    select $number, pg_current_xact_id(), min(p.seq), max(p.seq), count(*) from replayed p having count(*) > 0";
