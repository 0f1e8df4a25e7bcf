//! Scheduled events: the worker moves those that are due to `outbox.events`.

use crate::tables::care::{self, Kept};
use crate::tables::catalog;
use crate::tables::found_row::FoundRow;
use crate::tables::missing::Index;
use crate::tables::restores;
use crate::tables::sql::{query_column, query_kept, run_kept, run_named, run_returning, timestamp, uuids, words};
use crate::tables::trusted;
use pgrx::pg_sys;
use std::collections::BTreeSet;

/// Scheduled events that are due at the time $1, at most $2, except those that are set aside ($3). The time is a
/// parameter so that the index is read only up to it; a clock function would be evaluated for each row.
const DUE: &str = "select d.event_id from outbox.scheduled_events d
    where d.scheduled_at <= $1 and d.event_id <> all($3) order by d.scheduled_at, d.seq limit $2";

/// Scheduled events that are due, without those that are set `aside`: at most `count`.
pub(crate) fn due_now(count: i64, aside: &[[u8; 16]]) -> Vec<[u8; 16]> {
    // SAFETY: reads the clock.
    let now_us = unsafe { pg_sys::GetCurrentTimestamp() };
    let ids: Vec<pgrx::Uuid> = query_column(DUE, &[timestamp(now_us), count.into(), uuids(aside)]);
    ids.iter().map(|id| *id.as_bytes()).collect()
}

/// Of these scheduled events, those whose rows nobody has locked and those that no longer exist. The rows are locked
/// until the end of the transaction.
pub(crate) fn lockable(ids: &[[u8; 16]]) -> Vec<[u8; 16]> {
    let free = run_returning(
        "with free as materialized (
            select s.event_id from outbox.scheduled_events s where s.event_id = any($1) for update skip locked)
        select event_id from free
        union all
        select g.id from unnest($1) g(id)
        where not exists (select from outbox.scheduled_events s where s.event_id = g.id)",
        &[uuids(ids)],
        |row| row.value::<pgrx::Uuid>("event_id").map(|id| *id.as_bytes()),
    );
    free.into_iter().flatten().collect()
}

/// What moving some of them came to.
#[derive(Default)]
pub(crate) struct Moved {
    /// How many there were.
    pub count: u64,
    /// When the last of them was due, in microseconds since 2000.
    pub last_us: Option<i64>,
}

/// Moves scheduled events that are due from `from_us` to `now_us` into `outbox.events`, without those that are set
/// `aside` and those whose rows somebody has locked: at most `count`, which takes few different values. Sets all
/// columns that the trigger would fill in, because the trigger may be switched off.
pub(crate) fn move_due(from_us: i64, now_us: i64, count: i64, aside: &[[u8; 16]]) -> Moved {
    // The count is part of the text: a plan that is kept must know how few rows there are.
    let due_and_free = format!(
        "select d.event_id, d.branch from outbox.scheduled_events d
        where d.scheduled_at >= $3 and d.scheduled_at <= $1 and d.event_id <> all($2)
        order by d.scheduled_at, d.seq limit {count} for update skip locked"
    );
    let arguments = [timestamp(now_us), uuids(aside), timestamp(from_us)];
    move_scheduled(&due_and_free, |sql| run_kept(sql, &arguments, moved_row))
}

/// The same one by one: an event that cannot be moved fails alone.
pub(crate) fn move_due_one_by_one(count: i64, aside: &[[u8; 16]]) -> Moved {
    let due = due_now(count, aside);
    for id in &due {
        let id = pgrx::Uuid::from_bytes(*id);
        if let Err(error) =
            care::tried_new(|| move_scheduled(ALL_OF_ONE, |sql| run_returning(sql, &[id.into()], moved_row)))
        {
            care::as_much_as_can_be_read(|kept| fail_scheduled(id, &error, kept));
        }
    }
    Moved {
        count: due.len() as u64,
        last_us: None,
    }
}

/// The rows of a scheduled event.
const ALL_OF_ONE: &str = "select d.event_id, d.branch from outbox.scheduled_events d where d.event_id = $1";

/// Records a scheduled event that cannot be moved as failed.
fn fail_scheduled(id: pgrx::Uuid, error: &str, kept: Kept) -> u64 {
    run_named(
        "with gone as (delete from outbox.scheduled_events s where s.event_id = $event_id returning s.*)
        insert into outbox.failed_events (seq, xid, created_at, event_id, backend_number, branch, event_type, source, backend,
            data, subject, stream, data_schema, publisher_config, max_retries, published_by, attempts, last_error)
        select g.seq, g.xid, g.created_at, g.event_id, g.backend_number, g.branch,
            case when $texts then g.event_type else '(not readable)' end, case when $texts then g.source else '(not readable)' end,
            case when $texts then g.backend else '(not readable)' end, case when $payload then g.data end,
            case when $texts then g.subject end, case when $texts then g.stream end, case when $texts then g.data_schema end,
            case when $payload then g.publisher_config end, g.max_retries, g.published_by, 0, $error
        from gone g
        on conflict (event_id, seq) do nothing",
        [
            ("event_id", id.into()),
            ("error", words(error)),
            ("texts", kept.texts.into()),
            ("payload", kept.payload.into()),
        ],
    )
}

/// The backend of a moved event that a dump has brought; and when it was due.
fn moved_row(row: &FoundRow<'_>) -> (Option<i32>, Option<i64>) {
    let due = row.datum("scheduled_at").map(|at| at.value() as i64);
    (row.value("restored_for"), due)
}

/// Moves the rows of scheduled events whose ids and branches a query selects.
fn move_scheduled(selected: &str, run: impl FnOnce(&str) -> Vec<(Option<i32>, Option<i64>)>) -> Moved {
    if catalog::expect_relations().events_id_key == pg_sys::InvalidOid {
        Index::EventId.refuse();
    }
    let moved = trusted::moving(|| {
        run(&format!(
                "with due as (
                delete from outbox.scheduled_events s
                where (s.event_id, s.branch) in ({selected})
                returning s.*
            ), moved as (
                insert into outbox.events (xid, seq, created_at, event_id, backend_number, branch, event_type, source, backend, data,
                    subject, stream, data_schema, publisher_config, max_retries, published_by)
                select pg_current_xact_id(), outbox.draw_seq(), d.created_at, d.event_id, d.backend_number, d.branch, d.event_type,
                    d.source, d.backend, d.data, d.subject, d.stream, d.data_schema, d.publisher_config, d.max_retries, d.published_by
                from (select * from due order by scheduled_at, seq) d
                on conflict (event_id, branch) do nothing
                returning event_id, branch
            ), repeated as (
                insert into outbox.failed_events (seq, xid, created_at, event_id, backend_number, branch, event_type, source, backend,
                    data, subject, stream, data_schema, publisher_config, max_retries, published_by, attempts, last_error)
                select d.seq, d.xid, d.created_at, d.event_id, d.backend_number, d.branch, d.event_type, d.source, d.backend,
                    d.data, d.subject, d.stream, d.data_schema, d.publisher_config, d.max_retries, d.published_by, 0,
                    case when exists (select from outbox.events e where e.event_id = d.event_id and e.branch = d.branch)
                        then 'an event with this event_id was already published'
                        else 'a trigger of outbox.events has left it out' end
                from due d where not exists (select from moved m where m.event_id = d.event_id and m.branch = d.branch)
                on conflict (event_id, seq) do nothing
            )
            select case when d.xid = '0' then d.backend_number end as restored_for, d.scheduled_at from due d"
            ))
    });
    // In a statement of its own, and only if there are any: each insertion into that table has all backends loaded
    // again.
    let restored: BTreeSet<i32> = moved.iter().filter_map(|(restored_for, _)| *restored_for).collect();
    restored.into_iter().for_each(restores::note_restored_here);
    Moved {
        count: moved.len() as u64,
        last_us: moved.iter().filter_map(|(_, due)| *due).max(),
    }
}

/// When the next scheduled event that is not set `aside` is due, from `from_us` on (`None`: there is none), and the
/// present time, in microseconds since 2000.
pub(crate) fn next_due(from_us: i64, aside: &[[u8; 16]]) -> (Option<i64>, i64) {
    let due = query_kept(
        "select s.scheduled_at from outbox.scheduled_events s where s.scheduled_at >= $2 and s.event_id <> all($1)
        order by s.scheduled_at, s.seq limit 1",
        &[uuids(aside), timestamp(from_us)],
        |row| row.datum("scheduled_at").map(|d| d.value() as i64),
    );
    // SAFETY: reads the clock.
    (due.into_iter().flatten().next(), unsafe {
        pg_sys::GetCurrentTimestamp()
    })
}
