//! Templates of a cluster's backend; the order of events, whatever process is killed.

use super::set_template;
use kit::{
    Cluster, Ledger, Load, Postgres, Redis, Refused, Stack, UNTRIMMED, publish_many, standing, wait_drained, wait_eq,
};

#[test]
fn a_clusters_backend_spreads_its_events_by_a_template() {
    let cluster = Cluster::start(0);
    let stack = Stack::of(Postgres::with(&[]).with(&[UNTRIMMED]), Redis::start());
    stack.pg.exec(&format!(
        "update outbox.backends set mode = 'cluster', nodes = '{}', host = null, port = null, stream_name = 'plain'",
        cluster.addresses()
    ));
    publish_many(&mut stack.pg.client(), "default", "", "t", 2);
    cluster.wait_entries("plain", 2);
    wait_drained(&stack.pg, "default");
    stack.pg.exec("update outbox.backends set enabled = false");
    publish_many(&mut stack.pg.client(), "default", "", "waits", 1);
    // Its hash slots are those of the events: a template may be set, changed and removed.
    set_template(&stack.pg, "s{subject|8}");
    stack.pg.exec("update outbox.backends set enabled = true");
    cluster.wait_entries("plain", 3);
    for key in 0..40 {
        stack.pg.exec(&format!(
            "select outbox.publish_event('t', 's', subject => '{key}') from generate_series(1, 3)"
        ));
    }
    let streams: Vec<String> = (0..8).map(|n| format!("s{n}")).collect();
    wait_drained(&stack.pg, "default");
    let entries: Vec<usize> = streams.iter().map(|stream| cluster.entries(stream).len()).collect();
    assert_eq!(entries.iter().sum::<usize>(), 120, "{entries:?}");
    for (stream, found) in streams.iter().zip(&entries) {
        let count: i64 = stack.pg.one(&format!(
            "select count(*) from outbox.events where stream = '{stream}' and subject is not null"
        ));
        assert_eq!(*found as i64, count);
    }
    wait_eq("lanes", 9, || {
        stack
            .pg
            .one::<i64>("select count(*) from outbox.cursors where backend_number = 1 and slot >= 0")
    });
    assert!(stack.pg.one::<bool>("select ok from outbox.test_backend('default')"));
    assert_eq!(standing(&stack.pg, "default").state, "idle");
    let refused = Refused::of(
        stack
            .pg
            .client()
            .batch_execute("update outbox.backends set stream_name = 'another'"),
    );
    assert_eq!(
        (refused.code.as_str(), refused.message.as_str()),
        ("55000", "mode and stream_name of backend \"default\" cannot be changed")
    );
    set_template(&stack.pg, "{{s0}}:{event_type}");
    stack.pg.exec("select outbox.publish_event('t', 's')");
    cluster.wait_entries("{s0}:t", 1);
    stack.pg.exec("update outbox.backends set stream_name = 'plain'");
}

#[test]
fn events_of_a_template_are_in_order_whatever_is_killed() {
    let mut stack = Stack::of(Postgres::with(&[UNTRIMMED]), Redis::start());
    set_template(&stack.pg, "s{subject|4}");
    Ledger::create(&stack.pg);
    let load = Load::paced(&stack.pg, 600, "null");
    for _ in 0..3 {
        load.wait_more(50);
        stack.pg.kill_worker();
    }
    load.wait_more(50);
    stack.pg.crash();
    stack.pg.start_again();
    load.wait_more(20);
    load.stop();
    wait_drained(&stack.pg, "default");
    stack
        .pg
        .exec("update ledger set stream = 's' || outbox.stream_part(key, 4)");
    let streams: Vec<String> = (0..4).map(|n| format!("s{n}")).collect();
    let read = |stream: &str| {
        let entries = stack.redis.entries(stream);
        entries.iter().map(|entry| entry.field("event_id").to_owned()).collect()
    };
    Ledger::verdict_of(&stack.pg, "default", &streams, read).assert_exactly_once();
}

/// Consumers compute the parts from UTF-8, whatever the database's encoding is.
#[test]
fn parts_are_the_same_in_a_database_of_another_encoding() {
    let pg = Postgres::with(&[("outbox_relay.enabled", "off")]).start();
    pg.exec("create database latin encoding 'LATIN1' locale 'C' template template0");
    pg.exec_db(
        "latin",
        "create extension outbox_relay; update outbox.backends set stream_name = 'ö.{subject}.{subject|16}'",
    );
    let publish = "select outbox.publish_event('t', 's', subject => 'Zürich')";
    pg.exec_db("latin", publish);
    pg.exec_db(
        "latin",
        "insert into outbox.events (event_type, source, subject) values ('t', 's', 'Zürich')",
    );
    let streams: Vec<String> = pg.one_db("latin", "select array_agg(stream) from outbox.events");
    assert_eq!(streams, ["ö.Zürich.14"; 2]);
    assert_eq!(pg.one_db::<i32>("latin", "select outbox.stream_part('Zürich', 16)"), 14);
    let refused = Refused::of(pg.client_db("latin").query("select outbox.stream_part('x', 0)", &[]));
    assert_eq!(
        (refused.code.as_str(), refused.message.as_str()),
        ("22023", "the number of parts is out of range")
    );
}
