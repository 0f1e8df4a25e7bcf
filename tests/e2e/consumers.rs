//! `outbox.consumers`: consumer groups according to Redis, which is asked only while a session reads the view.

use kit::{
    Cluster, Group, Postgres, QUICK, Redis, Stack, UNTRIMMED, holds_for, publish_many, standing, wait_drained, wait_eq,
    wait_trouble, wait_until,
};
use std::time::Duration;

/// Stream, group, consumers, pending, lag, unread, and whether the oldest pending has an age.
type Shown = (String, String, i64, i64, Option<i64>, Option<i64>, bool);

fn shown(pg: &Postgres) -> Vec<Shown> {
    let rows = pg.client().query(
        "select stream, consumer_group, consumers, pending, lag, unread, oldest_pending_age > interval '0'
        from outbox.consumers where backend = 'default' and updated_at > clock_timestamp() - interval '1 min'
        order by stream, consumer_group",
        &[],
    );
    let rows = rows.expect("outbox.consumers can be read");
    let aged = |row: &postgres::Row| row.get::<_, Option<bool>>(6).unwrap_or_default();
    let all = rows.iter().map(|row| {
        let (stream, group) = (row.get(0), row.get(1));
        (stream, group, row.get(2), row.get(3), row.get(4), row.get(5), aged(row))
    });
    all.collect()
}

fn row(stream: &str, group: &str, consumers: i64, pending: i64, unread: i64) -> Shown {
    let (stream, group) = (stream.to_owned(), group.to_owned());
    (
        stream,
        group,
        consumers,
        pending,
        Some(unread),
        Some(unread),
        pending > 0,
    )
}

/// Before Redis 7 there is no lag, so the unread entries are known only of a group that has read nothing.
fn as_told_by(redis: &Redis, mut expected: Vec<Shown>) -> Vec<Shown> {
    if !redis.counts_lag() {
        for (_, _, consumers, _, lag, unread, _) in &mut expected {
            *unread = unread.filter(|_| *consumers == 0);
            *lag = None;
        }
    }
    expected
}

/// How often Redis was asked about groups.
fn asked(redis: &Redis) -> u64 {
    let mut conn = redis.conn();
    let info: String = redis::cmd("INFO").arg("commandstats").query(&mut conn).expect("INFO");
    let line = info
        .lines()
        .find(|line| line.starts_with("cmdstat_xinfo|groups:") || line.starts_with("cmdstat_xinfo:"));
    let calls = line.and_then(|line| line.split("calls=").nth(1)?.split(',').next()?.parse().ok());
    calls.unwrap_or_default()
}

fn health(pg: &Postgres) -> (String, String, Option<String>) {
    let row = pg.client().query_one(
        "select status, detail, hint from outbox.health() where \"check\" = 'consumers'",
        &[],
    );
    let row = row.expect("a row of health()");
    (row.get(0), row.get(1), row.get(2))
}

#[test]
fn the_view_shows_each_group_of_each_stream() {
    let stack = Stack::with(&[UNTRIMMED]);
    let mut conn = stack.redis.conn();
    publish_many(&mut stack.pg.client(), "default", "", "event", 10);
    publish_many(&mut stack.pg.client(), "default", "other", "event", 3);
    stack.wait_events(10);
    stack.redis.wait_entries("other", 3);
    let mut slow = Group::create(&mut conn, "events", "slow");
    let read = slow.read(&mut conn, "a", 6);
    slow.acknowledge(&mut conn, &read[..4]);
    slow.read(&mut conn, "b", 1);
    Group::create(&mut conn, "other", "fresh");
    // A name that would change the terminal of its reader.
    Group::create(&mut conn, "other", "odd\u{1b}[31m\u{202e}");
    let expected = vec![
        row("events", "slow", 2, 3, 3),
        row("other", "fresh", 0, 0, 3),
        row("other", "odd [31m", 0, 0, 3),
    ];
    let expected = as_told_by(&stack.redis, expected);
    wait_eq("the view", expected, || shown(&stack.pg));
    let mut reader = stack.pg.client();
    reader
        .batch_execute("create role watcher login; grant pg_monitor to watcher")
        .unwrap();
    let count = stack
        .pg
        .client_as("watcher", "postgres")
        .query("select * from outbox.consumers", &[]);
    assert_eq!(count.expect("pg_monitor may read it").len(), 3);
    slow.drain(&mut conn);
    let all_read = stack.redis.counts_lag().then_some(0);
    wait_until("what is read", || shown(&stack.pg)[0].5 == all_read);
    // A deleted group disappears from the view.
    slow.destroy(&mut conn);
    wait_until("the group to go", || shown(&stack.pg)[0].0 == "other");
}

#[test]
fn redis_is_asked_once_a_second_while_somebody_looks_and_else_never() {
    let stack = Stack::with(&[UNTRIMMED]);
    let mut conn = stack.redis.conn();
    stack.publish("event");
    stack.wait_events(1);
    Group::create(&mut conn, "events", "g");
    holds_for(Duration::from_millis(1_500), "nobody asks", || asked(&stack.redis) == 0);
    wait_until("the view", || shown(&stack.pg).len() == 1);
    let (before, began) = (asked(&stack.redis), std::time::Instant::now());
    // However many sessions read the view, and however often.
    let mut looks = 0;
    while began.elapsed() < Duration::from_secs(4) {
        shown(&stack.pg);
        looks += 1;
    }
    let times = asked(&stack.redis) - before;
    assert!(
        (2..=5).contains(&times),
        "asked {times} times in 4 s, looked at {looks} times"
    );
}

#[test]
fn all_lanes_of_a_cluster_are_shown() {
    let cluster = Cluster::start(0);
    let stack = Stack::of(Postgres::with(&[UNTRIMMED]), Redis::start());
    stack.pg.exec(&format!(
        "update outbox.backends set mode = 'cluster', nodes = '{}', host = null, port = null, stream_name = 's0'",
        cluster.addresses()
    ));
    let streams: Vec<String> = (0..6).map(|n| format!("s{n}")).collect();
    for stream in &streams {
        publish_many(&mut stack.pg.client(), "default", stream, "event", 5);
        cluster.wait_entries(stream, 5);
        cluster.call(stream, &["XGROUP", "CREATE", stream, "g", "0"]);
    }
    let expected: Vec<Shown> = streams.iter().map(|stream| row(stream, "g", 0, 0, 5)).collect();
    let expected = as_told_by(&stack.redis, expected);
    wait_eq("the view", expected, || shown(&stack.pg));
}

/// A backend that trims by length goes on, whatever commands are forbidden.
#[test]
fn a_key_that_is_no_stream_is_told_so_by_health() {
    let stack = Stack::with(&[]);
    stack.redis.call(&["SET", "events", "no stream"]);
    stack.publish("one");
    wait_until("a warning", || {
        shown(&stack.pg);
        let (status, detail, hint) = health(&stack.pg);
        let hint = hint.unwrap_or_default();
        status == "warn"
            && detail.contains("WRONGTYPE")
            && hint.contains("Rename or delete the key")
            && !hint.contains("+xinfo")
    });
}

#[test]
fn a_user_without_the_right_to_ask_is_told_so_by_health() {
    let stack = Stack::of(Postgres::with(QUICK).with(&[UNTRIMMED]), Redis::start());
    let acl = |rules: &[&str]| drop(stack.redis.call(&[&["ACL", "SETUSER", "relay"], rules].concat()));
    acl(&["on", ">secret", "~*", "+@all", "-xinfo", "-xlen"]);
    stack
        .pg
        .exec("update outbox.backends set username = 'relay'; select outbox.set_backend_password('default', 'secret')");
    stack.publish("one");
    stack.wait_events(1);
    // Nobody has to give it, so this is no warning.
    wait_until("the words", || {
        assert!(shown(&stack.pg).is_empty());
        let (status, detail, hint) = health(&stack.pg);
        assert_eq!(status, "ok");
        detail.contains("NOPERM") && hint.is_some_and(|hint| hint.contains("+xinfo|groups"))
    });
    stack.publish("two");
    stack.wait_events(2);
    wait_drained(&stack.pg, "default");
    assert_eq!(standing(&stack.pg, "default").state, "idle");
    // A backend with trim = 'read' needs them.
    stack.pg.exec("update outbox.backends set trim = 'read'");
    wait_trouble(&stack.pg, "default", "misconfigured", "NOPERM");
    stack
        .pg
        .wait_log("HINT:  With trim = 'read', the backend's Redis user needs +xlen +xinfo|groups");
    stack.publish("three");
    wait_eq("pending", 1, || standing(&stack.pg, "default").pending);
    // The rule in the documents.
    acl(&[
        "-@all",
        "+@connection",
        "+xadd",
        "+watch",
        "+multi",
        "+exec",
        "+discard",
        "+hset",
        "+hmget",
        "+hgetall",
        "+xrevrange",
    ]);
    acl(&[
        "+xlen",
        "+xinfo|stream",
        "+xinfo|groups",
        "+xinfo|consumers",
        "+xpending",
    ]);
    wait_trouble(&stack.pg, "default", "misconfigured", "NOPERM");
    acl(&["+xtrim", "+eval"]);
    stack.wait_events(3);
    wait_drained(&stack.pg, "default");
    wait_eq("the state", "idle".to_owned(), || standing(&stack.pg, "default").state);
}

#[test]
fn health_warns_of_a_group_that_is_about_to_lose_entries() {
    let stack = Stack::with(&[("outbox_relay.redis_max_len", "1000")]);
    let mut conn = stack.redis.conn();
    let mut late = Group::create(&mut conn, "events", "late");
    let mut quick = Group::create(&mut conn, "events", "quick");
    publish_many(&mut stack.pg.client(), "default", "", "event", 700);
    quick.wait_acknowledged(&mut conn, 700);
    wait_until("the view", || shown(&stack.pg).len() == 2);
    assert_eq!(health(&stack.pg).0, "ok");
    publish_many(&mut stack.pg.client(), "default", "", "event", 200);
    quick.wait_acknowledged(&mut conn, 900);
    wait_until("a warning", || {
        shown(&stack.pg);
        let (status, detail, hint) = health(&stack.pg);
        let names = detail.contains("\"late\"") && !detail.contains("\"quick\"") && detail.contains("\"events\"");
        status == "warn" && names && hint.is_some_and(|hint| hint.contains("SET max_len = 2000 WHERE name = 'default'"))
    });
    late.drain(&mut conn);
    wait_until("all to be well", || {
        shown(&stack.pg);
        health(&stack.pg).0 == "ok"
    });
}

/// A probe that calls health() is enough: nobody has to read the view. While nothing changes, it writes nothing.
#[test]
fn health_alone_has_redis_asked() {
    let mut stack = Stack::with(&[("outbox_relay.redis_max_len", "1000")]);
    let mut conn = stack.redis.conn();
    Group::create(&mut conn, "events", "dead");
    publish_many(&mut stack.pg.client(), "default", "", "event", 900);
    let warns = |pg: &Postgres| {
        let (status, detail, _) = health(pg);
        status == "warn" && detail.contains("\"dead\"")
    };
    wait_until("a warning", || warns(&stack.pg));
    let saved_at = |pg: &Postgres| -> String { pg.one("select max(asked_at)::text from outbox.consumer_groups") };
    let (before, saved) = (asked(&stack.redis), saved_at(&stack.pg));
    wait_until("two more questions", || {
        assert!(warns(&stack.pg));
        asked(&stack.redis) >= before + 2
    });
    assert_eq!(saved_at(&stack.pg), saved, "an answer that says nothing new was saved");
    // What was said long ago is believed as long as Redis is being asked.
    stack
        .pg
        .exec("update outbox.consumer_groups set asked_at = asked_at - interval '50 min'");
    assert!(warns(&stack.pg));
    // Nobody can answer the first call.
    stack.redis.sigstop();
    stack.pg.restart();
    assert_eq!(health(&stack.pg).0, "ok", "what nobody has asked for long is believed");
    stack.redis.sigcont();
    wait_until("a warning after the restart", || warns(&stack.pg));
    // With trim = 'read' Redis is asked in any case.
    stack.pg.exec(
        "update outbox.backends set trim = 'read';
        update outbox.consumer_groups set asked_at = asked_at - interval '50 min'",
    );
    stack.pg.restart();
    assert!(warns(&stack.pg));
}

/// What was known of streams is not lost if it cannot be read at the first attempt.
#[test]
fn streams_that_were_known_are_asked_about_though_their_table_was_locked() {
    let stack = Stack::start();
    stack.publish("first");
    stack.wait_events(1);
    stack.pg.exec(
        "insert into outbox.consumer_groups (backend_number, slot, stream, length, consumer_group, asked_at)
         select number, -1, 'known', 1, 'g', now() - '1 min'::interval from outbox.backends",
    );
    let mut locker = stack.pg.client();
    let mut lock = locker.transaction().expect("a transaction");
    lock.batch_execute("lock table outbox.consumer_groups in access exclusive mode")
        .expect("locked");
    let mut viewer = stack.pg.client();
    viewer.batch_execute("select outbox.want_consumers()").expect("wanted");
    std::thread::sleep(Duration::from_millis(500));
    lock.commit().expect("unlocked");
    wait_until("the known stream to be asked about", || {
        // A survey that could not be saved changes nothing of this.
        viewer.batch_execute("select outbox.want_consumers()").expect("wanted");
        stack
            .pg
            .one("select exists (select from outbox.consumer_groups where stream = 'known' and asked_at > now() - '30 s'::interval)")
    });
}

/// Streams of a template may come and go by the thousand, and what was said of each is kept for an hour. The worker
/// asks once a second, and must not read all of that each time.
#[test]
fn what_is_known_of_other_streams_is_not_read_again_and_again() {
    const ROWS: i64 = 100_000;
    let stack = Stack::start();
    stack.publish("first");
    stack.wait_events(1);
    stack.pg.exec(&format!(
        "insert into outbox.consumer_groups (backend_number, slot, stream, length, consumer_group, asked_at)
         select case when g % 2 = 0 then b.number else 1000000 end, -1, 's' || g, 1, 'g', now() - case when g % 10 = 0 then '2 h' else '1 s' end::interval
         from generate_series(1, {ROWS}) g, outbox.backends b;
         analyze outbox.consumer_groups"
    ));
    let read = || -> (i64, i64) {
        let sql = "select seq_tup_read + idx_tup_fetch, n_tup_ins from pg_stat_user_tables where relid = 'outbox.consumer_groups'::regclass";
        let row = stack.pg.client().query_one(sql, &[]).unwrap();
        (row.get(0), row.get(1))
    };
    wait_until("the rows to be counted", || read().1 >= ROWS);
    let (rows_before, written_before) = read();
    stack.pg.exec("select outbox.want_consumers()");
    // Each answer tells of 200 streams.
    wait_until("three answers to be saved", || read().1 > written_before + 2 * 200);
    let rows = read().0 - rows_before;
    let deleted: i64 = stack
        .pg
        .one("select count(*) from outbox.consumer_groups where backend_number = 1000000");
    assert_eq!(deleted, 0);
    println!("{rows} rows were read");
    // All are read once, to find streams or because their backend was deleted; and then 1,000 old ones each time.
    assert!(rows < ROWS * 5 / 4, "{rows} rows were read");
    let old: i64 = stack
        .pg
        .one("select count(*) from outbox.consumer_groups where asked_at < now() - interval '1 h'");
    assert!(old <= ROWS / 10 - 2_000, "{old} old rows are left");
}
