//! The ticks of retention, and which events may be purged by them.

use crate::server::error::internal;
use crate::tables::rights;
use crate::tables::sql::{query, query_column, query_value, run, run_kept, run_named, timestamp};
use crate::tables::tick_columns::{COLUMNS, SELECTED, VALUES, tick_of, tick_parameters};
use pgrx::pg_sys::{self, PgOid};
use pgrx::spi::Spi;
use relay::reading::snapshot::Tick;
use std::sync::Arc;

/// The tick up to which a backend's events have been purged.
pub(crate) fn oldest_tick(number: i32) -> Option<Arc<Tick>> {
    query(
        &format!("select {SELECTED} from outbox.ticks t where t.backend_number = $1 order by t.reached_at limit 1"),
        &[number.into()],
        tick_of,
    )
    .pop()
    .flatten()
}

/// The recorded ticks of all backends, as a transaction writes them: with none whose time has not come.
pub(crate) struct RecordedTicks(());

impl RecordedTicks {
    /// Gives ticks whose time has not come the present time, and keeps their order: the clock was put back. Otherwise a
    /// later tick would have an earlier time, and what lies between them would never be purged.
    pub(crate) fn by_the_clock() -> Self {
        run(
            "with clock as materialized (select clock_timestamp() as now),
            ahead as (
                select f.backend_number, f.reached_at, c.now - row_number() over (
                    partition by f.backend_number order by f.reached_at desc) * '1 microsecond'::interval as followed_at
                from clock c, outbox.ticks f where f.reached_at > c.now
            )
            update outbox.ticks t set reached_at = a.followed_at
            from ahead a where t.backend_number = a.backend_number and t.reached_at = a.reached_at",
            &[],
        );
        Self(())
    }

    /// Records that a backend has delivered everything that a tick sees. The first tick of a backend is the beginning
    /// of time.
    pub(crate) fn record(&self, number: i32, tick: &Tick) {
        run(
            &format!(
                "insert into outbox.ticks (backend_number, reached_at, {COLUMNS})
                select $1, '-infinity', '3:3:', '3', 0, 0
                where not exists (select from outbox.ticks t where t.backend_number = $1)"
            ),
            &[number.into()],
        );
        self.record_last(&[number], tick);
    }

    /// Records, for deleted backends that will deliver nothing more, a last tick up to which their events may be
    /// purged. A backend that never had a tick has nothing to purge.
    pub(crate) fn record_last(&self, numbers: &[i32], tick: &Tick) {
        let numbers = ("numbers", numbers.to_vec().into());
        run_named(
            &format!(
                "insert into outbox.ticks (backend_number, reached_at, {COLUMNS})
                select n, clock_timestamp(), {VALUES} from unnest($numbers) n
                where exists (select from outbox.ticks t where t.backend_number = n) on conflict do nothing"
            ),
            tick_parameters(tick).into_iter().chain([numbers]),
        );
    }

    /// Deletes the ticks of deleted backends that have neither a cursor nor anything left to purge. Returns the other
    /// deleted backends without a cursor: their events still have to be purged.
    pub(crate) fn of_forgotten(&self) -> Vec<i32> {
        run(
            "delete from outbox.ticks t where t.backend_number > 0
                and exists (select from outbox.installation i where i.deleted_backends @> t.backend_number)
                and not exists (select from outbox.backends b where b.number = t.backend_number)
                and not exists (select from outbox.ticks o
                    where o.backend_number = t.backend_number and o.reached_at <> t.reached_at)",
            &[],
        );
        query_column(
            "select distinct t.backend_number from outbox.ticks t where t.backend_number > 0
                and exists (select from outbox.installation i where i.deleted_backends @> t.backend_number)
                and not exists (select from outbox.backends b where b.number = t.backend_number)",
            &[],
        )
    }
}

/// Which events of a backend may be purged: those between the tick up to which events were purged and the newest tick
/// that is old enough.
pub(crate) fn purgeable(number: i32, retention_us: i64) -> Option<(Arc<Tick>, Arc<Tick>)> {
    let ticks = query(
        &format!(
            "(select {SELECTED} from outbox.ticks t where t.backend_number = $1 order by t.reached_at limit 1)
            union all
            (select {SELECTED} from outbox.ticks t
                where t.backend_number = $1 and t.reached_at <= clock_timestamp() - $2 * interval '1 microsecond'
                    and not exists (select from outbox.refused_events r
                        where r.backend_number = $1 and r.accepted_in is null)
                order by t.reached_at desc limit 1)"
        ),
        &[number.into(), retention_us.into()],
        tick_of,
    );
    match ticks.as_slice() {
        [Some(from), Some(to)] if from != to => Some((from.clone(), to.clone())),
        _ => None,
    }
}

/// Records that all events up to `tick` were purged.
pub(crate) fn purged(number: i32, tick: &Tick) {
    run(
        "delete from outbox.ticks t where t.backend_number = $1 and t.reached_at < (
            select max(o.reached_at) from outbox.ticks o where o.backend_number = $1 and o.snapshot::text = $2)",
        &[number.into(), tick.snapshot.to_string().into()],
    );
}

/// Whether there are ticks whose events are not purged yet.
pub(crate) fn ticks_wait() -> bool {
    query_value(
        "select exists (select from outbox.ticks group by backend_number having count(*) > 1)",
        &[],
    )
    .unwrap_or(false)
}

/// Runs `f`, which deletes events in steps, with a statement that is prepared only once.
pub(crate) fn delete_events<R>(f: impl FnOnce(&mut dyn FnMut(&[i64])) -> R) -> R {
    let sql = "delete from outbox.events where seq = any($1)";
    rights::writing(|| {
        Spi::connect_mut(|client| {
            let statement = client.prepare_mut(sql, &[PgOid::from(pg_sys::INT8ARRAYOID)]);
            let statement = statement.unwrap_or_else(|e| internal(e.to_string()));
            f(&mut |seqs| {
                let args = [seqs.to_vec().into()];
                let deleted = rights::execution(|| client.update(&statement, None, &args));
                deleted.map(drop).unwrap_or_else(|e| internal(e.to_string()));
            })
        })
    })
}

/// What one piece of rows that have a time of their own came to.
pub(crate) struct AgedPiece {
    pub deleted: u64,
    /// The latest time of those that were deleted, in microseconds since 2000.
    pub last_us: Option<i64>,
}

/// Deletes entries of the inbox older than their retention, at most `count`, from the time `from_us` on.
pub(crate) fn purge_inbox(retention_us: i64, count: i64, from_us: i64) -> AgedPiece {
    purge_aged(
        ("inbox", "consumed_at"),
        "consumer, event_id",
        retention_us,
        count,
        from_us,
    )
}

/// Deletes failed events older than their retention, at most `count`, from the time `from_us` on.
pub(crate) fn purge_failed(retention_us: i64, count: i64, from_us: i64) -> AgedPiece {
    purge_aged(
        ("failed_events", "failed_at"),
        "event_id, seq",
        retention_us,
        count,
        from_us,
    )
}

/// Deletes rows that have a time of their own, by their primary key. Rows that have gone are still in the index, and
/// are passed one by one, as long as somebody's snapshot may need them: so the next piece begins where this one has
/// ended.
fn purge_aged((table, time): (&str, &str), key: &str, retention_us: i64, count: i64, from_us: i64) -> AgedPiece {
    let sql = format!(
        "delete from outbox.{table} where ({key}) in (select {key} from outbox.{table}
            where {time} >= $2 and {time} <= clock_timestamp() - $1 * interval '1 microsecond'
            order by {time} limit {count} for update skip locked)
        returning {time} as at"
    );
    let args = [retention_us.into(), timestamp(from_us)];
    let times = run_kept(&sql, &args, |row| row.datum("at").map(|at| at.value() as i64));
    AgedPiece {
        deleted: times.len() as u64,
        last_us: times.into_iter().flatten().max(),
    }
}
