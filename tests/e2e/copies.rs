//! CREATE DATABASE ... TEMPLATE: the copy knows that it is one. It sends nothing until take_over(), and then only what
//! was published in it, once, beside the original; the original sends the events that were pending when the copy was
//! made.

use kit::{Postgres, Redis, Stack, UNTRIMMED, holds_for, ids, publish_many, types, wait_eq, wait_until};
use std::time::Duration;
use uuid::Uuid;

const SETTINGS: &[(&str, &str)] = &[UNTRIMMED, ("outbox_relay.poll_interval", "200ms")];

fn stack() -> Stack {
    let stack = Stack {
        pg: Postgres::with(SETTINGS).start(),
        redis: Redis::start(),
    };
    stack.pg.exec("create database shop");
    stack.pg.exec_db("shop", "create extension outbox_relay");
    point(&stack, "shop");
    stack
}

fn point(stack: &Stack, db: &str) {
    let port = stack.redis.port();
    let sql = format!("update outbox.backends set host = '127.0.0.1', port = {port}");
    stack.pg.exec_db(db, &sql);
}

fn publish(stack: &Stack, db: &str, prefix: &str, count: i32) -> Vec<Uuid> {
    publish_many(&mut stack.pg.client_db(db), "default", "", prefix, count)
}

fn schedule(stack: &Stack, db: &str, event_type: &str, after: &str) {
    let sql =
        format!("select outbox.publish_event('{event_type}', 'kit', scheduled_at => clock_timestamp() + '{after}')");
    stack.pg.exec_db(db, &sql);
}

fn pause(stack: &Stack, db: &str, paused: bool) {
    stack
        .pg
        .exec_db(db, &format!("update outbox.backends set enabled = {}", !paused));
}

fn take_over(stack: &Stack, db: &str) {
    stack.pg.exec_db(db, "select outbox.take_over('default')");
}

fn pending(stack: &Stack, db: &str) -> i64 {
    stack.pg.one_db(
        db,
        "select pending from outbox.backend_status where backend = 'default'",
    )
}

fn state(stack: &Stack, db: &str) -> String {
    stack
        .pg
        .one_db(db, "select state from outbox.backend_status where backend = 'default'")
}

fn wait_delivered(stack: &Stack, db: &str) {
    wait_eq(&format!("pending events in {db}"), 0, || pending(stack, db));
    wait_eq("the state", "idle".to_string(), || state(stack, db));
}

fn sorted(mut ids: Vec<Uuid>) -> Vec<Uuid> {
    ids.sort();
    ids
}

/// The types of the failed events in a database.
fn failed(stack: &Stack, db: &str) -> Vec<String> {
    let sql = "select event_type from outbox.failed_events \
        where last_error = 'it was pending when this database was copied, so only the original may send it' order by seq";
    let rows = stack.pg.client_db(db).query(sql, &[]).expect("failed events");
    rows.iter().map(|row| row.get(0)).collect()
}

#[test]
fn a_copied_database_sends_nothing_until_it_is_told_to_and_then_what_is_its_own() {
    let stack = stack();
    let sent = publish(&stack, "shop", "sent", 3);
    stack.wait_events(3);
    wait_delivered(&stack, "shop");
    pause(&stack, "shop", true);
    let waiting = publish(&stack, "shop", "waits", 4);
    schedule(&stack, "shop", "soon", "2 s");
    schedule(&stack, "shop", "later", "1 hour");

    stack.pg.exec("create database staging template shop");
    let own = publish(&stack, "staging", "own", 2);
    schedule(&stack, "staging", "own-soon", "1 s");
    pause(&stack, "staging", false);
    wait_eq("the copy's state", "copy".to_string(), || state(&stack, "staging"));
    stack.pg.wait_worker("staging");
    stack.pg.wait_log("WARNING:  backend \"default\" sends nothing");
    let log = stack.pg.log();
    let oid: u32 = stack.pg.one("select oid from pg_database where datname = 'shop'");
    assert!(
        log.contains(&format!(
            "DETAIL:  This database is a copy of the database with OID {oid}."
        )),
        "{log}"
    );
    assert!(log.contains("run outbox.take_over(backend) here"), "{log}");
    let status: String = stack.pg.one_db("staging", "select state from outbox.status");
    assert_eq!(status, "copy");
    // Only its own events will be sent.
    wait_eq("what waits in the copy", 3, || pending(&stack, "staging"));
    assert_eq!(
        failed(&stack, "staging"),
        ["waits1", "waits2", "waits3", "waits4", "soon", "later"]
    );
    let rows: i64 = stack.pg.one_db(
        "staging",
        "select count(*) from outbox.event_status where status = 'pending'",
    );
    assert_eq!(rows, 3);
    holds_for(Duration::from_secs(1), "the copy sends nothing", || {
        stack.events().len() == 3
    });

    pause(&stack, "shop", false);
    stack.wait_events(8);
    wait_delivered(&stack, "shop");
    assert_eq!(
        types(&stack.events())[3..],
        ["waits1", "waits2", "waits3", "waits4", "soon"]
    );
    take_over(&stack, "staging");
    stack.wait_events(11);
    wait_delivered(&stack, "staging");
    let last = publish(&stack, "staging", "last", 2);
    let of_shop = publish(&stack, "shop", "more", 2);
    stack.wait_events(15);
    wait_delivered(&stack, "staging");
    wait_delivered(&stack, "shop");
    let arrived = sorted(ids(&stack.events()));
    let soon: Vec<Uuid> = [("shop", "soon"), ("staging", "own-soon")]
        .map(|(db, name)| {
            stack.pg.one_db(
                db,
                &format!("select event_id from outbox.events where event_type = '{name}'"),
            )
        })
        .to_vec();
    assert_eq!(arrived, sorted([sent, waiting, own, last, of_shop, soon].concat()));
    assert_eq!(failed(&stack, "shop"), [""; 0]);
    let keys = ["shop", "staging"].map(|db| stack.pg.one_db::<String>(db, "select outbox.guard_key('default')"));
    assert!(stack.redis.guard(&keys[0]).is_some() && stack.redis.guard(&keys[1]).is_some());
    assert_ne!(keys[0].split(':').nth(2), keys[1].split(':').nth(2), "{keys:?}");
    let scheduled: i64 = stack.pg.one_db("shop", "select count(*) from outbox.scheduled_events");
    assert_eq!(scheduled, 1, "the original's");
}

/// The state outlives the worker, and each backend is taken over separately; also one that has no guard.
#[test]
fn each_backend_of_a_copy_is_taken_over_by_itself() {
    let mut stack = stack();
    let port = stack.redis.port();
    stack.pg.exec_db(
        "shop",
        &format!(
            "insert into outbox.backends (name, host, port, stream_name, delivery)
            values ('plain', '127.0.0.1', {port}, 'plain', 'at_least_once'), ('other', '127.0.0.1', {port}, 'other', 'exactly_once')"
        ),
    );
    stack.pg.exec("create database staging template shop");
    let mut client = stack.pg.client_db("staging");
    for backend in ["default", "plain", "other"] {
        publish_many(&mut client, backend, "", "own", 2);
    }
    drop(client);
    stack.pg.wait_log("This database is a copy of the database");
    let states = |pg: &Postgres| -> String {
        pg.one_db(
            "staging",
            "select string_agg(backend || ' ' || state, ', ' order by backend) from outbox.backend_status",
        )
    };
    assert_eq!(states(&stack.pg), "default copy, other copy, plain copy");
    stack.pg.restart();
    stack.pg.wait_worker("staging");
    stack.pg.exec_db("staging", "select outbox.take_over('plain')");
    stack.redis.wait_entries("plain", 2);
    wait_eq("the states", "default copy, other copy, plain idle".to_string(), || {
        states(&stack.pg)
    });
    stack.pg.exec_db("staging", "select outbox.take_over('other')");
    stack.redis.wait_entries("other", 2);
    wait_eq("the states", "default copy, other idle, plain idle".to_string(), || {
        states(&stack.pg)
    });
    holds_for(Duration::from_secs(1), "the default sends nothing", || {
        stack.redis.xlen("events") == 0
    });
    // A backend that was created in the copy needs no take_over().
    stack.pg.exec_db(
        "staging",
        &format!(
            "insert into outbox.backends (name, host, port, stream_name) values ('new', '127.0.0.1', {port}, 'new')"
        ),
    );
    publish_many(&mut stack.pg.client_db("staging"), "new", "", "new", 1);
    stack.redis.wait_entries("new", 1);
    take_over(&stack, "staging");
    stack.wait_events(2);
    let status = "select state from outbox.status".to_string();
    wait_eq("the status", "running".to_string(), || {
        stack.pg.one_db::<String>("staging", &status)
    });
    let plain_again = stack
        .pg
        .client_db("staging")
        .batch_execute("select outbox.take_over('plain')");
    assert!(plain_again.is_err(), "it has no owner");
}

/// To send the pending events from the copy, publish them again there.
#[test]
fn events_that_were_pending_can_be_sent_from_the_copy_on_purpose() {
    let stack = stack();
    pause(&stack, "shop", true);
    let waiting = publish(&stack, "shop", "waits", 3);
    stack.pg.exec("create database staging template shop");
    stack.pg.exec("drop database shop");
    take_over(&stack, "staging");
    pause(&stack, "staging", false);
    wait_eq("what was noticed", 3, || failed(&stack, "staging").len());
    let retried: i64 = stack.pg.one_db("staging", "select outbox.retry_failed()");
    assert_eq!(retried, 3);
    assert_eq!(ids(&stack.wait_events(3)), waiting);
}

/// Nobody notices the copy for a while, and its row of pg_database is changed repeatedly meanwhile.
#[test]
fn events_published_before_the_copy_is_noticed_are_its_own() {
    let mut stack = stack();
    pause(&stack, "shop", true);
    publish(&stack, "shop", "waits", 5);
    for (name, vacuums) in [("first", false), ("second", true)] {
        stack.pg.set("outbox_relay.databases", "shop");
        wait_until("the setting", || {
            stack.pg.one::<String>("show outbox_relay.databases") == "shop"
        });
        stack.pg.exec(&format!("create database {name} template shop"));
        // The creation time has a resolution of seconds, and the row itself proves nothing any more.
        std::thread::sleep(Duration::from_millis(1_100));
        let mut own = publish(&stack, name, "early", 3);
        for limit in 10..13 {
            stack
                .pg
                .exec(&format!("alter database {name} connection limit {limit}"));
            if vacuums {
                stack.pg.exec("vacuum pg_database");
            }
        }
        own.extend(publish(&stack, name, "late", 3));
        assert_eq!(state(&stack, name), "copy", "without a worker");
        stack.pg.restart();
        stack.pg.set("outbox_relay.databases", "*");
        take_over(&stack, name);
        pause(&stack, name, false);
        let there = if vacuums { 6 } else { 0 };
        assert_eq!(ids(&stack.wait_events(there + 6))[there..], own, "{name}");
        wait_delivered(&stack, name);
        assert_eq!(failed(&stack, name), ["waits1", "waits2", "waits3", "waits4", "waits5"]);
    }
}

/// A copy of a copy; a name that is used again; a renamed copy; an extension that is dropped and created again in a
/// copy.
#[test]
fn copies_of_copies_are_copies_and_names_do_not_matter() {
    let stack = stack();
    publish(&stack, "shop", "sent", 1);
    stack.wait_events(1);
    wait_delivered(&stack, "shop");
    stack.pg.exec("create database one template shop");
    wait_eq("the state", "copy".to_string(), || state(&stack, "one"));
    take_over(&stack, "one");
    publish(&stack, "one", "one", 1);
    stack.wait_events(2);
    wait_delivered(&stack, "one");
    stack.pg.exec("create database two template one");
    publish(&stack, "two", "two", 1);
    stack.pg.wait_worker("two");
    wait_eq("the state", "copy".to_string(), || state(&stack, "two"));
    stack.pg.exec("alter database two rename to three");
    stack.pg.wait_worker("three");
    holds_for(Duration::from_secs(1), "the copy sends nothing", || {
        stack.events().len() == 2
    });
    assert_eq!(state(&stack, "three"), "copy");
    // Renaming its original does not make that a copy.
    stack.pg.exec("alter database one rename to uno");
    publish(&stack, "uno", "uno", 1);
    stack.wait_events(3);
    take_over(&stack, "three");
    stack.wait_events(4);
    stack.pg.exec("drop database three");
    stack.pg.exec("create database three template shop");
    publish(&stack, "three", "never", 1);
    stack.pg.wait_worker("three");
    wait_eq("the state", "copy".to_string(), || state(&stack, "three"));
    holds_for(Duration::from_secs(1), "the copy sends nothing", || {
        stack.events().len() == 4
    });
    stack.pg.exec_db(
        "three",
        "begin; drop extension outbox_relay cascade; create extension outbox_relay; commit",
    );
    point(&stack, "three");
    publish(&stack, "three", "fresh", 1);
    assert_eq!(
        types(&stack.wait_events(5)),
        ["sent", "one", "uno", "two", "fresh"].map(|t| format!("{t}1"))
    );
}

/// A template that was never used cannot be confused with anything: a database made from it is an installation of its
/// own.
#[test]
fn a_database_made_of_an_unused_template_is_no_copy() {
    let stack = stack();
    stack
        .pg
        .exec("alter database shop is_template true allow_connections false");
    stack.pg.exec("create database tenant template shop");
    publish(&stack, "tenant", "fresh", 2);
    stack.wait_events(2);
    wait_delivered(&stack, "tenant");
    // A used template belongs to another installation.
    stack.pg.exec("alter database tenant is_template true");
    stack.pg.exec("create database copy template tenant");
    publish(&stack, "copy", "never", 2);
    wait_eq("the state", "copy".to_string(), || state(&stack, "copy"));
    holds_for(Duration::from_secs(1), "the copy sends nothing", || {
        stack.events().len() == 2
    });
}
