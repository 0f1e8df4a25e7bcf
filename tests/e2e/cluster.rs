//! A Redis Cluster: streams are placed by hash slot, each with a guard in its slot, and every guarantee holds for each
//! stream.

use kit::{
    Cluster, LIMIT, Ledger, Load, Postgres, QUICK, Redis, Refused, Stack, UNTRIMMED, eventually, ids, publish_many,
    standing, wait_drained, wait_eq, wait_trouble, wait_until,
};
use uuid::Uuid;

/// A stack whose backend `default` uses this cluster; the stack's own Redis does nothing.
fn stack(settings: &[(&str, &str)], cluster: &Cluster) -> Stack {
    let stack = Stack::of(Postgres::with(settings).with(&[UNTRIMMED]), Redis::start());
    point(&stack, cluster);
    stack
}

fn point(stack: &Stack, cluster: &Cluster) {
    stack.pg.exec(&format!(
        "update outbox.backends set mode = 'cluster', nodes = '{}', host = null, port = null",
        cluster.addresses()
    ));
}

fn publish(stack: &Stack, stream: &str, count: i32) -> Vec<Uuid> {
    publish_many(&mut stack.pg.client(), "default", stream, "event", count)
}

fn refused(pg: &Postgres, sql: &str) -> Refused {
    Refused::of(pg.client().batch_execute(sql))
}

fn lanes(pg: &Postgres) -> i64 {
    pg.one("select count(*) from outbox.cursors where backend_number = 1 and slot >= 0")
}

/// Whether no error about keys in different slots was ever logged.
fn assert_no_crossslot(stack: &Stack) {
    assert!(!stack.pg.log().contains("CROSSSLOT"), "{}", stack.pg.log());
}

/// Waits until the ledger's events are in the streams, once and in order.
#[track_caller]
fn settle(stack: &Stack, cluster: &Cluster, streams: &[String]) {
    wait_drained(&stack.pg, "default");
    cluster.verdict(&stack.pg, "default", streams).assert_exactly_once();
}

#[test]
fn streams_over_all_nodes_are_delivered_once_and_in_order_whatever_dies() {
    let cluster = Cluster::start(0);
    let mut stack = stack(&[("outbox_relay.poll_interval", "500ms")], &cluster);
    Ledger::create(&stack.pg);
    let streams: Vec<String> = (0..16).map(|n| format!("s{n}")).collect();
    let masters: std::collections::BTreeSet<usize> = streams.iter().map(|s| cluster.master_of(s)).collect();
    assert_eq!(masters.len(), 3, "streams on all nodes");
    let load = Load::paced(&stack.pg, 1_600, "'s' || n % 16");
    load.wait_more(50);
    stack.pg.kill_worker();
    wait_until("a worker", || {
        stack
            .pg
            .one::<Option<i32>>("select worker_pid from outbox.status")
            .is_some()
    });
    let reached = load.stop();
    settle(&stack, &cluster, &streams);
    assert_eq!(lanes(&stack.pg), 16);
    let found = standing(&stack.pg, "default");
    let committed: i64 = stack.pg.one("select count(*) from ledger");
    assert_eq!(
        (found.published, found.failed, found.pending),
        (committed, 0, 0),
        "{reached} transactions"
    );
    assert_eq!(stack.pg.one::<i64>("select count(*) from outbox.backend_status"), 1);
    let published: i64 = stack
        .pg
        .one("select count(*) from outbox.event_status where status = 'published'");
    assert_eq!(published, committed);
    for node in &cluster.nodes {
        let address: String = stack.pg.one("select address from outbox.backend_status");
        assert!(address.contains(&format!("127.0.0.1:{}", node.port())), "{address}");
    }
    // A restart of the server, and a crash, under load.
    let load = Load::start(&stack.pg, 1, "");
    load.wait_more(5);
    drop(load);
    let published = publish(&stack, "s3", 500);
    stack.pg.crash();
    stack.pg.start_again();
    let before = cluster.wait_entries("s3", 1).len();
    wait_drained(&stack.pg, "default");
    let arrived = ids(&cluster.entries("s3"));
    assert!(arrived.ends_with(&published), "{before}");
    assert_no_crossslot(&stack);
}

/// Names of any bytes; the server tells where each belongs, and each guard is in the slot of its stream.
#[test]
fn a_stream_name_may_hold_any_characters() {
    let cluster = Cluster::start(0);
    let stack = stack(QUICK, &cluster);
    let names = [
        "{a}b",
        "b{a}",
        "}{",
        "{}",
        "{}{x}",
        "x{}y{z}",
        "{{x}}",
        "x{y",
        "x}y",
        "ü{ß}€",
        " ",
        "a b",
        "line\nbreak",
        "\u{1}\u{7f}",
        "'\"\\",
        "{outbox_relay:guard}",
        "名前",
        "a{b}{c}",
    ];
    for name in names {
        let mut client = stack.pg.client();
        let row = client
            .query_one("select outbox.hash_slot($1), outbox.guard_key('default', $1)", &[&name])
            .expect("a slot and a key");
        let (slot, guard): (i32, String) = (row.get(0), row.get(1));
        assert_eq!(u16::try_from(slot).ok(), Some(cluster.slot_of(name)), "{name:?}");
        assert_eq!(cluster.slot_of(&guard), cluster.slot_of(name), "{name:?}: {guard}");
    }
    let published: Vec<Vec<Uuid>> = names.iter().map(|name| publish(&stack, name, 3)).collect();
    for (name, published) in names.iter().zip(&published) {
        assert_eq!(&ids(&cluster.wait_entries(name, 3)), published, "{name:?}");
        let mut client = stack.pg.client();
        let guard: String = client
            .query_one("select outbox.guard_key('default', $1)", &[name])
            .expect("a key")
            .get(0);
        let number = cluster.call(name, &["HGET", &guard, "total"]);
        assert!(number != ::redis::Value::Nil, "{guard}");
    }
    wait_drained(&stack.pg, "default");
    assert_no_crossslot(&stack);
}

#[test]
fn at_least_once_works_in_a_cluster() {
    let cluster = Cluster::start(0);
    let stack = stack(QUICK, &cluster);
    stack.pg.exec("update outbox.backends set delivery = 'at_least_once'");
    Ledger::create(&stack.pg);
    let streams: Vec<String> = (0..8).map(|n| format!("s{n}")).collect();
    let load = Load::paced(&stack.pg, 500, "'s' || n % 8");
    load.wait_more(50);
    stack.pg.kill_worker();
    load.wait_more(20);
    load.stop();
    wait_drained(&stack.pg, "default");
    cluster.verdict(&stack.pg, "default", &streams).assert_at_least_once();
    assert_no_crossslot(&stack);
}

/// A refusal affects only one stream; and saved refusals are known after a restart, for each lane.
#[test]
fn a_refused_stream_delays_no_other_and_is_tried_again() {
    let cluster = Cluster::start(0);
    let stack = stack(QUICK, &cluster);
    stack.pg.set("outbox_relay.max_retries", "1000");
    cluster.call("bad", &["SET", "bad", "a string"]);
    let refused = publish(&stack, "bad", 3);
    let good: Vec<Uuid> = publish(&stack, "good", 3);
    assert_eq!(ids(&cluster.wait_entries("good", 3)), good);
    let waiting = || -> i64 {
        stack
            .pg
            .one("select count(*) from outbox.refused_events where accepted_in is null")
    };
    wait_eq("refused events", 3, waiting);
    stack.pg.kill_worker();
    let more = publish(&stack, "good", 1);
    assert!(ids(&cluster.wait_entries("good", 4)).ends_with(&more));
    assert_eq!(waiting(), 3);
    cluster.call("bad", &["DEL", "bad"]);
    assert_eq!(ids(&cluster.wait_entries("bad", 3)), refused);
    wait_drained(&stack.pg, "default");
    assert_eq!(standing(&stack.pg, "default").failed, 0);
}

/// The `default` backend is standalone at first, with events that are sent, pending and refused.
#[test]
fn a_backend_becomes_a_clusters_and_stays_one() {
    let cluster = Cluster::start(0);
    let stack = Stack::of(Postgres::with(QUICK).with(&[UNTRIMMED]), Redis::start());
    stack.pg.set("outbox_relay.max_retries", "1000");
    stack.redis.call(&["SET", "late", "a string"]);
    publish(&stack, "", 5);
    stack.wait_events(5);
    let late = publish(&stack, "late", 2);
    wait_eq("refused events", 2i64, || {
        stack
            .pg
            .one("select count(*) from outbox.refused_events where accepted_in is null")
    });
    stack.pg.exec("update outbox.backends set enabled = false");
    let waiting = publish(&stack, "", 5);
    let others = publish(&stack, "other", 5);
    point(&stack, &cluster);
    stack.pg.exec("update outbox.backends set enabled = true");
    // Events that were sent before are not sent again.
    assert_eq!(ids(&cluster.wait_entries("events", 5)), waiting);
    assert_eq!(ids(&cluster.wait_entries("other", 5)), others);
    assert_eq!(ids(&cluster.wait_entries("late", 2)), late);
    wait_drained(&stack.pg, "default");
    assert_eq!(
        stack.pg.one::<String>("select stream_name from outbox.backends"),
        "events"
    );
    for change in [
        "mode = 'standalone', nodes = null",
        "mode = 'sentinel', sentinel_master = 'm'",
        "stream_name = 'another'",
    ] {
        let said = refused(&stack.pg, &format!("update outbox.backends set {change}"));
        assert_eq!(said.code, "55000", "{said:?}");
    }
    for change in [
        "nodes = null",
        "db = 1",
        "host = 'a'",
        "sentinel_master = 'm'",
        "nodes = '{a}'",
    ] {
        let said = refused(&stack.pg, &format!("update outbox.backends set {change}"));
        assert!(["23514", "22023"].contains(&said.code.as_str()), "{change}: {said:?}");
    }
    // As the hint says.
    stack
        .pg
        .exec("update outbox.backends set name = 'old'; insert into outbox.backends (name) values ('default')");
    let again = publish_many(&mut stack.pg.client(), "old", "", "event", 1);
    assert!(ids(&cluster.wait_entries("events", 6)).ends_with(&again));
    wait_drained(&stack.pg, "old");
    stack.pg.exec("delete from outbox.backends where name = 'old'");
    assert_eq!(stack.pg.one::<i64>("select count(*) from outbox.backends"), 1);
}

/// A backend with pending events in any lane is not deleted; events that are committed after the deletion fail.
#[test]
fn lanes_count_when_a_backend_is_deleted_or_purged() {
    let cluster = Cluster::start(0);
    let quick = [
        QUICK,
        &[
            ("outbox_relay.published_retention", "0"),
            ("outbox_relay.poll_interval", "200ms"),
        ],
    ]
    .concat();
    let mut stack = stack(&quick, &cluster);
    publish(&stack, "s1", 1);
    cluster.wait_entries("s1", 1);
    cluster.call("s2", &["SET", "s2", "a string"]);
    stack.pg.exec("update outbox.backends set enabled = false");
    publish(&stack, "s2", 1);
    publish(&stack, "s1", 1);
    let said = refused(&stack.pg, "delete from outbox.backends");
    assert_eq!(said.code, "55006");
    assert_eq!(standing(&stack.pg, "default").pending, 2);
    // Events that one lane has not sent are not purged, even if other lanes are ahead.
    cluster.call("s2", &["DEL", "s2"]);
    let paused = publish(&stack, "s3", 1);
    stack.pg.exec("call outbox.purge()");
    assert_eq!(
        stack
            .pg
            .one::<i64>("select count(*) from outbox.events where stream = 's3'"),
        1
    );
    stack.pg.exec("update outbox.backends set enabled = true");
    assert_eq!(ids(&cluster.wait_entries("s3", 1)), paused);
    wait_drained(&stack.pg, "default");
    wait_eq("events that are kept", 0i64, || {
        stack.pg.one("select count(*) from outbox.events")
    });
    // Not committed yet when the backend is deleted.
    let mut late = stack.pg.client();
    let mut late = late.transaction().expect("a transaction");
    late.execute("select outbox.publish_event('late', 'kit', stream => 's1')", &[])
        .expect("published");
    stack.pg.exec("delete from outbox.backends");
    late.commit().expect("committed");
    wait_eq("failed events", 1i64, || {
        stack.pg.one("select count(*) from outbox.failed_events")
    });
    stack.pg.restart();
    let failed: i64 = stack.pg.one("select count(*) from outbox.failed_events");
    assert_eq!(failed, 1);
}

/// Any one node is enough to find the others.
#[test]
fn one_node_that_answers_is_enough() {
    let cluster = Cluster::start(0);
    let stack = stack(QUICK, &cluster);
    let one = cluster.nodes[2].port();
    stack.pg.exec(&format!(
        "update outbox.backends set nodes = '{{127.0.0.1:1,127.0.0.1:{one}}}'"
    ));
    let published: Vec<Vec<Uuid>> = (0..9).map(|n| publish(&stack, &format!("s{n}"), 1)).collect();
    for (n, published) in published.iter().enumerate() {
        assert_eq!(&ids(&cluster.wait_entries(&format!("s{n}"), 1)), published);
    }
    stack.pg.exec("update outbox.backends set nodes = '{127.0.0.1:1}'");
    publish(&stack, "another", 1);
    wait_trouble(&stack.pg, "default", "backoff", "node 127.0.0.1:");
}

/// `wait_replicas` and `on_missing_guard`, in each lane.
#[test]
fn on_missing_guard_decides_what_happens_to_a_cluster_that_lost_everything() {
    let cluster = Cluster::start(1);
    let stack = stack(QUICK, &cluster);
    stack
        .pg
        .exec("update outbox.backends set wait_replicas = 1, on_missing_guard = 'replay'");
    let streams = ["s1", "s2", "s3", "s4"];
    let published: Vec<Vec<Uuid>> = streams.iter().map(|s| publish(&stack, s, 3)).collect();
    for stream in streams {
        cluster.wait_entries(stream, 3);
    }
    wait_drained(&stack.pg, "default");
    for node in &cluster.nodes {
        if node.replication("role").as_deref() == Some("master") {
            node.call(&["FLUSHALL"]);
        }
    }
    // Each lane finds that out by itself.
    for stream in streams {
        publish(&stack, stream, 1);
    }
    for (stream, published) in streams.iter().zip(&published) {
        let arrived = eventually("what was replayed", LIMIT, || {
            let arrived = ids(&cluster.entries(stream));
            (arrived.len() >= 4).then_some(arrived)
        });
        assert_eq!(&arrived[..3], published.as_slice(), "{stream}");
        assert_eq!(arrived.len(), 4);
    }
}

/// Each lane misses its own guard, and one take_over() ends the wait of all.
#[test]
fn a_take_over_concerns_every_lane() {
    let cluster = Cluster::start(0);
    let stack = stack(QUICK, &cluster);
    stack.pg.exec("update outbox.backends set on_missing_guard = 'halt'");
    let streams = ["s1", "s2", "s3", "s4"];
    for stream in streams {
        publish(&stack, stream, 2);
        cluster.wait_entries(stream, 2);
    }
    wait_drained(&stack.pg, "default");
    for node in &cluster.nodes {
        node.call(&["FLUSHALL"]);
    }
    let waiting: Vec<Vec<Uuid>> = streams.iter().map(|s| publish(&stack, s, 2)).collect();
    wait_trouble(&stack.pg, "default", "misconfigured", "its guard is missing");
    wait_eq("lanes that wait", 4i64, || {
        stack
            .pg
            .one("select count(*) from outbox.cursors where slot >= 0 and state = 'misconfigured'")
    });
    stack.pg.exec("select outbox.take_over('default')");
    for (stream, waiting) in streams.iter().zip(&waiting) {
        assert_eq!(&ids(&cluster.wait_entries(stream, 2)), waiting, "{stream}");
    }
    wait_eq("take-overs that were asked for", 0i64, || {
        stack.pg.one("select count(*) from outbox.take_overs")
    });
    wait_drained(&stack.pg, "default");
}

/// Retention counts from the delivery by all lanes.
#[test]
fn what_one_lane_has_not_sent_is_not_purged_while_the_others_go_on() {
    let cluster = Cluster::start(0);
    let at_once = ("outbox_relay.published_retention", "0");
    let stack = stack(&[QUICK, &[at_once]].concat(), &cluster);
    let streams = ["s1", "s2", "s3"];
    for stream in streams {
        publish(&stack, stream, 1);
        cluster.wait_entries(stream, 1);
    }
    let slow = cluster.master_of("s1");
    let other = streams.iter().find(|s| cluster.master_of(s) != slow);
    let other = other.expect("streams on different nodes");
    cluster.nodes[slow].call(&["CLIENT", "PAUSE", "60000", "WRITE"]);
    let waiting = publish(&stack, "s1", 3);
    for n in 0..5 {
        publish(&stack, other, 1);
        cluster.wait_entries(other, 2 + n);
        // Ticks are recorded once a second.
        std::thread::sleep(std::time::Duration::from_millis(600));
    }
    let kept: i64 = stack.pg.one("select count(*) from outbox.events where stream = 's1'");
    assert!(kept >= 3, "{kept} events of the slow lane are kept");
    assert_eq!(cluster.entries("s1").len(), 1);
    cluster.nodes[slow].call(&["CLIENT", "UNPAUSE"]);
    assert!(ids(&cluster.wait_entries("s1", 4)).ends_with(&waiting));
    wait_eq("events that are kept", 0i64, || {
        stack.pg.one("select count(*) from outbox.events")
    });
}
