//! The password file in the settings is sent to the address in the settings, and nowhere else.

use super::{MOVED, SECRET, roles, secret_file};
use kit::{Authority, Eavesdropper, Postgres, QUICK, Redis, Stack, standing, wait_drained, wait_trouble, wait_until};

/// The file in the settings is only for the address in the settings.
#[test]
fn the_settings_password_is_sent_only_to_the_settings_address() {
    let redis = Redis::with(&["--requirepass", SECRET]);
    let stack = Stack::of(Postgres::with(QUICK), redis);
    roles(&stack.pg);
    let mut keeper = stack.pg.client_as("keeper", "postgres");
    let evil = Eavesdropper::start();
    let (file, port) = (secret_file(&stack.pg), stack.redis.port());
    stack.pg.exec("update outbox.backends set host = null, port = null");
    stack.pg.configure(&[
        ("outbox_relay.redis_host", "127.0.0.1"),
        ("outbox_relay.redis_port", &port.to_string()),
        ("outbox_relay.redis_password_file", &file),
    ]);
    stack.pg.reload();
    stack.publish("one");
    wait_drained(&stack.pg, "default");
    // A role's own backend at that address, with the address given or not.
    keeper
        .batch_execute(&format!(
            "insert into outbox.backends (name, stream_name) values ('same', 'same');
            insert into outbox.backends (name, stream_name, host, port) values ('named', 'named', '127.0.0.1', {port})"
        ))
        .expect("granted");
    stack.pg.exec(
        "select outbox.publish_event('t', 's', backend => 'same'), outbox.publish_event('t', 's', backend => 'named')",
    );
    stack.redis.wait_entries("same", 1);
    stack.redis.wait_entries("named", 1);
    let port = evil.port();
    for (number, more) in [
        format!("host, port) values ('b0', '127.0.0.1', {port}"),
        format!("port) values ('b1', {port}"),
        format!("mode, nodes, sentinel_master) values ('b2', 'sentinel', '{{127.0.0.1:{port}}}', 'm'"),
        format!("mode, stream_name, nodes) values ('b3', 'cluster', 's', '{{127.0.0.1:{port}}}'"),
        format!("host, port, username) values ('b4', '127.0.0.1', {port}, 'somebody'"),
    ]
    .iter()
    .enumerate()
    {
        let calls = evil.accepted();
        keeper
            .batch_execute(&format!("insert into outbox.backends (name, {more})"))
            .unwrap_or_else(|error| panic!("{more}: {error:?}"));
        stack.pg.exec(&format!(
            "select outbox.publish_event('t', 's', backend => 'b{number}')"
        ));
        wait_until("a call", || evil.accepted() > calls);
        keeper
            .batch_execute(&format!(
                "update outbox.backends set enabled = false where name = 'b{number}'"
            ))
            .expect("granted");
    }
    keeper
        .batch_execute(&format!(
            "update outbox.backends set port = {port} where name = 'default'"
        ))
        .expect("granted");
    let calls = evil.accepted();
    stack.publish("two");
    wait_until("a call", || evil.accepted() > calls);
    assert!(!evil.heard().contains(SECRET), "{}", evil.heard());
}

/// A role cannot make a backend that uses TLS send the password in the file without TLS, or to a server with another
/// certificate.
#[test]
fn the_settings_password_is_not_sent_without_tls() {
    let authority = Authority::new();
    let certificate = authority.issue(&["127.0.0.1"]);
    let redis = Redis::tls(&certificate, &["--requirepass", SECRET]);
    let (file, port) = (authority.file("password", SECRET.as_bytes(), 0o600), redis.tls_port());
    let stack = Stack::of(Postgres::with(QUICK), redis);
    roles(&stack.pg);
    let mut keeper = stack.pg.client_as("keeper", "postgres");
    stack.pg.configure(&[
        ("outbox_relay.redis_host", "127.0.0.1"),
        ("outbox_relay.redis_port", &port.to_string()),
        ("outbox_relay.redis_password_file", &file),
    ]);
    stack.pg.reload();
    let ca = authority.ca_file();
    let set = format!("update outbox.backends set host = null, port = null, tls = true, tls_ca_file = '{ca}'");
    stack.pg.exec(&set);
    stack.publish("one");
    wait_drained(&stack.pg, "default");
    for change in [
        "tls = false, tls_ca_file = null",
        "tls_insecure = true",
        "tls_ca_file = null",
    ] {
        keeper
            .batch_execute(&format!("update outbox.backends set {change}"))
            .expect("granted");
        wait_trouble(&stack.pg, "default", "misconfigured", MOVED);
        stack
            .pg
            .exec("update outbox.backends set tls = true, tls_insecure = false");
        stack.pg.exec(&set);
        stack.publish("more");
        wait_drained(&stack.pg, "default");
    }
    assert_eq!(standing(&stack.pg, "default").failed, 0);
}

/// A backend that such a role has created, or moved to the address in the settings, does not send the password in the
/// file with TLS settings that no other backend uses.
#[test]
fn the_settings_password_needs_a_confirmed_backend_with_the_same_tls() {
    let authority = Authority::new();
    let redis = Redis::tls(&authority.issue(&["127.0.0.1"]), &["--requirepass", SECRET]);
    let (file, tls_port) = (authority.file("password", SECRET.as_bytes(), 0o600), redis.tls_port());
    let stack = Stack::of(Postgres::with(QUICK), redis);
    roles(&stack.pg);
    let mut keeper = stack.pg.client_as("keeper", "postgres");
    let plain = Eavesdropper::start();
    let ca = authority.ca_file();
    stack.pg.exec(&format!(
        "update outbox.backends set host = null, port = null, tls = true, tls_ca_file = '{ca}';
        insert into outbox.backends (name, host, port) values ('elsewhere', '127.0.0.1', {})",
        stack.redis.port()
    ));
    let settings = |port: u16| {
        stack.pg.configure(&[
            ("outbox_relay.redis_host", "127.0.0.1"),
            ("outbox_relay.redis_port", &port.to_string()),
            ("outbox_relay.redis_password_file", &file),
        ]);
        stack.pg.reload();
    };
    settings(tls_port);
    stack.publish("one");
    wait_drained(&stack.pg, "default");
    // Another user of the same Redis is not another destination.
    keeper
        .batch_execute("update outbox.backends set username = 'default' where name = 'default'")
        .expect("granted");
    stack.publish("two");
    wait_drained(&stack.pg, "default");
    keeper
        .batch_execute("update outbox.backends set username = null where name = 'default'")
        .expect("granted");
    let ways = [
        "insert into outbox.backends (name) values ('own')",
        "insert into outbox.backends (name, tls) values ('own', true)",
        "insert into outbox.backends (name, tls, tls_insecure) values ('own', true, true)",
        "insert into outbox.backends (name, host) values ('own', '127.0.0.1'); update outbox.backends set max_len = 7 where name = 'own'",
        "update outbox.backends set host = null, port = null, name = 'own' where name = 'elsewhere'",
    ];
    let back = format!(
        "update outbox.backends set host = '127.0.0.1', port = {}, name = 'elsewhere' where name = 'own'",
        stack.redis.port()
    );
    for way in ways {
        keeper
            .batch_execute(way)
            .unwrap_or_else(|error| panic!("{way}: {error:?}"));
        stack.pg.exec("select outbox.publish_event('t', 's', backend => 'own')");
        wait_trouble(&stack.pg, "own", "misconfigured", MOVED);
        // Nor to another server that listens there.
        settings(plain.port());
        stack.publish("more");
        wait_until("a call", || plain.accepted() > 0);
        settings(tls_port);
        wait_drained(&stack.pg, "default");
        let clear = match way.starts_with("update") {
            true => back.clone(),
            false => "delete from outbox.events where backend = 'own'; delete from outbox.backends where name = 'own'"
                .to_string(),
        };
        stack.pg.exec(&clear);
    }
    assert!(!plain.heard().contains(SECRET), "{}", plain.heard());
    // A superuser confirms the destination: by setting the file, or by changing the destination.
    for confirmed in [
        format!(
            "update outbox.backends set password_file = '{file}', tls = true, tls_ca_file = '{ca}' where name = 'own'"
        ),
        format!("update outbox.backends set tls = true, tls_ca_file = '{ca}' where name = 'own'"),
    ] {
        keeper
            .batch_execute("insert into outbox.backends (name, stream_name) values ('own', 'own')")
            .expect("granted");
        stack.pg.exec("select outbox.publish_event('t', 's', backend => 'own')");
        wait_trouble(&stack.pg, "own", "misconfigured", MOVED);
        stack.pg.exec(&confirmed);
        stack.redis.wait_entries("own", 1);
        wait_drained(&stack.pg, "own");
        stack.pg.exec("delete from outbox.backends where name = 'own'");
        stack.redis.call(&["DEL", "own"]);
    }
    // Without TLS if no backend uses it.
    stack
        .pg
        .exec("update outbox.backends set tls = false, tls_ca_file = null where name = 'default'");
    settings(stack.redis.port());
    keeper
        .batch_execute("insert into outbox.backends (name, stream_name) values ('own', 'own')")
        .expect("granted");
    stack.pg.exec("select outbox.publish_event('t', 's', backend => 'own')");
    stack.redis.wait_entries("own", 1);
}
