//! The cost of queries on a relay with much data: the queries of a probe and of a dashboard.

use crate::options::Scale;
use crate::report::{Goal, Row, Taken, thousands};
use crate::servers::{DATA, stack};
use crate::stats::median;
use kit::{Stack, wait_until};
use std::time::Instant;

/// Queries that run so often that none may take longer.
const MOST_MS: f64 = 20.0;
/// How many events are published in one transaction.
const IN_ONE_TRANSACTION: u64 = 10_000;
/// One of this many events is pending. They are spread among the others, so that counting them also meets those.
const ONE_WAITS_OF: u64 = 6;

const LOOKS: [(&str, &str); 5] = [
    ("outbox.status", "select * from outbox.status"),
    ("outbox.backend_status", "select * from outbox.backend_status"),
    ("outbox.health()", "select * from outbox.health()"),
    ("outbox.metrics", "select * from outbox.metrics"),
    ("outbox.top", "select * from outbox.top"),
];

pub(crate) fn measure(scale: &Scale) -> Taken {
    let (pending, all) = (scale.events, scale.events * ONE_WAITS_OF);
    let stack = stack();
    fill(&stack, all);
    let mut client = stack.pg.client();
    let rows = LOOKS.iter().map(|(name, sql)| {
        let times: Vec<f64> = (0..scale.runs + 1)
            .map(|_| {
                let start = Instant::now();
                client.query(*sql, &[]).expect("cannot look");
                start.elapsed().as_secs_f64() * 1_000.0
            })
            .collect();
        let explained: Vec<String> = client
            .query(&format!("explain (analyze, timing off) {sql}"), &[])
            .expect("cannot explain")
            .iter()
            .map(|row| row.get(0))
            .collect();
        let parts = explained.iter().filter(|line| line.contains(" Time: "));
        let parts: Vec<&str> = parts.map(|line| line.trim()).collect();
        // The first warms up.
        let ms = median(&times[1..]);
        eprintln!(
            "views: {name} in {ms:.1} ms (first {:.1} ms); {}",
            times[0],
            parts.join(", ")
        );
        Row::plain(
            format!(
                "{name}, {} retained and {} pending",
                thousands(all - pending),
                thousands(pending)
            ),
            ms,
            1,
            " ms",
            Goal::AtMost(MOST_MS),
        )
    });
    Taken {
        rows: rows.collect(),
        ..Taken::default()
    }
}

/// All are published without a worker. Then the events of the first backend count as sent, because its cursor is set
/// so, and those of the other are pending, because it is paused.
fn fill(stack: &Stack, count: u64) {
    let pg = &stack.pg;
    pg.set("outbox_relay.enabled", "off");
    wait_until("the worker to leave", || pg.worker_pid("postgres").is_none());
    pg.exec(
        "insert into outbox.backends (name, host, port, stream_name, enabled)
         select 'waits', host, port, 'waits', false from outbox.backends where name = 'default'",
    );
    let publish = |first: u64, last: u64| {
        let mut client = pg.client();
        let sql = format!(
            "do $$ begin for start in {first}..{last} by {IN_ONE_TRANSACTION} loop
                 insert into outbox.events (event_type, source, backend, data)
                 select 'bench.views', 'bench', case when g % {ONE_WAITS_OF} = 0 then 'waits' else 'default' end, {DATA}
                 from generate_series(start, least(start + {IN_ONE_TRANSACTION} - 1, {last})) g;
                 commit;
             end loop; end $$"
        );
        client
            .batch_execute("set synchronous_commit to off")
            .expect("cannot set");
        client.batch_execute(&sql).expect("cannot fill the outbox");
    };
    std::thread::scope(|scope| {
        scope.spawn(|| publish(1, count / 2));
        scope.spawn(|| publish(count / 2 + 1, count));
    });
    pg.exec(
        "delete from outbox.cursors;
         insert into outbox.cursors (backend_number, from_snapshot, from_next_xid, from_low_seq, from_high_seq, saved_at, state)
         select b.number, s, pg_snapshot_xmax(s), h.seq, h.seq, now(), 'idle'
         from outbox.backends b, pg_current_snapshot() s, (select max(e.seq) as seq from outbox.events e) h
         where b.name = 'default'",
    );
    for settle in ["vacuum (analyze) outbox.events", "checkpoint"] {
        pg.client().batch_execute(settle).expect("cannot settle");
    }
    pg.set("outbox_relay.enabled", "on");
    pg.wait_worker("postgres");
}
