//! The catalog of backends: the effect of a changed row on pending events and on events that are not committed yet.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use kit::process::memory_kb;
use kit::{
    BlackHole, Postgres, QUICK, Redis, Refused, Stack, ids, publish_many, standing, types, wait_drained, wait_eq,
    wait_trouble, wait_until,
};
use postgres::Client;
use uuid::Uuid;

/// Nothing recovers by itself within an hour here: whatever happens at once, happens because of the change.
const PATIENT: &[(&str, &str)] = &[
    ("outbox_relay.retry_delay", "1h"),
    ("outbox_relay.retry_max_delay", "1h"),
    ("outbox_relay.poll_interval", "1h"),
    ("outbox_relay.redis_connect_timeout", "1min"),
    ("outbox_relay.redis_socket_timeout", "1min"),
];

fn patient() -> Stack {
    Stack::with(PATIENT)
}

/// A backend of this name in the stack's Redis, with a stream of the same name.
fn add(stack: &Stack, name: &str) {
    stack.pg.exec(&format!(
        "insert into outbox.backends (name, host, port, stream_name) values ('{name}', '127.0.0.1', {}, '{name}')",
        stack.redis.port()
    ));
}

/// A session with one event published to this backend, not committed.
fn publisher(pg: &Postgres, backend: &str) -> (Client, Uuid) {
    let mut client = pg.client();
    client.batch_execute("begin").expect("begin");
    let id = publish_many(&mut client, backend, "", "uncommitted", 1)[0];
    (client, id)
}

fn commit(mut client: Client) {
    client.batch_execute("commit").expect("commit");
}

#[track_caller]
fn assert_soon(start: Instant) {
    assert!(
        start.elapsed() < Duration::from_millis(1_500),
        "that took {:?}",
        start.elapsed()
    );
}

#[test]
fn a_backend_is_used_in_the_transaction_that_made_it() {
    let stack = patient();
    // Fills the session's cache first.
    let mut client = stack.pg.client();
    publish_many(&mut client, "default", "", "before", 1);
    let mut transaction = client.transaction().expect("begin");
    let sql = format!(
        "insert into outbox.backends (name, host, port, stream_name) values ('new', '127.0.0.1', {}, 'new')",
        stack.redis.port()
    );
    transaction.batch_execute(&sql).expect("insert");
    let id: Uuid = transaction
        .query_one("select outbox.publish_event('t', 'kit', backend => 'new')", &[])
        .expect("publish")
        .get(0);
    let start = Instant::now();
    transaction.commit().expect("commit");
    assert_eq!(ids(&stack.redis.wait_entries("new", 1)), [id]);
    assert_soon(start);

    let mut transaction = client.transaction().expect("begin");
    transaction
        .batch_execute("insert into outbox.backends (name) values ('never')")
        .expect("insert");
    transaction
        .batch_execute("select outbox.publish_event('t', 'kit', backend => 'never')")
        .expect("publish");
    transaction.rollback().expect("rollback");
    let refused = Refused::of(client.query("select outbox.publish_event('t', 'kit', backend => 'never')", &[]));
    assert_eq!(
        (refused.code.as_str(), refused.message.as_str()),
        ("42704", "backend \"never\" does not exist")
    );
}

/// The worker may see the rows of such a transaction before it learns of the backend, above all while it is busy
/// reading.
#[test]
fn events_published_together_with_their_backend_are_delivered() {
    let stack = patient();
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let busy = scope.spawn(|| {
            let mut client = stack.pg.client();
            while !stop.load(Ordering::Relaxed) {
                publish_many(&mut client, "default", "", "busy", 1);
            }
        });
        for n in 0..40 {
            stack.pg.exec(&format!(
                "insert into outbox.backends (name, host, port, stream_name) values ('b{n}', '127.0.0.1', {}, 'b{n}');
                select outbox.publish_event('t', 'kit', backend => 'b{n}')",
                stack.redis.port()
            ));
        }
        stop.store(true, Ordering::Relaxed);
        busy.join().expect("no panic");
    });
    for n in 0..40 {
        wait_eq("entries, or failed events", (1, 0), || {
            (
                stack.redis.xlen(&format!("b{n}")),
                stack.pg.one::<i64>("select count(*) from outbox.failed_events"),
            )
        });
    }
}

#[test]
fn a_disabled_backend_pauses_and_goes_on_at_once() {
    let stack = patient();
    stack.publish("before");
    stack.wait_events(1);
    stack.pg.exec("update outbox.backends set enabled = false");
    let expected = publish_many(&mut stack.pg.client(), "default", "", "t", 150);
    add(&stack, "other");
    publish_many(&mut stack.pg.client(), "other", "", "t", 1);
    stack.redis.wait_entries("other", 1);
    wait_eq("pending events", 150, || standing(&stack.pg, "default").pending);
    let paused = standing(&stack.pg, "default");
    assert_eq!((paused.state.as_str(), paused.will_try_again), ("paused", false));
    assert_eq!(stack.redis.xlen("events"), 1);

    let start = Instant::now();
    stack.pg.exec("update outbox.backends set enabled = true");
    assert_eq!(ids(&stack.wait_events(151))[1..], expected);
    assert_soon(start);
    wait_drained(&stack.pg, "default");
    assert_eq!(standing(&stack.pg, "default").state, "idle");
}

/// Whether the worker hangs in connecting, waits for a reply or would retry in an hour: it uses the new address at
/// once.
#[test]
fn another_address_is_used_at_once_whatever_the_old_one_does() {
    let stack = patient();
    let (silent, gone) = (BlackHole::start(), BlackHole::unreachable());
    let dead = Redis::start();
    let dead_port = dead.port();
    drop(dead);
    for (n, port) in [silent.port(), gone.port(), dead_port].into_iter().enumerate() {
        stack.point_at("default", "127.0.0.1", port);
        stack.publish("t");
        if port == silent.port() {
            wait_until("a connection", || silent.accepted() > 0);
        } else if port == dead_port {
            wait_trouble(&stack.pg, "default", "backoff", "refused");
        }
        assert_eq!(stack.redis.xlen("events"), n);
        let start = Instant::now();
        stack.point("default", &stack.redis);
        assert_eq!(stack.wait_events(n + 1).len(), n + 1);
        assert_soon(start);
    }
    wait_drained(&stack.pg, "default");
    assert_eq!(standing(&stack.pg, "default").state, "idle");
}

#[test]
fn a_renamed_backend_keeps_its_events() {
    let stack = patient();
    add(&stack, "old");
    let (client, id) = publisher(&stack.pg, "old");
    stack
        .pg
        .exec("update outbox.backends set name = 'new' where name = 'old'");
    commit(client);
    assert_eq!(ids(&stack.redis.wait_entries("old", 1)), [id]);
    assert_eq!(
        Refused::of(
            stack
                .pg
                .client()
                .query("select outbox.publish_event('t', 'kit', backend => 'old')", &[])
        )
        .code,
        "42704"
    );
    let after = publish_many(&mut stack.pg.client(), "new", "", "t", 1);
    assert_eq!(ids(&stack.redis.wait_entries("old", 2)), [id, after[0]]);
    let shown: String = stack.pg.one(&format!(
        "select backend from outbox.event_status where event_id = '{id}'"
    ));
    assert_eq!((shown.as_str(), stack.redis.xlen("events")), ("new", 0));

    // Two backends that swap their names keep their events, too.
    stack
        .pg
        .exec("update outbox.backends set stream_name = 'events' where name = 'default'");
    let (one, first) = publisher(&stack.pg, "default");
    let (two, second) = publisher(&stack.pg, "new");
    stack.pg.exec(
        "update outbox.backends set name = 'x' where name = 'new'; update outbox.backends set name = 'new' where name = 'default';
        update outbox.backends set name = 'default' where name = 'x'",
    );
    commit(one);
    commit(two);
    assert_eq!(ids(&stack.wait_events(1)), [first]);
    assert_eq!(ids(&stack.redis.wait_entries("old", 3))[2], second);
}

#[test]
fn a_backend_with_waiting_events_is_not_deleted() {
    let mut stack = Stack::of(
        Postgres::with(QUICK).with(&[("outbox_relay.max_retries", "1000")]),
        Redis::start(),
    );
    let delete = || {
        stack
            .pg
            .client()
            .execute("delete from outbox.backends where name = 'b'", &[])
    };
    let refused = || {
        let said = Refused::of(delete());
        assert_eq!(
            (said.code.as_str(), said.message.as_str()),
            ("55006", "backend \"b\" has waiting events")
        );
        assert!(said.detail.is_some() && said.hint.is_some(), "{said:?}");
    };
    // With no events at all, and with events delivered a moment ago.
    add(&stack, "b");
    assert_eq!(delete().expect("nothing waits"), 1);
    add(&stack, "b");
    publish_many(&mut stack.pg.client(), "b", "", "t", 20);
    stack.redis.wait_entries("b", 20);
    assert_eq!(delete().expect("all were delivered"), 1);
    // Scheduled, refused and being retried, paused.
    add(&stack, "b");
    stack
        .pg
        .exec("select outbox.publish_event('t', 'kit', backend => 'b', scheduled_at => now() + interval '1 day')");
    refused();
    stack.pg.exec("delete from outbox.scheduled_events");
    stack.redis.call(&["SET", "bad", "a string"]);
    publish_many(&mut stack.pg.client(), "b", "bad", "t", 1);
    wait_eq("refused events", 1, || {
        stack.pg.one::<i64>("select count(*) from outbox.refused_events")
    });
    refused();
    stack.redis.call(&["DEL", "bad"]);
    stack.redis.wait_entries("bad", 1);
    stack
        .pg
        .exec("update outbox.backends set enabled = false where name = 'b'");
    publish_many(&mut stack.pg.client(), "b", "", "t", 1);
    refused();
    stack
        .pg
        .exec("update outbox.backends set enabled = true where name = 'b'");
    stack.redis.wait_entries("b", 21);
    assert_eq!(delete().expect("all were delivered"), 1);
    // During an outage.
    add(&stack, "b");
    stack.redis.shutdown();
    publish_many(&mut stack.pg.client(), "b", "", "t", 1);
    assert_eq!(
        Refused::of(
            stack
                .pg
                .client()
                .execute("delete from outbox.backends where name = 'b'", &[])
        )
        .code,
        "55006"
    );
}

/// Also where somebody has made the indexes anew, so that they do not tell whose a row is.
#[test]
fn a_backend_with_one_event_behind_very_many_of_others_is_not_deleted() {
    let stack = Stack::start();
    add(&stack, "b");
    stack.pg.exec(
        "alter table outbox.events drop constraint events_pkey, add primary key (seq);
        drop index outbox.events_xid_idx; create index events_xid_idx on outbox.events (xid, seq)",
    );
    stack.pg.exec("update outbox.backends set enabled = false");
    publish_many(&mut stack.pg.client(), "default", "", "t", 110_000);
    publish_many(&mut stack.pg.client(), "b", "", "t", 1);
    let delete = "delete from outbox.backends where name = 'b'";
    assert_eq!(Refused::of(stack.pg.client().execute(delete, &[])).code, "55006");
}

/// A publisher that commits after its backend was deleted: its event fails for that reason, even if another backend has
/// the name now.
#[test]
fn events_of_a_deleted_backend_fail_and_those_of_its_namesake_arrive() {
    let stack = patient();
    add(&stack, "b");
    publish_many(&mut stack.pg.client(), "b", "", "t", 1);
    stack.redis.wait_entries("b", 1);
    let (early, early_id) = publisher(&stack.pg, "b");
    let (late, late_id) = publisher(&stack.pg, "b");
    stack.pg.exec("delete from outbox.backends where name = 'b'");
    commit(early);
    let failed = |id: Uuid| -> i64 {
        stack.pg.one(&format!("select count(*) from outbox.failed_events where event_id = '{id}' and last_error = 'its backend was deleted'"))
    };
    wait_eq("failed events", 1, || failed(early_id));

    add(&stack, "b");
    let new = publish_many(&mut stack.pg.client(), "b", "", "new", 2);
    assert_eq!(ids(&stack.redis.wait_entries("b", 3))[1..], new);
    commit(late);
    wait_eq("failed events", 1, || failed(late_id));
    assert_eq!(stack.redis.xlen("b"), 3);
    wait_drained(&stack.pg, "b");
    assert_eq!(standing(&stack.pg, "b").published, 2);
    // They can be sent to the backend that has the name now.
    assert_eq!(stack.pg.one::<i64>("select outbox.retry_failed(backend => 'b')"), 2);
    assert_eq!(ids(&stack.redis.wait_entries("b", 5))[3..], [early_id, late_id]);
}

/// Deleted before the worker has read anything of it.
#[test]
fn events_of_a_backend_that_was_deleted_at_once_fail() {
    let mut stack = patient();
    stack.pg.set("outbox_relay.enabled", "off");
    wait_eq("the worker", None, || stack.pg.worker_pid("postgres"));
    add(&stack, "b");
    let (client, id) = publisher(&stack.pg, "b");
    stack.pg.exec("delete from outbox.backends where name = 'b'");
    commit(client);
    stack.pg.set("outbox_relay.enabled", "on");
    let failed = "select coalesce((select event_id::text || ' ' || last_error from outbox.failed_events), '')";
    wait_eq("failed events", format!("{id} its backend was deleted"), || {
        stack.pg.one(failed)
    });
    stack.pg.restart();
    stack.publish("t");
    assert_eq!(types(&stack.wait_events(1)), ["t"]);
    assert_eq!(stack.pg.one::<i64>("select count(*) from outbox.failed_events"), 1);
}

/// Ten of twenty backends are down, in three ways, with a backlog each.
#[test]
fn ten_backends_that_are_down_cost_ten_others_neither_time_nor_memory() {
    let stack = Stack::of(
        Postgres::with(QUICK).with(&[("outbox_relay.max_event_size", "64kB")]),
        Redis::start(),
    );
    let (silent, gone) = (BlackHole::start(), BlackHole::unreachable());
    let dead_port = {
        let dead = Redis::start();
        dead.port()
    };
    for n in 0..10 {
        add(&stack, &format!("up{n}"));
        let port = [silent.port(), gone.port(), dead_port][n % 3];
        stack.pg.exec(&format!(
            "insert into outbox.backends (name, host, port) values ('down{n}', '127.0.0.1', {port})"
        ));
    }
    let worker = stack.pg.wait_worker("postgres");
    let before = memory_kb(worker);
    // 100 MB for the backends that are down.
    stack.pg.exec(
        "select outbox.publish_event('t', 'kit', jsonb_build_object('text', repeat('x', 10000)), backend => name)
        from generate_series(1, 1000), outbox.backends where name like 'down%'",
    );
    for round in 1..=10 {
        let start = Instant::now();
        stack.pg.exec(
            "select outbox.publish_event('t', 'kit', backend => name) from outbox.backends where name like 'up%'",
        );
        for n in 0..10 {
            stack.redis.wait_entries(&format!("up{n}"), round);
        }
        assert_soon(start);
    }
    for n in 0..10 {
        let down = standing(&stack.pg, &format!("down{n}"));
        assert_eq!((down.pending, down.published), (1_000, 0));
    }
    let grown = memory_kb(worker).saturating_sub(before);
    assert!(grown < 30_000, "the worker has grown by {grown} kB");
    assert_eq!(stack.pg.wait_worker("postgres"), worker);
    stack.pg.exec(&format!(
        "update outbox.backends set port = {}, stream_name = name where name like 'down%'",
        stack.redis.port()
    ));
    for n in 0..10 {
        stack.redis.wait_entries(&format!("down{n}"), 1_000);
    }
}
