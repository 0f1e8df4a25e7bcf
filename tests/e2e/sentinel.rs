//! A Redis that sentinels watch: its primary is found through them, and followed after each failover.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use kit::sentinel::MASTER;
use kit::{
    LIMIT, Ledger, Load, Postgres, QUICK, Redis, Refused, Sentinel, Stack, UNTRIMMED, Watched, eventually, holds_for,
    ids, standing, wait_drained, wait_eq, wait_trouble, wait_until,
};

/// How long delivery may stall in addition to the failover itself.
const ALLOWANCE: Duration = Duration::from_secs(2);

/// A stack whose backend `default` asks these sentinels; its `redis` is the primary.
fn stack(settings: &[(&str, &str)], primary: Redis, nodes: &str) -> Stack {
    let stack = Stack::of(Postgres::with(settings).with(&[UNTRIMMED]), primary);
    ask_sentinels(&stack, nodes, MASTER);
    stack
}

fn ask_sentinels(stack: &Stack, nodes: &str, master: &str) {
    stack.pg.exec(&format!(
        "update outbox.backends set mode = 'sentinel', nodes = '{nodes}', sentinel_master = '{master}',
            host = null, port = null"
    ));
}

fn address(pg: &Postgres) -> Option<String> {
    pg.one("select address from outbox.backend_status where backend = 'default'")
}

fn at(redis: &Redis) -> String {
    format!("127.0.0.1:{}", redis.port())
}

fn now() -> Duration {
    SystemTime::now().duration_since(UNIX_EPOCH).expect("after 1970")
}

/// Under 2,000 events a second. OUTBOX_FAILOVERS sets how often; the stalls are printed.
#[test]
fn a_failover_under_load_loses_nothing_and_stalls_no_longer_than_it_takes() {
    let rounds = std::env::var("OUTBOX_FAILOVERS").map_or(1, |text| text.parse().expect("a number"));
    let mut watched = Watched::start();
    let mut stack = stack(&[], Redis::start(), &watched.nodes());
    let ledger = Ledger::create(&stack.pg);
    let load = Load::paced(&stack.pg, 2_000, "null");
    let mut stalls = Vec::new();
    for round in 1..=rounds {
        load.wait_more(150);
        watched.wait_ready();
        let killed_at = now();
        watched.primary.kill9();
        watched.wait_failover();
        let failover = now() - killed_at;
        wait_eq("where it is connected", Some(at(&watched.primary)), || {
            address(&stack.pg)
        });
        let before = watched.primary.xlen("events");
        wait_until("entries in the new primary", || {
            watched.primary.xlen("events") > before + 1_000
        });
        let since = killed_at - Duration::from_millis(500);
        let stall = watched.primary.longest_stall("events", since).expect("two entries");
        println!("failover {round}: it took {failover:?}, the stall was {stall:?}");
        assert!(
            stall <= failover + ALLOWANCE,
            "{stall:?} for a failover of {failover:?}"
        );
        stalls.push(stall);
        watched.replica.start_again();
        // The sentinels may need some time to notice that it is back.
        eventually("the old primary to follow the new", 3 * LIMIT, || {
            let link = watched.replica.replication("master_link_status");
            (link.as_deref() == Some("up")).then_some(())
        });
    }
    load.stop();
    wait_drained(&stack.pg, "default");
    // While a node loads its data, it is silent for so long that they would take it for dead.
    watched.sentinels.clear();
    std::mem::swap(&mut stack.redis, &mut watched.primary);
    let verdict = ledger.settle(&stack, LIMIT);
    verdict.assert_exactly_once();
    stalls.sort();
    println!(
        "{} events; stalls {:?} to {:?}",
        verdict.committed,
        stalls[0],
        stalls[stalls.len() - 1]
    );
    let log = stack.pg.log();
    assert!(
        log.contains(&format!("is connected to Redis at {}", at(&stack.redis))),
        "{log}"
    );
    // The error was of the other server.
    let blamed = format!("Redis at {}: Connection refused", at(&stack.redis));
    assert!(rounds > 1 || !log.contains(&blamed), "{log}");
}

/// The primary keeps its connections and answers nothing, and continues when another has taken its place: entries that
/// it appends then are lost.
#[test]
fn a_primary_that_hangs_under_load_is_replaced() {
    let mut watched = Watched::start();
    let mut stack = stack(&[], Redis::start(), &watched.nodes());
    stack.pg.exec("update outbox.backends set socket_timeout = '1s'");
    let ledger = Ledger::create(&stack.pg);
    let load = Load::paced(&stack.pg, 2_000, "null");
    load.wait_more(150);
    watched.primary.sigstop();
    watched.wait_failover();
    wait_eq("where it is connected", Some(at(&watched.primary)), || {
        address(&stack.pg)
    });
    load.wait_more(150);
    watched.replica.sigcont();
    load.wait_more(150);
    load.stop();
    wait_drained(&stack.pg, "default");
    watched.sentinels.clear();
    std::mem::swap(&mut stack.redis, &mut watched.primary);
    ledger.settle(&stack, LIMIT).assert_exactly_once();
}

/// `SENTINEL FAILOVER`: the old primary lives on as a replica. Nothing is lost, and nothing needs healing.
#[test]
fn a_planned_failover_is_followed_and_the_demoted_node_is_not_used() {
    let mut watched = Watched::start();
    let mut stack = stack(QUICK, Redis::start(), &watched.nodes());
    let ledger = Ledger::create(&stack.pg);
    let load = Load::start(&stack.pg, 2, "");
    load.wait_more(50);
    watched.sentinels[0]
        .ask(&["FAILOVER", MASTER])
        .expect("a failover begins");
    watched.wait_failover();
    wait_eq("where it is connected", Some(at(&watched.primary)), || {
        address(&stack.pg)
    });
    load.wait_more(20);
    load.stop();
    std::mem::swap(&mut stack.redis, &mut watched.primary);
    ledger.settle(&stack, LIMIT).assert_exactly_once();
}

#[test]
fn sentinels_that_are_down_are_passed_over_until_all_are() {
    let mut watched = Watched::start();
    let quick = [QUICK, &[("outbox_relay.poll_interval", "200ms")]].concat();
    let mut stack = stack(&quick, Redis::start(), &watched.nodes());
    std::mem::swap(&mut stack.redis, &mut watched.primary);
    watched.sentinels[0].kill9();
    stack.publish("one");
    let mut arrived = ids(&stack.wait_events(1));
    watched.sentinels[1].kill9();
    // An existing connection needs none of them.
    watched.sentinels[2].kill9();
    stack.publish("two");
    arrived.push(ids(&stack.wait_events(2))[1]);
    stack.redis.call(&["CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes"]);
    stack.publish("three");
    let last = wait_trouble(&stack.pg, "default", "backoff", "sentinel 127.0.0.1:");
    assert!(last.last_error.is_some_and(|e| e.contains("refused")) && last.will_try_again);
    let log = stack.pg.log();
    assert!(
        log.contains("Redis at master \"mymaster\" of the sentinels") || log.contains("cannot be reached"),
        "{log}"
    );
    watched.sentinels[2].start();
    arrived.push(ids(&stack.wait_events(3))[2]);
    assert_eq!(ids(&stack.events()), arrived);
    wait_eq("its state", "idle".to_string(), || standing(&stack.pg, "default").state);
}

#[test]
fn a_master_that_no_sentinel_knows_is_a_wrong_setting() {
    let watched = Watched::start();
    let stack = stack(QUICK, Redis::start(), &watched.nodes());
    ask_sentinels(&stack, &watched.nodes(), "another");
    stack.publish("one");
    wait_trouble(
        &stack.pg,
        "default",
        "misconfigured",
        "does not know the master \"another\"",
    );
    assert!(
        stack
            .pg
            .log()
            .contains("HINT:  Check the backend's nodes and sentinel_master.")
    );
    ask_sentinels(&stack, &watched.nodes(), MASTER);
    watched.primary.wait_entries("events", 1);
}

/// A sentinel that was cut off still names a node that has become a replica; the next sentinel names the primary.
#[test]
fn a_replica_is_never_written_to() {
    let primary = Redis::start();
    let replica = Redis::replica_of(&primary);
    // Without a quorum it only names its primary.
    let stale = Sentinel::watching(replica.port(), 2, "");
    let stack = stack(QUICK, primary, &format!("{{{}}}", stale.node()));
    stack.publish("one");
    wait_trouble(&stack.pg, "default", "backoff", "it is a replica");
    let right = Sentinel::watching(stack.redis.port(), 2, "");
    ask_sentinels(&stack, &format!("{{{},{}}}", stale.node(), right.node()), MASTER);
    stack.wait_events(1);
    wait_drained(&stack.pg, "default");
    assert_eq!(address(&stack.pg), Some(at(&stack.redis)));
}

/// A sentinel gets the password only if it asks for one.
#[test]
fn a_sentinel_may_want_the_backends_password() {
    let primary = Redis::with(&["--requirepass", "secret"]);
    let open = Sentinel::watching(primary.port(), 1, "sentinel auth-pass mymaster secret");
    let stack = stack(QUICK, primary, &format!("{{{}}}", open.node()));
    stack.pg.exec("select outbox.set_backend_password('default', 'secret')");
    stack.publish("one");
    stack.wait_events(1);
    open.ask(&["SET", MASTER, "quorum", "1"]).expect("a setting");
    let mut conn = ::redis::Client::open(format!("redis://127.0.0.1:{}", open.port())).and_then(|c| c.get_connection());
    let conn = conn.as_mut().expect("a sentinel");
    let _: () = ::redis::cmd("ACL")
        .arg(&["SETUSER", "default", ">secret"])
        .query(conn)
        .expect("a password");
    let _: () = ::redis::cmd("ACL")
        .arg(&["SETUSER", "default", "resetpass", ">secret"])
        .query(conn)
        .expect("it alone");
    stack.redis.call(&["CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes"]);
    stack.publish("two");
    stack.wait_events(2);
    let _: () = ::redis::cmd("ACL")
        .arg(&["SETUSER", "default", "resetpass", ">other"])
        .query(conn)
        .expect("another");
    stack.redis.call(&["CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes"]);
    stack.publish("three");
    wait_trouble(&stack.pg, "default", "misconfigured", "sentinel 127.0.0.1:");
    holds_for(Duration::from_millis(100), "it waits", || {
        stack.redis.xlen("events") == 2
    });
}

#[test]
fn invalid_sentinel_settings_are_refused() {
    let stack = Stack::start();
    let set = |what: &str| {
        Refused::of(
            stack
                .pg
                .client()
                .batch_execute(&format!("update outbox.backends set {what}")),
        )
    };
    for what in [
        "mode = 'sentinel'",
        "mode = 'sentinel', nodes = '{a:1}', host = null, port = null",
        "mode = 'sentinel', sentinel_master = 'm', host = null, port = null",
        "mode = 'sentinel', nodes = '{a:1}', sentinel_master = 'm'",
        "mode = 'sentinel', nodes = '{}', sentinel_master = 'm', host = null, port = null",
        "mode = 'sentinel', nodes = '{a:1,null}', sentinel_master = 'm', host = null, port = null",
        "mode = 'nonsense'",
        "nodes = '{a:1}'",
        "sentinel_master = 'm'",
    ] {
        assert!(["23514", "22023"].contains(&set(what).code.as_str()), "{what}");
    }
    for node in [
        "a",
        "a:",
        ":1",
        "a:0",
        "a:65536",
        "::1:26379",
        "[::1]",
        "a b:1",
        "a:1x",
        "a:123456",
    ] {
        let refused = set(&format!(
            "mode = 'sentinel', nodes = '{{a:1,\"{node}\"}}', sentinel_master = 'm', host = null, port = null"
        ));
        assert_eq!(refused.code, "22023", "{node}: {refused:?}");
        assert!(refused.hint.is_some_and(|hint| hint.contains("brackets")));
    }
    stack.pg.exec(
        "update outbox.backends set mode = 'sentinel', nodes = '{10.0.0.1:26379,[::1]:26379,redis-3.internal:1}',
            sentinel_master = 'm', host = null, port = null",
    );
}
