//! Large works of an administrator, one by one: how long each takes, what the events of others take meanwhile, how much
//! memory the worker needs, and how soon the work ends when it is cancelled. A work whose time an event grows with the
//! number of events shows in two runs: `--events 100000`, `--events 300000`. `BENCH_WORKS=replay,purge` in the
//! environment chooses works by parts of their names.

use crate::load::{self, Pace};
use crate::options::Scale;
use crate::others::{OTHERS_RATE, fill_events, others, stack};
use crate::probe::{anonymous_kb, most_anonymous_kb};
use crate::report::{Goal, Row, Taken, thousands};
use crate::servers::{DATA, wait_long};
use crate::stats::quantile;
use kit::Stack;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

/// A cancelled work has run for so long.
const CANCELLED_AFTER: Duration = Duration::from_millis(700);
/// Others are watched in pieces of so many seconds.
const PIECE_SECONDS: f64 = 1.0;

struct Work {
    name: &'static str,
    /// Makes what it works on, `$rows` of them; also once more after a part of it was done.
    prepare: &'static str,
    /// Set to 0 when it begins.
    setting: Option<&'static str>,
    /// One transaction, or a procedure.
    statement: &'static str,
    /// SQL of a number that is 0 when all is done that it entails.
    left: &'static str,
    /// It works on one row of so many.
    one_of: u64,
}

/// Failed events, of those that are retained.
const FAIL: &str = "insert into outbox.failed_events (seq, xid, created_at, event_id, backend_number, branch, event_type, source, backend, data,
        subject, stream, data_schema, publisher_config, max_retries, published_by, attempts, last_error)
    select seq, xid, created_at, event_id, backend_number, branch, event_type, source, backend, data, subject, stream, data_schema,
        publisher_config, max_retries, published_by, 1, 'bench' from outbox.events where event_type = 'bench.cost' on conflict do nothing";
const NOTHING_LEFT: &str = "select 0::bigint";
const PENDING: &str = "select pending from outbox.backend_status where backend = 'default'";
const RETAINED: &str = "select count(*) from (select from outbox.events where event_type = 'bench.cost' limit 1) e";

const WORKS: [Work; 13] = [
    Work {
        name: "(floor: DELETE and INSERT of as many rows in a plain table)",
        prepare: "create table if not exists plain (like outbox.events including indexes); truncate plain;
            insert into plain select * from outbox.events where event_type = 'bench.cost'",
        setting: None,
        statement: "with gone as (delete from plain returning *)
            insert into plain (seq, xid, created_at, event_id, backend_number, branch, event_type, source, backend, data)
            select seq + 100000000, xid, created_at, event_id, backend_number, branch, event_type, source, backend, data from gone",
        left: NOTHING_LEFT,
        one_of: 1,
    },
    Work {
        name: "outbox.replay()",
        prepare: "truncate plain",
        setting: None,
        statement: "select outbox.replay('default', '-infinity', event_type => 'bench.cost')",
        left: PENDING,
        one_of: 1,
    },
    Work {
        name: "outbox.retry_failed()",
        prepare: FAIL,
        setting: None,
        statement: "select outbox.retry_failed()",
        left: PENDING,
        one_of: 1,
    },
    Work {
        name: "outbox.retry_all_failed()",
        prepare: FAIL,
        setting: None,
        statement: "call outbox.retry_all_failed()",
        left: PENDING,
        one_of: 1,
    },
    Work {
        name: "outbox.discard_failed()",
        prepare: FAIL,
        setting: None,
        statement: "select outbox.discard_failed()",
        left: NOTHING_LEFT,
        one_of: 1,
    },
    Work {
        name: "the worker purges failed events",
        prepare: FAIL,
        setting: Some("outbox_relay.failed_retention"),
        statement: "select 1",
        left: "select count(*) from (select from outbox.failed_events limit 1) f",
        one_of: 1,
    },
    Work {
        name: "outbox.erase(), event by event",
        prepare: "",
        setting: None,
        statement: "select count(outbox.erase(event_id)) from outbox.events where event_type = 'bench.cost' and seq % 20 = 0",
        left: NOTHING_LEFT,
        one_of: 20,
    },
    Work {
        name: "UPDATE of an attached table",
        prepare: "create table if not exists bulk (id bigint primary key, n integer);
            insert into bulk select g, 0 from generate_series(1, $rows) g on conflict do nothing;
            select outbox.attach_table('bulk', 'bench.attached')",
        setting: None,
        statement: "update bulk set n = n + 1",
        left: PENDING,
        one_of: 1,
    },
    Work {
        name: "outbox.import_django_broadcaster()",
        prepare: "",
        setting: None,
        statement: "select count(*) from outbox.import_django_broadcaster('outbox_events', false)",
        left: PENDING,
        one_of: 1,
    },
    Work {
        name: "DELETE of a backend with waiting events, refused",
        prepare: "insert into outbox.backends (name, host, port, stream_name, enabled)
                select 'bulk', host, port, 'bulk', false from outbox.backends where name = 'default' on conflict do nothing;
            insert into outbox.events (event_type, source, backend, data) select 'bench.waiting', 'bench', 'bulk', $data
                from generate_series(1, $rows) g where not exists (select from outbox.events where backend = 'bulk')",
        setting: None,
        statement: "do $$ begin delete from outbox.backends where name = 'bulk'; exception when object_in_use then null; end $$",
        left: NOTHING_LEFT,
        one_of: 1,
    },
    Work {
        name: "DELETE of waiting events, and of their backend",
        prepare: "",
        setting: None,
        statement: "delete from outbox.events where backend = 'bulk'; delete from outbox.backends where name = 'bulk'",
        left: NOTHING_LEFT,
        one_of: 1,
    },
    Work {
        name: "CALL outbox.purge() beside the worker",
        prepare: "",
        setting: Some("outbox_relay.published_retention"),
        statement: "call outbox.purge()",
        left: RETAINED,
        one_of: 1,
    },
    Work {
        name: "events of a deleted backend fail",
        prepare: "insert into outbox.backends (name, host, port, stream_name) select 'gone', host, port, 'gone' from outbox.backends where name = 'default'",
        setting: None,
        statement: "insert into outbox.events (event_type, source, backend, data) select 'bench.gone', 'bench', 'gone', $data from generate_series(1, $rows) g",
        left: "select $rows - count(*) from outbox.failed_events where event_type = 'bench.gone'",
        one_of: 1,
    },
];

/// What one work came to.
struct Outcome {
    /// Of the statement, and until all is done that it entails.
    statement: f64,
    seconds: f64,
    /// p50 and p99 of the others, in milliseconds: while it lasted, and alone.
    beside: [f64; 2],
    alone: [f64; 2],
    memory_mb: f64,
    /// How long it took to end once it was cancelled; `None`: it had ended by itself.
    cancelled: Option<f64>,
}

fn shares(times: &[f64]) -> [f64; 2] {
    [0.5, 0.99].map(|share| quantile(times, share))
}

/// The others' times until `ends`, which is asked each second or so.
fn watch(stack: &Stack, ends: impl Fn() -> bool) -> Vec<f64> {
    let pace = Pace {
        clients: 1,
        transactions_per_second: OTHERS_RATE,
        events: 1,
        seconds: PIECE_SECONDS,
    };
    let mut times = Vec::new();
    while !ends() {
        times.extend(load::run(stack, &others(), pace).times.iter().map(|(_, took)| took));
    }
    times
}

fn filled(sql: &str, rows: u64) -> String {
    sql.replace("$rows", &rows.to_string()).replace("$data", DATA)
}

fn prepare(stack: &Stack, work: &Work, rows: u64) {
    // Discarded events are gone.
    let retained: i64 = stack
        .pg
        .one("select count(*) from outbox.events where event_type = 'bench.cost'");
    if (retained as u64) < rows {
        fill_events(stack, rows - retained as u64);
    }
    let mut client = stack.pg.client();
    let sql = match work.name.starts_with("outbox.import") {
        true => format!(
            "drop table if exists outbox_events; {}; {OLD_ROWS}",
            include_str!("../../tests/django_broadcaster/schema.sql")
        ),
        false => work.prepare.to_owned(),
    };
    for sql in [
        "set synchronous_commit to off",
        &filled(&sql, rows),
        "vacuum analyze outbox.failed_events",
    ] {
        client
            .batch_execute(sql)
            .unwrap_or_else(|error| panic!("{sql}: {error:?}"));
    }
}

const OLD_ROWS: &str = "insert into outbox_events (id, spec_version, event_type, source, subject, data_content_type, data_schema, data, status,
        created_at, updated_at, scheduled_at, retry_count, max_retries, last_error, publisher_backend, publisher_config)
    select gen_random_uuid(), '1.0', 'bench.import', 'bench', '', 'application/json', '', jsonb_build_object('n', g), 'pending',
        now(), now(), now(), 0, 3, '', '', '{}' from generate_series(1, $rows) g";

/// Cancels the statement after a while. How long it took to end; `None`: it was done before.
fn cancelled(stack: &Stack, sql: &str) -> Option<f64> {
    let mut client = stack.pg.client();
    let pid: i32 = client.query_one("select pg_backend_pid()", &[]).expect("a pid").get(0);
    std::thread::scope(|scope| {
        let ended = scope.spawn(move || {
            let result = client.batch_execute(sql);
            (result.is_err(), Instant::now())
        });
        std::thread::sleep(CANCELLED_AFTER);
        let at = Instant::now();
        stack.pg.exec(&format!("select pg_cancel_backend({pid})"));
        let (is_cancelled, ended) = ended.join().expect("no panic");
        is_cancelled.then(|| ended.saturating_duration_since(at).as_secs_f64())
    })
}

/// Until this number is 0. What a paused backend has waits for ever.
fn wait_none(stack: &Stack, left: &str) {
    let mut client = stack.pg.client();
    wait_long(|| {
        // Looking costs something, too.
        std::thread::sleep(Duration::from_millis(100));
        client.query_one(left, &[]).expect("readable").get::<_, i64>(0) <= 0
    });
}

/// A transaction that knows the backend publishes for it, and it is deleted before that commits.
fn publish_for_deleted(stack: &Stack, sql: &str) {
    let mut client = stack.pg.client();
    client.batch_execute(&format!("begin; {sql}")).expect("published");
    stack.pg.exec("delete from outbox.backends where name = 'gone'");
    client.batch_execute("commit").expect("committed");
}

fn measured(stack: &Stack, work: &Work, rows: u64) -> Outcome {
    prepare(stack, work, rows);
    let sql = filled(work.statement, rows);
    let is_of_deleted = work.prepare.contains("'gone'");
    let can_be_cancelled = !is_of_deleted && work.setting.is_none();
    let cancelled = can_be_cancelled.then(|| cancelled(stack, &sql)).flatten();
    wait_none(stack, PENDING);
    if can_be_cancelled {
        prepare(stack, work, rows);
    }
    let worker = stack.pg.wait_worker("postgres");
    let before = anonymous_kb(worker);
    let started = Instant::now();
    let alone = shares(&watch(stack, || started.elapsed() >= Duration::from_secs(3)));
    let is_over = AtomicBool::new(false);
    let (mut statement, mut seconds) = (0.0, 0.0);
    let (beside, most) = std::thread::scope(|scope| {
        scope.spawn(|| {
            // Others have begun.
            std::thread::sleep(Duration::from_millis(300));
            let start = Instant::now();
            work.setting.into_iter().for_each(|setting| stack.pg.set(setting, "0"));
            match is_of_deleted {
                true => publish_for_deleted(stack, &sql),
                false => stack.pg.exec(&sql),
            }
            statement = start.elapsed().as_secs_f64();
            wait_none(stack, &filled(work.left, rows));
            seconds = start.elapsed().as_secs_f64();
            is_over.store(true, Ordering::SeqCst);
        });
        let is_over = || is_over.load(Ordering::SeqCst);
        let most = scope.spawn(move || most_anonymous_kb(worker, is_over));
        (watch(stack, is_over), most.join().expect("no panic"))
    });
    if let Some(setting) = work.setting {
        stack.pg.exec(&format!("alter system reset {setting}"));
        stack.pg.exec("select pg_reload_conf()");
    }
    Outcome {
        statement,
        seconds,
        beside: shares(&beside),
        alone,
        memory_mb: most.saturating_sub(before) as f64 / 1024.0,
        cancelled,
    }
}

pub(crate) fn measure(scale: &Scale) -> Taken {
    // Segments of the WAL that are recycled: a new one is filled with zeros first, and all commits wait for that.
    let stack = stack(&[
        ("min_wal_size", "2GB"),
        ("max_wal_size", "4GB"),
        ("outbox_relay.redis_max_len", "1000"),
        ("log_min_messages", "warning"),
    ]);
    let count = scale.events;
    fill_events(&stack, count);
    stack.pg.exec("vacuum analyze outbox.events");
    eprintln!(
        "| work | rows | statement, all of it | an event | others' p50 beside, alone | p99 beside, alone | worker's memory | cancelled |"
    );
    let mut rows = Vec::new();
    let chosen = std::env::var("BENCH_WORKS").unwrap_or_default();
    let is_chosen = |work: &&Work| chosen.split(',').any(|part| work.name.contains(part));
    for work in WORKS.iter().filter(is_chosen) {
        let Outcome {
            statement,
            seconds,
            beside,
            alone,
            memory_mb,
            cancelled,
        } = measured(&stack, work, count);
        let of_rows = count / work.one_of;
        let us = seconds / of_rows as f64 * 1e6;
        let cancelled = cancelled.map_or("-".to_owned(), |took| format!("{:.0} ms", took * 1e3));
        eprintln!(
            "| {} | {} | {statement:.1} s, {seconds:.1} s | {us:.1} us | {:.2}, {:.2} ms | {:.1}, {:.1} ms | +{memory_mb:.1} MiB | {cancelled} |",
            work.name,
            thousands(of_rows),
            beside[0],
            alone[0],
            beside[1],
            alone[1],
        );
        let of = format!("{}, {} rows", work.name, thousands(of_rows));
        rows.push(Row::plain(format!("{of}: time an event"), us, 1, " us", Goal::None));
        for (index, share) in ["p50", "p99"].iter().enumerate() {
            let is_ours = !work.name.starts_with('(');
            let goal = if index == 0 && is_ours {
                Goal::AtMost(2.0)
            } else {
                Goal::None
            };
            let title = format!("another backend's {share} beside {of}");
            rows.push(Row::longer(title, &[beside[index]], &[alone[index]], goal));
        }
        let title = format!("worker's memory above idle beside {of}");
        rows.push(Row::plain(title, memory_mb, 1, " MiB", Goal::AtMost(32.0)));
    }
    Taken {
        rows,
        ..Taken::default()
    }
}
