//! The rights that the relay's Redis user needs: with fewer, nothing is sent with a weaker guarantee, and nothing is
//! lost.

use kit::{
    Postgres, QUICK, Redis, Stack, UNTRIMMED, Way, env, ids, publish_many, standing, wait_drained, wait_eq,
    wait_trouble, wait_until,
};
use uuid::Uuid;

/// As in docs/guarantees.md, but for the streams.
const RIGHTS: &[&str] = &[
    "+@connection",
    "+xadd",
    "+watch",
    "+multi",
    "+exec",
    "+discard",
    "+unwatch",
    "+hset",
    "+hmget",
    "+hgetall",
    "+xrevrange",
    "+xinfo",
    "+wait",
    "~outbox_relay:*",
];

/// A stack whose backend logs in as `relay`, who has all rights for the streams `events` and `good`.
fn stack() -> Stack {
    let redis = Redis::start();
    acl(&redis, &["on", ">secret", "~events", "~good"]);
    acl(&redis, RIGHTS);
    let postgres = Postgres::with(QUICK).with(&[UNTRIMMED, ("outbox_relay.poll_interval", "200ms")]);
    let stack = Stack {
        pg: postgres.start(),
        redis,
    };
    stack.pg.extension();
    stack.pg.exec(&format!(
        "update outbox.backends set username = 'relay', host = '127.0.0.1', port = {};
         select outbox.set_backend_password('default', 'secret')",
        stack.redis.port()
    ));
    stack
}

fn acl(redis: &Redis, rules: &[&str]) {
    redis.call(&[&["ACL", "SETUSER", "relay"], rules].concat());
}

fn publish(stack: &Stack, count: i32) -> Vec<Uuid> {
    publish_many(&mut stack.pg.client(), "default", "", "event", count)
}

fn kill_clients(stack: &Stack) {
    stack.redis.call(&["CLIENT", "KILL", "USER", "relay"]);
}

#[test]
fn the_rights_listed_in_the_guarantees_are_enough() {
    let stack = stack();
    let mut published = publish(&stack, 250);
    let good = publish_many(&mut stack.pg.client(), "default", "good", "event", 50);
    stack.wait_events(250);
    assert_eq!(ids(&stack.redis.wait_entries("good", 50)), good);
    kill_clients(&stack);
    published.extend(publish(&stack, 50));
    stack.wait_events(300);
    stack.pg.kill_worker();
    published.extend(publish(&stack, 50));
    stack.wait_events(350);
    wait_drained(&stack.pg, "default");
    assert_eq!(ids(&stack.events()), published);
    assert_eq!(
        (standing(&stack.pg, "default").failed, stack.guard().number("total")),
        (0, 400)
    );
    let log = stack.pg.log();
    assert!(!log.contains("NOPERM"), "{log}");
    // No forbidden command was tried.
    let denied: Vec<redis::Value> = redis::cmd("ACL")
        .arg("LOG")
        .query(&mut stack.redis.conn())
        .expect("ACL LOG");
    assert!(denied.is_empty(), "{denied:?}");
}

/// Each right is taken away while the relay is connected, and given back.
#[test]
fn without_a_command_everything_waits_and_goes_on_by_itself_once_it_is_allowed() {
    let stack = stack();
    let mut published = publish(&stack, 10);
    stack.wait_events(10);
    for command in ["xadd", "watch", "multi", "exec", "hset", "hmget", "hgetall"] {
        let mark = stack.pg.log().len();
        acl(&stack.redis, &[&format!("-{command}")]);
        kill_clients(&stack);
        let waiting = publish(&stack, 150);
        let found = wait_trouble(&stack.pg, "default", "misconfigured", "NOPERM");
        assert_eq!((found.pending, found.failed), (150, 0), "{command}: {found:?}");
        let error = found.last_error.unwrap_or_default();
        assert!(error.contains(&format!("'{command}'")), "{command}: {error}");
        stack.pg.wait_log_after(
            mark,
            "HINT:  Allow the backend's Redis user XADD on its streams, and for exactly_once",
        );
        assert_eq!(stack.redis.xlen("events"), published.len(), "{command}");
        published.extend(waiting);
        acl(&stack.redis, &[&format!("+{command}")]);
        stack.wait_events(published.len());
        wait_drained(&stack.pg, "default");
        assert_eq!(ids(&stack.events()), published, "{command}");
        wait_eq("the state", "idle".to_string(), || standing(&stack.pg, "default").state);
    }
    let mode: String = stack.pg.one("select delivery from outbox.backends");
    assert_eq!(mode, "exactly_once");
}

#[test]
fn without_the_guards_key_everything_waits() {
    let stack = stack();
    acl(&stack.redis, &["resetkeys", "~events", "~good"]);
    let mut published = publish(&stack, 150);
    let found = wait_trouble(&stack.pg, "default", "misconfigured", "NOPERM");
    assert_eq!((found.pending, found.failed), (150, 0), "{found:?}");
    stack
        .pg
        .wait_log("HINT:  Allow the backend's Redis user XADD on its streams, and for exactly_once");
    assert_eq!(stack.redis.xlen("events"), 0);
    acl(&stack.redis, &["~outbox_relay:*"]);
    assert_eq!(ids(&stack.wait_events(150)), published);
    wait_drained(&stack.pg, "default");
    // Taken away in the middle of a load.
    acl(&stack.redis, &["resetkeys", "~events", "~good"]);
    published.extend(publish(&stack, 150));
    let found = wait_trouble(&stack.pg, "default", "misconfigured", "NOPERM");
    assert_eq!((found.pending, found.failed), (150, 0), "{found:?}");
    acl(&stack.redis, &["~outbox_relay:*"]);
    stack.wait_events(300);
    wait_drained(&stack.pg, "default");
    assert_eq!(ids(&stack.events()), published);
}

/// One key that the user may not touch only affects that stream, within a transaction too.
#[test]
fn a_forbidden_stream_fails_alone() {
    let stack = stack();
    let rows = stack.pg.client().query(
        "select outbox.publish_event('event', 'kit', max_retries => 2,
             stream => case n % 3 when 1 then 'good' when 2 then 'forbidden' end)
         from generate_series(0, 299) n order by n",
        &[],
    );
    let published: Vec<Uuid> = rows.expect("publish").iter().map(|row| row.get(0)).collect();
    let of = |index: usize| -> Vec<Uuid> { published[index..].iter().step_by(3).copied().collect() };
    wait_eq("failed events", 100, || {
        stack.pg.one::<i64>("select count(*) from outbox.failed_events")
    });
    wait_drained(&stack.pg, "default");
    assert_eq!(ids(&stack.events()), of(0));
    assert_eq!(ids(&stack.redis.entries("good")), of(1));
    let rows = stack
        .pg
        .client()
        .query(
            "select event_id, last_error from outbox.failed_events order by seq",
            &[],
        )
        .expect("readable");
    assert_eq!(rows.iter().map(|row| row.get(0)).collect::<Vec<Uuid>>(), of(2));
    assert!(rows.iter().all(|row| row.get::<_, String>(1).starts_with("NOPERM")));
    assert_eq!(standing(&stack.pg, "default").state, "idle");
}

/// A batch whose reply was lost cannot be settled without reading the streams: nothing is guessed.
#[test]
fn without_the_right_to_read_streams_a_doubtful_batch_waits() {
    let stack = stack();
    acl(&stack.redis, &["~full"]);
    stack.redis.call(&[
        "XADD",
        "full",
        "18446744073709551615-18446744073709551615",
        "event_id",
        "none",
    ]);
    let info: Vec<redis::Value> = redis::cmd("XINFO")
        .arg(&["STREAM", "full"])
        .query(&mut stack.redis.conn())
        .expect("XINFO STREAM");
    if !info.contains(&redis::Value::BulkString(b"entries-added".to_vec())) {
        env::not_run("this Redis does not count what was added (before 7.0): see the limits in docs/guarantees.md");
        return;
    }
    // No refresh of the guard may be under way when replies are held: a late reply to one does not cause a new
    // connection.
    stack.pg.set("outbox_relay.poll_interval", "1h");
    stack.pg.exec("update outbox.backends set socket_timeout = '10s'");
    let proxy = stack.through_proxy();
    let key = stack.guard_key();
    wait_eq("the guard's interval", Some(3_600_000), || {
        stack.redis.guard(&key).map(|guard| guard.number("interval_ms"))
    });
    let mut published = publish(&stack, 5);
    stack.wait_events(5);
    wait_drained(&stack.pg, "default");
    for command in ["xrevrange", "xinfo"] {
        // The relay goes on after the refused events.
        published.extend(publish(&stack, 1));
        stack.wait_events(published.len());
        wait_drained(&stack.pg, "default");
        acl(&stack.redis, &[&format!("-{command}")]);
        // Ready for a batch: the last command was the read of the token.
        wait_until("the relay to be ready", || {
            let clients: String = redis::cmd("CLIENT")
                .arg("LIST")
                .query(&mut stack.redis.conn())
                .expect("CLIENT LIST");
            clients
                .lines()
                .any(|line| line.contains("user=relay ") && line.contains("cmd=hmget "))
                && proxy.held(Way::ToClient) == 0
        });
        proxy.hold(Way::ToClient);
        // The second is refused within the transaction.
        let mut client = stack.pg.client();
        let mut transaction = client.transaction().expect("begin");
        for stream in ["", "full", ""] {
            let sql = "select outbox.publish_event('event', 'kit', max_retries => 1, stream => nullif($1, ''))";
            let id: Uuid = transaction.query_one(sql, &[&stream]).expect("publish").get(0);
            published.extend(stream.is_empty().then_some(id));
        }
        transaction.commit().expect("commit");
        stack.wait_events(published.len());
        proxy.cut();
        let found = wait_trouble(&stack.pg, "default", "misconfigured", "NOPERM");
        let error = found.last_error.unwrap_or_default();
        assert!(error.contains(command), "{command}: {error}");
        assert_eq!((found.pending, stack.redis.xlen("events")), (3, published.len()));
        acl(&stack.redis, &[&format!("+{command}")]);
        wait_drained(&stack.pg, "default");
        assert_eq!(ids(&stack.events()), published, "{command}");
    }
    wait_eq("failed events", 2, || {
        stack.pg.one::<i64>("select count(*) from outbox.failed_events")
    });
}

/// Needed only with wait_replicas.
#[test]
fn without_wait_a_backend_that_waits_for_replicas_says_so() {
    let stack = stack();
    let replica = Redis::replica_of(&stack.redis);
    acl(&stack.redis, &["-wait"]);
    let mut published = publish(&stack, 5);
    stack.wait_events(5);
    wait_drained(&stack.pg, "default");
    stack.pg.exec("update outbox.backends set wait_replicas = 1");
    published.extend(publish(&stack, 5));
    let found = wait_trouble(&stack.pg, "default", "misconfigured", "NOPERM");
    assert_eq!(found.failed, 0, "{found:?}");
    acl(&stack.redis, &["+wait"]);
    replica.wait_entries("events", 10);
    wait_drained(&stack.pg, "default");
    assert_eq!(ids(&stack.events()), published);
}
