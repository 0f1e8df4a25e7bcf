//! Sentinels and cluster nodes name other servers: these get the backend's password only if `allowed_hosts` allows
//! them, and a sentinel only if it asks for one. A role that may update single columns gets no password either.

use kit::{BlackHole, Eavesdropper, Postgres, QUICK, Redis, Stack, wait_drained, wait_trouble, wait_until};

const SECRET: &str = "Xq7-zK9.wQ2y";

fn start(allowed: &str) -> Stack {
    Stack::of(
        Postgres::with(QUICK).with(&[("outbox_relay.allowed_hosts", allowed)]),
        Redis::start(),
    )
}

/// The named server is contacted once it is allowed, which shows that the test can fail.
fn assert_told_only_if_allowed(stack: &Stack, backend: &str, evil: &Eavesdropper) {
    wait_trouble(&stack.pg, backend, "misconfigured", "does not allow host \"127.0.0.2\"");
    assert_eq!((evil.accepted(), evil.heard()), (0, String::new()));
    stack.pg.set("outbox_relay.allowed_hosts", "127.0.0.0/8");
    wait_until("the password", || evil.heard().contains(SECRET));
}

#[test]
fn a_host_named_by_a_sentinel_gets_no_byte_unless_it_is_allowed() {
    let stack = start("127.0.0.1");
    let evil = Eavesdropper::at("127.0.0.2");
    let port = evil.port().to_string();
    let names = format!("+OK\r\n+PONG\r\n*2\r\n$9\r\n127.0.0.2\r\n${}\r\n{port}\r\n", port.len());
    let sentinel = BlackHole::saying(names.as_bytes());
    stack.pg.exec(&format!(
        "insert into outbox.backends (name, mode, nodes, sentinel_master, stream_name)
            values ('watched', 'sentinel', '{{127.0.0.1:{}}}', 'm', 's');
        select outbox.set_backend_password('watched', '{SECRET}'); select outbox.publish_event('t', 's', backend => 'watched')",
        sentinel.port()
    ));
    assert_told_only_if_allowed(&stack, "watched", &evil);
}

#[test]
fn a_sentinel_that_needs_no_password_gets_none() {
    let stack = start("*");
    let sentinel = Eavesdropper::start();
    stack.pg.exec(&format!(
        "insert into outbox.backends (name, mode, nodes, sentinel_master, stream_name)
            values ('watched', 'sentinel', '{{127.0.0.1:{}}}', 'm', 's');
        select outbox.set_backend_password('watched', '{SECRET}'); select outbox.publish_event('t', 's', backend => 'watched')",
        sentinel.port()
    ));
    wait_until("several attempts", || sentinel.accepted() > 2);
    assert!(sentinel.heard().contains("GET-MASTER-ADDR-BY-NAME"));
    assert!(!sentinel.heard().contains("AUTH"), "{}", sentinel.heard());
}

#[test]
fn a_host_named_by_a_cluster_gets_no_byte_unless_it_is_allowed() {
    let stack = start("127.0.0.1");
    let evil = Eavesdropper::at("127.0.0.2");
    let names = format!(
        "+OK\r\n+OK\r\n+PONG\r\n*1\r\n*3\r\n:0\r\n:16383\r\n*2\r\n$9\r\n127.0.0.2\r\n:{}\r\n",
        evil.port()
    );
    let node = BlackHole::saying(names.as_bytes());
    stack.pg.exec(&format!(
        "insert into outbox.backends (name, mode, nodes, stream_name) values ('spread', 'cluster', '{{127.0.0.1:{}}}', 's');
        select outbox.set_backend_password('spread', '{SECRET}'); select outbox.publish_event('t', 's', backend => 'spread')",
        node.port()
    ));
    assert_told_only_if_allowed(&stack, "spread", &evil);
}

/// With UPDATE of only one column.
#[test]
fn a_role_that_may_change_one_column_cannot_move_the_password() {
    let stack = start("*");
    stack.redis.call(&["CONFIG", "SET", "requirepass", SECRET]);
    stack.pg.exec(&format!(
        "select outbox.set_backend_password('default', '{SECRET}'); create role mover login; grant usage on schema outbox to mover;
        grant select (name), update (port) on outbox.backends to mover"
    ));
    wait_drained(&stack.pg, "default");
    let evil = Eavesdropper::start();
    stack
        .pg
        .client_as("mover", "postgres")
        .batch_execute(&format!(
            "update outbox.backends set port = {} where name = 'default'",
            evil.port()
        ))
        .expect("granted");
    stack.pg.exec("select outbox.publish_event('t', 's')");
    wait_trouble(&stack.pg, "default", "misconfigured", "set for another destination");
    assert_eq!((evil.accepted(), evil.heard()), (0, String::new()));
}
