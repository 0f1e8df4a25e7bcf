//! A good guest: others lock, rewrite and break the extension's tables, and the worker neither delays them nor gives
//! up.

use std::time::{Duration, Instant};

use kit::{
    BlackHole, LIMIT, Ledger, Load, Mode, Postgres, QUICK, Refused, Stack, ids, process, publish_many, types,
    wait_drained, wait_until,
};

#[track_caller]
fn enable(pg: &Postgres, enabled: bool) {
    pg.exec(&format!("update outbox.backends set enabled = {enabled}"));
}

/// No session was terminated, and the worker is the same as before.
#[track_caller]
fn assert_unharmed(stack: &Stack, worker: i32) {
    assert_eq!(stack.pg.worker_pid("postgres"), Some(worker));
    for word in ["PANIC", "reinitializing", "terminated by signal"] {
        assert!(!stack.pg.log().contains(word), "{word} in the log");
    }
}

fn waits_for_lock(pg: &Postgres) -> bool {
    pg.one(
        "select exists (select from pg_locks l join pg_stat_activity a using (pid) \
         where a.backend_type = 'outbox_relay worker' and not l.granted)",
    )
}

/// Five seconds and more: longer than the worker waits for a lock at a time.
#[test]
fn a_locked_table_delays_the_worker_and_nothing_else() {
    let stack = Stack::start();
    let worker = stack.pg.wait_worker("postgres");
    enable(&stack.pg, false);
    let published = publish_many(&mut stack.pg.client(), "default", "", "event", 3);
    let mut locker = stack.pg.client();
    locker
        .batch_execute("begin; lock table outbox.events in access exclusive mode")
        .unwrap();
    let start = Instant::now();
    enable(&stack.pg, true);
    stack
        .pg
        .wait_log("outbox_relay worker: canceling statement due to lock timeout");
    // It has given up once, waited, and is waiting for the lock again.
    wait_until("another wait for the lock", || waits_for_lock(&stack.pg));
    wait_until("five seconds of the lock", || start.elapsed() >= Duration::from_secs(5));
    assert_eq!(stack.events(), []);
    locker.batch_execute("commit").unwrap();
    assert_eq!(ids(&stack.wait_events(3)), published);
    assert_unharmed(&stack, worker);
}

/// A lock that outlives all sessions (of a prepared transaction) on the tables that the worker reads or writes.
#[test]
fn a_locked_table_delays_no_shutdown() {
    for table in ["outbox.events", "outbox.cursors"] {
        let mut stack = Stack::start();
        stack.pg.wait_worker("postgres");
        enable(&stack.pg, false);
        let published = publish_many(&mut stack.pg.client(), "default", "", "event", 3);
        stack.pg.exec(&format!(
            "begin; lock table {table} in access exclusive mode; prepare transaction 'lock'"
        ));
        enable(&stack.pg, true);
        wait_until("the worker to wait for the lock", || waits_for_lock(&stack.pg));
        let start = Instant::now();
        stack.pg.stop(Mode::Fast);
        let took = start.elapsed();
        assert!(
            took < Duration::from_secs(2),
            "with {table} locked the stop took {took:?}"
        );
        stack.pg.start_again();
        stack.pg.exec("rollback prepared 'lock'");
        stack.wait_events(3);
        assert_eq!(ids(&stack.events()), published);
    }
}

/// The same when only the worker's final save meets the lock.
#[test]
fn a_locked_table_does_not_delay_the_final_save() {
    let mut stack = Stack::start();
    let published = publish_many(&mut stack.pg.client(), "default", "", "event", 3);
    stack.wait_events(3);
    wait_drained(&stack.pg, "default");
    stack
        .pg
        .exec("begin; lock table outbox.cursors in access exclusive mode; prepare transaction 'lock'");
    let more = publish_many(&mut stack.pg.client(), "default", "", "more", 3);
    stack.wait_events(6);
    // Before the quarter of a second after which it would save has passed.
    let start = Instant::now();
    stack.pg.stop(Mode::Fast);
    let took = start.elapsed();
    assert!(took < Duration::from_secs(2), "the stop took {took:?}");
    stack.pg.start_again();
    stack.pg.exec("rollback prepared 'lock'");
    wait_drained(&stack.pg, "default");
    assert_eq!(ids(&stack.events()), [published, more].concat());
}

/// For each look at the worker during `time`: the age of its transaction in seconds (none: 0), whether it holds back
/// vacuum, and how many locks it holds.
fn looks(pg: &Postgres, time: Duration) -> Vec<(f64, bool, i64)> {
    let mut client = pg.client();
    let start = Instant::now();
    let mut looks = Vec::new();
    while start.elapsed() < time {
        let row = client
            .query_one(
                "select coalesce(extract(epoch from clock_timestamp() - xact_start), 0)::float8, \
                 backend_xmin is not null or backend_xid is not null, \
                 (select count(*) from pg_locks l where l.pid = a.pid) \
                 from pg_stat_activity a where backend_type = 'outbox_relay worker'",
                &[],
            )
            .expect("there is one worker");
        looks.push((row.get(0), row.get(1), row.get(2)));
    }
    looks
}

/// Meanwhile the worker does save its state, in transactions that end at once.
#[track_caller]
fn assert_holds_nothing(pg: &Postgres) {
    let looks = looks(pg, Duration::from_millis(1_500));
    let oldest = looks.iter().map(|look| look.0).fold(0.0, f64::max);
    assert!(oldest < 0.5, "a transaction of {oldest} s");
    let free = looks.iter().filter(|look| !look.1 && look.2 == 0).count();
    assert!(
        free * 100 >= looks.len() * 95,
        "it held something at {} of {} looks",
        looks.len() - free,
        looks.len()
    );
}

#[test]
fn nothing_is_held_while_redis_hangs() {
    let stack = Stack::start();
    publish_many(&mut stack.pg.client(), "default", "", "event", 3);
    stack.wait_events(3);
    stack.redis.sigstop();
    publish_many(&mut stack.pg.client(), "default", "", "event", 3);
    assert_holds_nothing(&stack.pg);
    for hole in [BlackHole::start(), BlackHole::unreachable()] {
        stack.point_at("default", "127.0.0.1", hole.port());
        publish_many(&mut stack.pg.client(), "default", "", "event", 3);
        assert_holds_nothing(&stack.pg);
    }
    // Vacuum can remove rows that were deleted after the worker had read them.
    stack
        .pg
        .exec("create table t as select generate_series(1, 1000) n; delete from t");
    let said = stack.pg.psql(&["-c", "vacuum (verbose) t"]).stderr;
    assert!(
        said.contains("1000 removed, 0 remain, 0 are dead but not yet removable"),
        "{said}"
    );
    stack.redis.sigcont();
}

/// Rewrites the table under load, in all ways that Postgres has.
#[test]
fn the_table_is_rewritten_while_it_drains() {
    let stack = Stack::with(&[("outbox_relay.redis_max_len", "0")]);
    let ledger = Ledger::create(&stack.pg);
    let worker = stack.pg.wait_worker("postgres");
    let load = Load::start(&stack.pg, 3, "");
    for statement in [
        "vacuum full outbox.events",
        "reindex table outbox.events",
        "reindex table concurrently outbox.events",
        "cluster outbox.events using events_pkey",
        "alter table outbox.events add column note text default 'none'",
        "alter table outbox.events set (fillfactor = 90)",
        "create index on outbox.events (created_at)",
        "vacuum (analyze, freeze) outbox.events",
        "alter table outbox.events drop column note",
        "vacuum full outbox.cursors",
        "alter sequence outbox.events_seq_seq owned by outbox.events.seq",
    ] {
        load.wait_more(50);
        stack.pg.exec(statement);
    }
    load.wait_more(50);
    load.stop();
    ledger.settle(&stack, LIMIT).assert_exactly_once();
    assert_unharmed(&stack, worker);
}

/// Another user's trigger prevents saving the state: the worker logs errors, and goes on when it can save again.
#[test]
fn an_error_in_the_worker_costs_neither_the_worker_nor_an_event() {
    let stack = Stack::with(QUICK);
    let worker = stack.pg.wait_worker("postgres");
    let first = stack.publish("first");
    stack.wait_events(1);
    stack.pg.exec(
        "create function broken() returns trigger language plpgsql as $$ begin raise 'the books are closed'; end $$;
         create trigger broken before insert or update on outbox.cursors execute function broken();
         alter table outbox.cursors enable always trigger broken",
    );
    let mut published = vec![first];
    published.extend(publish_many(&mut stack.pg.client(), "default", "", "event", 3));
    stack.wait_events(4);
    stack.pg.wait_log("outbox_relay worker: the books are closed");
    published.extend(publish_many(&mut stack.pg.client(), "default", "", "event", 3));
    stack.pg.exec("drop trigger broken on outbox.cursors");
    stack.wait_events(7);
    wait_drained(&stack.pg, "default");
    assert_eq!(ids(&stack.events()), published);
    assert_unharmed(&stack, worker);
    let complaints = stack.pg.log().matches("the books are closed").count();
    // Once a minute at most, however often it tries.
    assert_eq!(complaints, 1);
}

/// pg_cancel_backend() cancels nothing, or one transaction, which is repeated.
#[test]
fn a_cancelled_worker_lives_on() {
    let stack = Stack::with(&[("outbox_relay.redis_max_len", "0")]);
    let ledger = Ledger::create(&stack.pg);
    let worker = stack.pg.wait_worker("postgres");
    let load = Load::start(&stack.pg, 2, "");
    for _ in 0..20 {
        load.wait_more(5);
        assert!(stack.pg.one::<bool>(&format!("select pg_cancel_backend({worker})")));
    }
    load.stop();
    ledger.settle(&stack, LIMIT).assert_exactly_once();
    assert_unharmed(&stack, worker);
}

/// A column that somebody added: publishing fills it as an INSERT would.
#[test]
fn columns_that_were_added_to_the_table_get_their_defaults() {
    let stack = Stack::start();
    let mut client = stack.pg.client();
    let insert = "insert into outbox.events (event_type, source) values ('plain', 'kit')";
    let call = "select outbox.publish_event('called', 'kit')";
    client
        .batch_execute(
            "alter table outbox.events add note text, add gone text, add level integer not null default 1 + 2, \
             add checked text default 'a' check (checked <> 'b'); \
             alter table outbox.events drop gone",
        )
        .unwrap();
    client.batch_execute(insert).unwrap();
    client.batch_execute(call).unwrap();
    assert_eq!(types(&stack.wait_events(2)), ["plain", "called"]);
    let wrong: i64 = stack
        .pg
        .one("select count(*) from outbox.events where (note, level, checked) is distinct from (null, 3, 'a')");
    assert_eq!(wrong, 0);
    client
        .batch_execute("alter table outbox.events alter checked set default 'b'")
        .unwrap();
    assert_eq!(Refused::of(client.batch_execute(insert)).code, "23514");
    assert_eq!(Refused::of(client.batch_execute(call)).code, "23514");
}

#[test]
fn memory_does_not_grow_with_the_backlog() {
    const COUNT: i32 = 100_000;
    let stack = Stack::with(&[
        ("outbox_relay.redis_max_len", "0"),
        ("outbox_relay.published_retention", "-1"),
    ]);
    stack.publish("first");
    stack.wait_events(1);
    let worker = stack.pg.wait_worker("postgres");
    let idle_kb = process::memory_kb(worker);
    enable(&stack.pg, false);
    stack.pg.exec(&format!(
        "select outbox.publish_event('event', 'kit', jsonb_build_object('n', n, 'text', repeat('x', 200))) \
         from generate_series(1, {COUNT}) n"
    ));
    enable(&stack.pg, true);
    let mut most_kb = idle_kb;
    wait_until("the backlog in its stream", || {
        most_kb = most_kb.max(process::memory_kb(worker));
        stack.redis.xlen("events") > COUNT as usize
    });
    assert_unharmed(&stack, worker);
    assert!(
        most_kb < idle_kb + 20 * 1_024,
        "{idle_kb} kB when idle, {most_kb} kB while draining"
    );
    assert!(!process::title(worker).is_empty());
}

/// Postgres forgets all of a session's plans when `session_replication_role` changes.
#[test]
fn neither_views_nor_acts_cost_a_session_its_plans() {
    let stack = Stack::start();
    let mut client = stack.pg.client();
    client
        .batch_execute(
            "set plan_cache_mode = force_generic_plan; set log_planner_stats = on;
             prepare kept as select count(*) from pg_catalog.pg_class; execute kept",
        )
        .expect("prepared");
    let planned = || stack.pg.log().matches("PLANNER STATISTICS").count();
    wait_until("the plan is logged", || planned() > 0);
    for from in [
        "outbox.status",
        "outbox.backend_status",
        "outbox.top",
        "outbox.metrics",
        "outbox.health()",
        "outbox.publish_event('t', 's')",
        "outbox.erase(gen_random_uuid())",
        "outbox.retry_failed()",
        "outbox.discard_failed()",
        "outbox.replay('default', '-infinity')",
        "outbox.consume_once('c', gen_random_uuid())",
        "outbox.set_backend_password('default', null)",
    ] {
        client
            .batch_execute(&format!("set log_planner_stats = off; select from {from}"))
            .unwrap_or_else(|error| panic!("{from}: {error:?}"));
        let before = planned();
        client
            .batch_execute("set log_planner_stats = on; execute kept")
            .expect("executed");
        assert_eq!(planned(), before, "{from}");
    }
}
