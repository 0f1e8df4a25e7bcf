//! `outbox_relay.allowed_hosts` limits where the server connects to, whatever the backends name.

use kit::{
    BlackHole, Mode, Postgres, QUICK, Redis, Stack, publish_many, standing, wait_drained, wait_trouble, wait_until,
};

const SETTING: &str = "outbox_relay.allowed_hosts";

/// Whether the relay is connected to this Redis.
fn is_connected(redis: &Redis) -> bool {
    format!("{:?}", redis.call(&["CLIENT", "LIST"])).contains("name=outbox_relay")
}

/// Sets the list, and waits until it applies.
fn allow(stack: &Stack, list: &str) {
    stack.pg.set(SETTING, list);
    kit::wait_eq("the setting", list.to_owned(), || {
        stack.pg.one(&format!("show {SETTING}"))
    });
}

#[test]
fn names_addresses_networks_and_sockets() {
    let stack = Stack::with(QUICK);
    let socket = stack.redis.socket().display().to_string();
    let above = stack.redis.dir().parent().expect("a directory").display().to_string();
    let crooked = format!(
        "{}/../{}/redis.sock",
        stack.redis.dir().display(),
        stack.redis.dir().file_name().unwrap().display()
    );
    let networks = "127.0.0.0/8, ::1/128, /nowhere/*";
    for (list, host, allowed) in [
        ("localhost", "localhost", true),
        ("redis.internal,LOCAL*", "localhost", true),
        (" 127.0.0.1", "127.0.0.1", true),
        (networks, "127.0.0.1", true),
        // By the address that the name stands for.
        (networks, "localhost", true),
        ("10.0.0.0/8, fd00::/8", "localhost", false),
        ("10.0.0.0/8", "127.0.0.1", false),
        ("redis.internal", "localhost", false),
        ("localhost", "127.0.0.1", false),
        // Only the resolver takes this for an address.
        ("localhost, *.net", "127.1", false),
        ("", "localhost", false),
        ("/*", "localhost", false),
        (&format!("{above}/*"), &socket, true),
        (&format!("{above}/* "), &crooked, false),
        (networks, &socket, false),
        ("*", &crooked, true),
    ] {
        let (address, port) = (stack.redis.port(), i32::from(stack.redis.port()));
        stack.pg.exec(&format!(
            "update outbox.backends set enabled = false; update outbox.backends set port = {address}"
        ));
        allow(&stack, list);
        let columns = match host.starts_with('/') {
            true => format!("unix_socket = '{host}'"),
            false => format!("unix_socket = null, host = '{host}', port = {port}"),
        };
        stack
            .pg
            .exec(&format!("update outbox.backends set enabled = true, {columns}"));
        stack.publish("t");
        if allowed {
            wait_drained(&stack.pg, "default");
            assert!(is_connected(&stack.redis), "{list:?}, {host}");
        } else {
            let said = wait_trouble(
                &stack.pg,
                "default",
                "misconfigured",
                "outbox_relay.allowed_hosts does not allow",
            );
            assert!(
                said.last_error.as_ref().is_some_and(|e| e.contains(host)),
                "{list:?}, {host}: {said:?}"
            );
            assert!(!is_connected(&stack.redis), "{list:?}, {host}");
        }
    }
    stack
        .pg
        .wait_log("HINT:  Add its name, address or network to outbox_relay.allowed_hosts");
    assert_eq!(standing(&stack.pg, "default").failed, 0);
}

/// No connection is made to another host, so no password can be sent.
#[test]
fn nothing_goes_to_another_host() {
    let stack = Stack::of(Postgres::with(QUICK).with(&[(SETTING, "10.0.0.0/8")]), Redis::start());
    let hole = BlackHole::start();
    stack.pg.exec("select outbox.set_backend_password('default', 'secret')");
    for host in ["localhost", "127.0.0.1"] {
        stack.point_at("default", host, hole.port());
        wait_trouble(
            &stack.pg,
            "default",
            "misconfigured",
            &format!("does not allow host \"{host}\""),
        );
    }
    let attempt = || -> chrono::DateTime<chrono::Utc> {
        stack
            .pg
            .one("select coalesce(next_attempt_at, '-infinity') from outbox.backend_status")
    };
    let first = attempt();
    wait_until("another attempt", || attempt() > first);
    assert_eq!(hole.accepted(), 0);
    allow(&stack, "127.0.0.1");
    wait_until("a connection", || hole.accepted() > 0);
}

#[test]
fn a_reload_ends_connections_that_are_no_longer_allowed() {
    let stack = Stack::with(QUICK);
    publish_many(&mut stack.pg.client(), "default", "", "t", 10);
    wait_drained(&stack.pg, "default");
    assert!(is_connected(&stack.redis));
    allow(&stack, "redis.internal, 10.0.0.0/8");
    wait_until("the relay to leave", || !is_connected(&stack.redis));
    stack.publish("t");
    wait_trouble(
        &stack.pg,
        "default",
        "misconfigured",
        "does not allow host \"127.0.0.1\"",
    );
    assert_eq!(stack.events().len(), 10);
    allow(&stack, "127.0.0.0/8");
    wait_drained(&stack.pg, "default");
    assert_eq!(stack.events().len(), 11);
}

#[test]
fn an_unreadable_list_allows_nothing() {
    let mut stack = Stack::of(Postgres::with(QUICK).with(&[(SETTING, "127.0.0.1")]), Redis::start());
    stack.publish("t");
    stack.wait_events(1);
    // A reload keeps the list of before.
    stack.pg.configure(&[(SETTING, "127.0.0.1:6379")]);
    stack.pg.reload();
    stack
        .pg
        .wait_log("invalid value for parameter \"outbox_relay.allowed_hosts\": \"127.0.0.1:6379\"");
    stack
        .pg
        .wait_log("DETAIL:  \"127.0.0.1:6379\" is not an address; ports cannot be listed.");
    stack.publish("t");
    stack.wait_events(2);
    // At the start there is no list of before.
    stack.pg.stop(Mode::Fast);
    stack.pg.start_again();
    stack
        .pg
        .wait_log("outbox_relay.allowed_hosts is invalid: the relay will not connect to any backend");
    stack.publish("t");
    wait_trouble(
        &stack.pg,
        "default",
        "misconfigured",
        "outbox_relay.allowed_hosts does not allow",
    );
    stack.pg.configure(&[(SETTING, "127.0.0.1")]);
    stack.pg.reload();
    wait_drained(&stack.pg, "default");
    assert_eq!(stack.events().len(), 3);
}
