//! A row of `outbox.backends` that its constraints would have refused: an administrator may have dropped them. Such a
//! backend is misconfigured and sends nothing, even if its row could be interpreted in some way.

use std::time::Duration;

use kit::{Cluster, QUICK, Stack, holds_for, ids, publish_many, standing, types, wait_drained, wait_eq, wait_trouble};

const HINT: &str = "HINT:  Correct that column of outbox.backends; its COMMENT lists the allowed values. The backend's events wait until then.";

/// Drops all CHECK constraints of the table and the other checks of its rows, as far as an administrator can.
fn drop_constraints(stack: &Stack) {
    stack.pg.exec(
        "do $$
        declare
            found record;
        begin
            for found in select conname from pg_constraint where conrelid = 'outbox.backends'::regclass and contype = 'c' loop
                execute format('alter table outbox.backends drop constraint %I', found.conname);
            end loop;
            for found in select attname from pg_attribute where attrelid = 'outbox.backends'::regclass and attnum > 0 and attnotnull
                and attname not in ('name', 'number') loop
                execute format('alter table outbox.backends alter column %I drop not null', found.attname);
            end loop;
            alter table outbox.backends disable trigger check_backend;
        end
        $$",
    );
}

#[test]
fn a_new_backend_with_an_unknown_delivery_sends_nothing() {
    let stack = Stack::start();
    drop_constraints(&stack);
    stack.pg.exec(&format!(
        "insert into outbox.backends (name, host, port, stream_name, delivery) values ('new', '127.0.0.1', {}, 'new', 'Exactly_Once')",
        stack.redis.port()
    ));
    let published = publish_many(&mut stack.pg.client(), "new", "", "waits", 3);
    let found = wait_trouble(
        &stack.pg,
        "new",
        "misconfigured",
        "delivery is \"Exactly_Once\" but must be one of exactly_once, at_least_once",
    );
    assert_eq!((found.pending, found.failed), (3, 0), "{found:?}");
    stack.pg.wait_log(HINT);
    assert_eq!(stack.redis.xlen("new"), 0);
    stack
        .pg
        .exec("update outbox.backends set delivery = 'exactly_once' where name = 'new'");
    assert_eq!(ids(&stack.redis.wait_entries("new", 3)), published);
    wait_drained(&stack.pg, "new");
}

#[test]
fn a_backend_at_work_stops_when_its_delivery_becomes_unknown() {
    let stack = Stack::start();
    stack.publish("before");
    stack.wait_events(1);
    drop_constraints(&stack);
    for wrong in ["'at_most_once'", "''", "null"] {
        stack.pg.exec(&format!("update outbox.backends set delivery = {wrong}"));
        wait_trouble(&stack.pg, "default", "misconfigured", "delivery is ");
        stack.publish("waits");
    }
    wait_eq("events that wait", 3, || standing(&stack.pg, "default").pending);
    assert_eq!(types(&stack.events()), ["before"]);
    stack.pg.exec("update outbox.backends set delivery = 'exactly_once'");
    assert_eq!(types(&stack.wait_events(4)), ["before", "waits", "waits", "waits"]);
    wait_drained(&stack.pg, "default");
    wait_eq("the state", "idle".to_owned(), || standing(&stack.pg, "default").state);
}

/// Each of these values would mean something weaker or another Redis if it were interpreted leniently.
#[test]
fn other_columns_with_invalid_values_send_nothing() {
    let stack = Stack::start();
    drop_constraints(&stack);
    // The settings name a Redis that works: no backend may use it instead.
    stack.pg.set("outbox_relay.redis_host", "127.0.0.1");
    stack.pg.set("outbox_relay.redis_port", &stack.redis.port().to_string());
    stack.pg.reload();
    for (set, right, error) in [
        (
            "mode = 'ring'",
            "mode = 'standalone'",
            "mode is \"ring\" but must be one of standalone, sentinel, cluster",
        ),
        (
            "mode = 'sentinel', nodes = '{127.0.0.1:1}'",
            "mode = 'standalone', nodes = null",
            "sentinel_master is NULL",
        ),
        (
            "mode = 'sentinel', sentinel_master = 'm'",
            "mode = 'standalone', sentinel_master = null",
            "nodes is NULL",
        ),
        (
            "mode = 'sentinel', sentinel_master = 'm', nodes = '{here}'",
            "mode = 'standalone', sentinel_master = null, nodes = null",
            "nodes holds \"here\"",
        ),
        (
            "on_missing_guard = 'ignore'",
            "on_missing_guard = 'continue'",
            "on_missing_guard is \"ignore\" but must be one of continue, halt, replay",
        ),
        ("wait_replicas = null", "wait_replicas = 0", "wait_replicas is NULL"),
        ("wait_replicas = -1", "wait_replicas = 0", "wait_replicas is -1"),
        ("max_rate = 0", "max_rate = null", "max_rate is 0"),
        ("include_lsn = null", "include_lsn = false", "include_lsn is NULL"),
        ("tls = null", "tls = false", "tls is NULL"),
        ("max_len = -1", "max_len = null", "max_len is -1"),
        (
            "trim = 'both'",
            "trim = 'length'",
            "trim is \"both\" but must be one of length, read",
        ),
        ("trim = null", "trim = 'length'", "trim is NULL"),
        (
            "trim_ignore_idle = '-1 s'",
            "trim_ignore_idle = null",
            "trim_ignore_idle is negative",
        ),
        // Its lowest 16 bits are the port of a Redis that works.
        (
            &format!("port = {}", 65_536 + i32::from(stack.redis.port())),
            &format!("port = {}", stack.redis.port()),
            "port is ",
        ),
    ] {
        let sent = stack.events().len();
        stack.pg.exec(&format!("update outbox.backends set {set}"));
        wait_trouble(&stack.pg, "default", "misconfigured", error);
        stack.publish("waits");
        wait_eq("events that wait", 1, || standing(&stack.pg, "default").pending);
        assert_eq!(stack.events().len(), sent, "{set}");
        stack.pg.exec(&format!("update outbox.backends set {right}"));
        stack.wait_events(sent + 1);
        wait_drained(&stack.pg, "default");
    }
}

/// Its lanes are known by their saved rows: retention must not use only the finder.
#[test]
fn a_cluster_whose_mode_becomes_unknown_keeps_what_its_lanes_have_not_sent() {
    let cluster = Cluster::start(0);
    let at_once = ("outbox_relay.published_retention", "0");
    let mut stack = Stack::with(&[QUICK, &[at_once]].concat());
    stack.pg.exec(&format!(
        "update outbox.backends set mode = 'cluster', nodes = '{}', host = null, port = null",
        cluster.addresses()
    ));
    publish_many(&mut stack.pg.client(), "default", "s1", "sent", 1);
    cluster.wait_entries("s1", 1);
    let node = &cluster.nodes[cluster.master_of("s1")];
    node.call(&["CLIENT", "PAUSE", "60000", "WRITE"]);
    let waiting = publish_many(&mut stack.pg.client(), "default", "s1", "waits", 3);
    drop_constraints(&stack);
    stack.pg.exec("update outbox.backends set mode = 'ring'");
    wait_trouble(&stack.pg, "default", "misconfigured", "mode is \"ring\"");
    stack.pg.restart();
    wait_trouble(&stack.pg, "default", "misconfigured", "mode is \"ring\"");
    // Ticks are recorded, and events purged, once a second.
    holds_for(Duration::from_secs(3), "the waiting events to be kept", || {
        stack
            .pg
            .one::<i64>("select count(*) from outbox.events where event_type like 'waits%'")
            == 3
    });
    node.call(&["CLIENT", "UNPAUSE"]);
    stack.pg.exec("update outbox.backends set mode = 'cluster'");
    assert!(ids(&cluster.wait_entries("s1", 4)).ends_with(&waiting));
    wait_drained(&stack.pg, "default");
}
