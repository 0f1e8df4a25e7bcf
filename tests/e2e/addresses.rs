//! Names and addresses: a name is resolved at each connect, and a resolver or host that does not answer delays no other
//! backend.

use std::net::UdpSocket;
use std::time::{Duration, Instant};

use kit::{Mode, Postgres, QUICK, Redis, Stack, backoff, env, promptly, wait_drained, wait_trouble, wait_until};

#[test]
fn an_address_that_changes_is_found_again() {
    if !env::can_mount("/etc/hosts") {
        return;
    }
    let (hosts, file) = kit::env::shared_file("hosts", "127.0.0.2 redis.test\n127.0.0.1 localhost\n");
    let postgres = Postgres::with(QUICK).mount(&file, "/etc/hosts");
    let stack = Stack::of(postgres, Redis::start());
    stack.point_at("default", "redis.test", stack.redis.port());
    stack.publish("t");
    // Nothing listens at this address.
    wait_trouble(&stack.pg, "default", "backoff", "refused");
    // Written to the same file, because it is mounted.
    std::fs::write(&file, "127.0.0.1 redis.test localhost\n").expect("write");
    wait_drained(&stack.pg, "default");
    assert_eq!(stack.events().len(), 1);
    std::fs::write(&file, "127.0.0.2 redis.test\n127.0.0.1 localhost\n").expect("write");
    stack.redis.call(&["CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes"]);
    stack.publish("t");
    wait_trouble(&stack.pg, "default", "backoff", "refused");
    drop(hosts);
}

/// A name server that never answers, and a stack that waits for it for long.
fn unanswered(options: &str) -> (UdpSocket, Stack) {
    let resolver = (1..250)
        .find_map(|n| UdpSocket::bind((format!("127.77.{}.{n}", std::process::id() % 250), 53)).ok())
        .expect("a port for a resolver");
    resolver.set_read_timeout(Some(kit::LIMIT)).expect("a timeout");
    let address = resolver.local_addr().expect("an address").ip();
    let config = format!("nameserver {address}\noptions {options}\n");
    let (_dir, file) = kit::env::shared_file("resolv.conf", &config);
    let stack = Stack::of(Postgres::with(QUICK).mount(&file, "/etc/resolv.conf"), Redis::start());
    (resolver, stack)
}

#[test]
fn a_name_server_that_does_not_answer_is_an_outage() {
    if !env::can_mount("/etc/resolv.conf") {
        return;
    }
    let (_resolver, stack) = unanswered("timeout:1 attempts:1");
    stack.point_at("default", "redis.example.com", 6379);
    let trouble = backoff(
        "Temporary failure in name resolution",
        "The name server does not answer. Check /etc/resolv.conf on the database server.",
    );
    let expected = stack.publish_into(&trouble, 150);
    stack.point("default", &stack.redis);
    stack.assert_mended(&stack.redis, &expected);
}

/// A resolver that never answers, while threads of the worker wait for it.
#[test]
fn a_resolver_that_does_not_answer_delays_no_other_backend() {
    if !env::can_mount("/etc/resolv.conf") {
        return;
    }
    let (resolver, mut stack) = unanswered("timeout:30 attempts:5");
    let asked = |resolver: &UdpSocket| {
        resolver.recv(&mut [0; 512]).expect("somebody asks the resolver");
    };
    stack
        .pg
        .exec("insert into outbox.backends (name, host, port) values ('stuck', 'redis.example.com', 6379)");
    stack
        .pg
        .exec("select outbox.publish_event('t', 'kit', backend => 'stuck')");
    asked(&resolver);
    // The others go on, and the wait ends as soon as the backend is changed.
    let start = Instant::now();
    stack.publish("t");
    stack.wait_events(1);
    assert!(start.elapsed() < Duration::from_secs(2), "{:?}", start.elapsed());
    stack.point("stuck", &stack.redis);
    stack.wait_events(2);
    wait_drained(&stack.pg, "stuck");

    // A separate database can be dropped, too.
    stack.pg.exec("create database doomed");
    stack.pg.exec_db(
        "doomed",
        "create extension outbox_relay; update outbox.backends set host = 'redis.example.org'",
    );
    stack.pg.wait_worker("doomed");
    asked(&resolver);
    promptly(&stack.pg, "drop database doomed");

    stack
        .pg
        .exec("update outbox.backends set host = 'redis.example.net' where name = 'stuck'");
    asked(&resolver);
    let start = Instant::now();
    stack.pg.stop(Mode::Fast);
    assert!(start.elapsed() < Duration::from_millis(1_500), "{:?}", start.elapsed());
}

/// No event is published, and yet the next one finds a connection.
#[test]
fn an_idle_connection_that_is_closed_is_made_anew() {
    for delivery in ["exactly_once", "at_least_once"] {
        let stack = Stack::of(
            Postgres::with(QUICK).with(&[("outbox_relay.poll_interval", "200ms")]),
            Redis::start(),
        );
        stack
            .pg
            .exec(&format!("update outbox.backends set delivery = '{delivery}'"));
        stack.publish("t");
        stack.wait_events(1);
        wait_drained(&stack.pg, "default");
        let clients = || format!("{:?}", stack.redis.call(&["CLIENT", "LIST"]));
        let id = |clients: &str| {
            let line = clients.lines().find(|line| line.contains("name=outbox_relay"));
            line.and_then(|line| line.split_whitespace().next()).map(str::to_owned)
        };
        let list = |text: String| id(&text.replace("\\n", "\n"));
        let first = list(clients()).expect("a connection");
        stack.redis.call(&["CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes"]);
        wait_until(&format!("another connection with {delivery}"), || {
            list(clients()).is_some_and(|now| now != first)
        });
    }
}
