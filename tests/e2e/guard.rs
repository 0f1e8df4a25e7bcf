//! The guard: its fields while its owner works, idles and has stopped; servers that share a stream have a guard each.

use std::time::{Duration, Instant};

use kit::{
    Guard, Ledger, Load, Mode, Postgres, Redis, Refused, Stack, UNTRIMMED, ids, publish_many, types, wait_drained,
    wait_eq, wait_until,
};
use uuid::Uuid;

/// The numbers of batches after the first claim begin here.
const EPOCH: u64 = 1 << 40;

/// Publishes to the backend `default` of a database, in one transaction.
fn publish(pg: &Postgres, db: &str, prefix: &str, count: i32) -> Vec<Uuid> {
    publish_many(&mut pg.client_db(db), "default", "", prefix, count)
}

/// Creates the extension in a database and points its backend to a Redis.
fn point(pg: &Postgres, db: &str, redis: &Redis) {
    pg.exec_db(db, "create extension if not exists outbox_relay");
    let port = redis.port();
    pg.exec_db(
        db,
        &format!("update outbox.backends set host = '127.0.0.1', port = {port} where name = 'default'"),
    );
}

fn key(pg: &Postgres, db: &str) -> String {
    pg.one_db(db, "select outbox.guard_key('default')")
}

/// Sorted, to compare lists without an order.
fn sorted(mut ids: Vec<Uuid>) -> Vec<Uuid> {
    ids.sort_unstable();
    ids
}

#[test]
fn the_guard_names_its_owner_and_the_last_position() {
    let stack = Stack::with(&[("outbox_relay.poll_interval", "1h")]);
    let mut client = stack.pg.client();
    publish_many(&mut client, "default", "", "first", 3);
    stack.wait_events(3);
    let first = stack.guard();
    let fields: Vec<&str> = first.0.keys().map(String::as_str).collect();
    assert_eq!(
        fields,
        [
            "again",
            "beat",
            "compares",
            "incarnation",
            "interval_ms",
            "number",
            "own_stream",
            "place",
            "position",
            "previous",
            "released",
            "system",
            "timeline",
            "token",
            "total",
            "wal"
        ]
    );
    let data = stack.pg.data_dir().display().to_string();
    let place = first.field("place");
    assert!(
        place.contains(&format!(":{data}#")) && !place.starts_with(':'),
        "{place}"
    );
    let system: String = stack.pg.one("select system_identifier::text from pg_control_system()");
    let known: String = stack
        .pg
        .one("select incarnation::text from outbox.incarnations order by number desc limit 1");
    assert_eq!(
        [
            "system",
            "incarnation",
            "timeline",
            "interval_ms",
            "released",
            "again",
            "compares"
        ]
        .map(|name| first.field(name)),
        [system.as_str(), &known, "1", "3600000", "0", "", "0"]
    );
    // The claim of a new guard counts as an empty batch.
    assert_eq!((first.number("number"), first.number("total")), (EPOCH + 2, 3));
    assert_eq!(first.field("token").len(), 32);
    let wal = |guard: &Guard| -> bool {
        let sql = format!(
            "select '0/0'::pg_lsn + {} <= pg_current_wal_flush_lsn()",
            guard.number("wal")
        );
        stack.pg.one(&sql)
    };
    assert!(first.number("wal") > 0 && wal(&first), "{first:?}");

    publish_many(&mut client, "default", "", "second", 2);
    stack.wait_events(5);
    let second = stack.guard();
    assert_eq!((second.number("number"), second.number("total")), (EPOCH + 3, 5));
    assert_eq!(second.field("previous"), first.field("position"));
    assert_ne!(second.field("position"), first.field("position"));
    assert!(second.number("wal") > first.number("wal") && wal(&second), "{second:?}");
    for unchanged in ["token", "incarnation", "place", "beat"] {
        assert_eq!(second.field(unchanged), first.field(unchanged));
    }
    // Another connection is another claim, of the same owner.
    stack.redis.call(&["CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes"]);
    publish_many(&mut client, "default", "", "third", 1);
    stack.wait_events(6);
    let third = stack.guard();
    assert_eq!((third.number("number"), third.number("total")), (2 * EPOCH + 1, 6));
    assert_ne!(third.field("token"), first.field("token"));
    assert_eq!(third.field("incarnation"), first.field("incarnation"));
    // A restart is another incarnation in the same place; a worker that comes back is not.
    stack
        .pg
        .exec("select pg_terminate_backend(pid) from pg_stat_activity where backend_type = 'outbox_relay worker'");
    publish_many(&mut stack.pg.client(), "default", "", "fourth", 1);
    stack.wait_events(7);
    assert_eq!(stack.guard().field("incarnation"), first.field("incarnation"));
    stack.pg.kill_worker();
    publish_many(&mut stack.pg.client(), "default", "", "fifth", 1);
    stack.wait_events(8);
    let last = stack.guard();
    assert_ne!(last.field("incarnation"), first.field("incarnation"));
    assert_eq!((last.field("place"), last.number("total")), (first.field("place"), 8));
    wait_drained(&stack.pg, "default");
    assert_eq!(
        stack.pg.one::<i64>("select published_total from outbox.backend_status"),
        8
    );
}

#[test]
fn an_idle_owner_refreshes_its_guard_at_each_poll_and_changes_nothing_else() {
    let stack = Stack::with(&[("outbox_relay.poll_interval", "100ms")]);
    stack.publish("only");
    stack.wait_events(1);
    wait_drained(&stack.pg, "default");
    let before = stack.guard();
    let start = Instant::now();
    wait_until("five refreshes", || {
        stack.guard().number("beat") >= before.number("beat") + 5
    });
    let took = start.elapsed();
    assert!(
        took > Duration::from_millis(350) && took < Duration::from_secs(5),
        "five refreshes within {took:?}"
    );
    let mut after = stack.guard();
    after.0.insert("beat".into(), before.field("beat").into());
    assert_eq!(after, before);
    // Also if there was never an event.
    let other = Stack::with(&[("outbox_relay.poll_interval", "100ms")]);
    wait_until("a guard that moves", || {
        let guard = other.redis.guard(&other.guard_key());
        guard.is_some_and(|guard| guard.number("beat") > 2 && guard.number("number") == EPOCH + 1)
    });
}

/// Then a waiting server need not wait for the intervals.
#[test]
fn an_owner_that_stops_in_order_records_it_in_the_guard() {
    let mut stack = Stack::with(&[]);
    stack.publish("one");
    stack.wait_events(1);
    let key = stack.guard_key();
    for mode in [Mode::Fast, Mode::Smart] {
        stack.pg.stop(mode);
        let guard = stack.redis.guard(&key).expect("a guard");
        assert_eq!(
            (guard.field("released"), guard.number("number")),
            ("1", EPOCH + 2),
            "{mode:?}"
        );
        stack.pg.start_again();
        wait_eq("the guard's `released`", "0".to_string(), || {
            stack.guard().field("released").to_string()
        });
    }
    stack.pg.stop(Mode::Immediate);
    assert_eq!(stack.redis.guard(&key).expect("a guard").field("released"), "0");
    // A worker that ends while its server goes on is back in a moment.
    stack.pg.start_again();
    stack.publish("two");
    stack.wait_events(2);
    wait_drained(&stack.pg, "default");
    let old = stack.pg.wait_worker("postgres");
    stack.pg.exec(&format!("select pg_terminate_backend({old})"));
    stack.pg.wait_new_worker(old);
    assert_eq!(stack.guard().field("released"), "0");
}

#[test]
fn at_least_once_leaves_no_guard() {
    let stack = Stack::with(&[UNTRIMMED]);
    stack
        .pg
        .exec("update outbox.backends set delivery = 'at_least_once', port = port");
    let other = Redis::start();
    stack.point("default", &other);
    let published = publish(&stack.pg, "postgres", "event", 250);
    assert_eq!(ids(&other.wait_entries("events", 250)), published);
    wait_drained(&stack.pg, "default");
    let keys: Vec<String> = redis::cmd("KEYS").arg("*").query(&mut other.conn()).expect("KEYS");
    assert_eq!(keys, ["events"]);
}

#[test]
fn the_key_names_installation_database_and_backend() {
    let pg = Postgres::start();
    pg.extension();
    let (installation, database): (Uuid, u32) = (
        pg.one("select id from outbox.installation"),
        pg.one("select oid from pg_database where datname = 'postgres'"),
    );
    pg.exec("insert into outbox.backends (name) values ('other')");
    for (backend, number) in [("default", 1), ("other", 2)] {
        let found: String = pg.one(&format!("select outbox.guard_key('{backend}')"));
        assert_eq!(found, format!("outbox_relay:guard:{installation}:{database}:{number}"));
    }
    let unknown = pg.client().query("select outbox.guard_key('none')", &[]);
    assert_eq!(
        Refused::of(unknown),
        Refused::new(
            "42704",
            "backend \"none\" does not exist",
            "Backends are the rows of outbox.backends.",
            "Check the name, or create the backend first."
        )
    );
}

/// Two databases of one server and another server, all with the default settings: three that append to one stream.
#[test]
fn databases_and_servers_that_share_a_stream_have_a_guard_each() {
    let stack = Stack::with(&[UNTRIMMED]);
    let (here, there) = (&stack.pg, Postgres::with(&[UNTRIMMED]).start());
    here.exec("create database second");
    point(here, "second", &stack.redis);
    there.exec("create extension outbox_relay");
    point(&there, "postgres", &stack.redis);
    let homes = [(here, "postgres"), (here, "second"), (&there, "postgres")];
    let keys = homes.map(|(pg, db)| key(pg, db));
    assert!(
        keys[0] != keys[1] && keys[1] != keys[2] && keys[0] != keys[2],
        "{keys:?}"
    );
    let mut published = [Vec::new(), Vec::new(), Vec::new()];
    for round in 0..10 {
        for ((pg, db), published) in homes.iter().zip(&mut published) {
            published.extend(publish(pg, db, &format!("{db}{round}-"), 30));
        }
        if round == 5 {
            here.kill_worker();
        }
        stack.redis.call(&["CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes"]);
    }
    stack.wait_events(900);
    for (pg, db) in homes {
        wait_until("all to be delivered", || {
            pg.one_db::<i64>(db, "select pending from outbox.backend_status") == 0
        });
    }
    let arrived = ids(&stack.events());
    assert_eq!(sorted(arrived.clone()), sorted(published.concat()));
    for (published, key) in published.iter().zip(&keys) {
        let of_one: Vec<Uuid> = arrived.iter().filter(|id| published.contains(id)).copied().collect();
        assert_eq!(of_one, *published);
        let guard = stack.redis.guard(key).expect("a guard");
        assert_eq!(guard.number("total"), 300);
    }
}

#[test]
fn a_renamed_database_keeps_its_guard() {
    let stack = Stack::with(&[UNTRIMMED, ("outbox_relay.databases", "old, new")]);
    stack.pg.exec("create database old");
    point(&stack.pg, "old", &stack.redis);
    let mut published = publish(&stack.pg, "old", "before", 20);
    stack.wait_events(20);
    let before = key(&stack.pg, "old");
    // The worker of a database is a session there.
    stack.pg.set("outbox_relay.enabled", "off");
    wait_until("the worker to leave", || stack.pg.worker_pid("old").is_none());
    stack.pg.exec("alter database old rename to new");
    stack.pg.set("outbox_relay.enabled", "on");
    published.extend(publish(&stack.pg, "new", "after", 20));
    assert_eq!(ids(&stack.wait_events(40)), published);
    assert_eq!(key(&stack.pg, "new"), before);
    let guard = stack.redis.guard(&before).expect("a guard");
    assert_eq!(guard.number("total"), 40);
    let guards: Vec<String> = redis::cmd("KEYS")
        .arg("outbox_relay:*")
        .query(&mut stack.redis.conn())
        .expect("KEYS");
    assert_eq!(guards, [before]);
}

/// The copy begins after the events that its model had delivered and, after take_over(), appends under its own guard:
/// neither fences the other.
#[test]
fn a_database_made_from_a_template_has_its_own_guard() {
    let stack = Stack::with(&[UNTRIMMED, ("outbox_relay.databases", "model, copy")]);
    stack.pg.exec("create database model");
    point(&stack.pg, "model", &stack.redis);
    let mut all = publish(&stack.pg, "model", "before", 20);
    stack.wait_events(20);
    wait_until("the cursor to be saved", || {
        stack
            .pg
            .one_db::<i64>("model", "select pending from outbox.backend_status")
            == 0
    });
    stack.pg.set("outbox_relay.enabled", "off");
    wait_until("the worker to leave", || stack.pg.worker_pid("model").is_none());
    stack.pg.exec("create database copy template model");
    stack.pg.set("outbox_relay.enabled", "on");
    stack.pg.exec_db("copy", "select outbox.take_over('default')");
    let keys = [key(&stack.pg, "model"), key(&stack.pg, "copy")];
    assert_ne!(keys[0], keys[1]);
    for round in 0..5 {
        for db in ["model", "copy"] {
            all.extend(publish(&stack.pg, db, &format!("{db}{round}-"), 10));
        }
    }
    stack.wait_events(120);
    for (db, key) in ["model", "copy"].iter().zip(&keys) {
        wait_until("all to be delivered", || {
            stack.pg.one_db::<i64>(db, "select pending from outbox.backend_status") == 0
        });
        let state: String = stack.pg.one_db(db, "select state from outbox.backend_status");
        assert_eq!(state, "idle", "{db}");
        assert_eq!(stack.redis.guard(key).expect("a guard").number("total"), 70);
    }
    let arrived = stack.events();
    assert_eq!(sorted(ids(&arrived)), sorted(all));
    for db in ["model", "copy"] {
        let of_one: Vec<&str> = types(&arrived).into_iter().filter(|t| t.starts_with(db)).collect();
        let expected: Vec<String> = (0..5)
            .flat_map(|round| (1..=10).map(move |n| format!("{db}{round}-{n}")))
            .collect();
        assert_eq!(of_one, expected);
    }
}

/// The guard is deleted under load: the relay makes a new one, and repeats nothing.
#[test]
fn a_guard_is_deleted_under_load_and_nothing_is_repeated() {
    let stack = Stack::with(&[UNTRIMMED, ("outbox_relay.retry_delay", "10ms")]);
    let ledger = Ledger::create(&stack.pg);
    let load = Load::start(&stack.pg, 2, "");
    let key = stack.guard_key();
    for _ in 0..10 {
        load.wait_more(50);
        stack.redis.call(&["DEL", &key]);
    }
    load.wait_more(50);
    load.stop();
    ledger.settle(&stack, kit::LIMIT).assert_exactly_once();
    assert!(stack.pg.log().contains("guard of backend \"default\" is missing"));
}
