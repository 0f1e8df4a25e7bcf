//! A backend's columns: refused values, logging in to Redis, and where entries go.

use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use kit::{
    Postgres, QUICK, Redis, Refused, Stack, entries, ids, publish_many, standing, tell, types, wait_drained,
    wait_trouble, wait_until,
};

/// A stack whose Redis requires this password, which the backend does not have yet.
fn locked(password: &str) -> Stack {
    Stack::of(Postgres::with(QUICK), Redis::with(&["--requirepass", password]))
}

/// Writes a password file next to the server's data.
fn password_file(pg: &Postgres, text: &str) -> String {
    let path = pg.host().join("password");
    kit::env::server_file(&path, text.as_bytes(), 0o600);
    path.display().to_string()
}

#[test]
fn invalid_values_are_refused() {
    let stack = Stack::start();
    for (column, value, code) in [
        ("name", "''", "23514"),
        ("name", "repeat('x', 64)", "23514"),
        ("name", "null", "23502"),
        ("name", "'other'", "23505"),
        ("enabled", "null", "23502"),
        ("host", "''", "23514"),
        ("port", "0", "23514"),
        ("port", "65536", "23514"),
        ("db", "-1", "23514"),
        ("db", "65536", "23514"),
        ("username", "''", "23514"),
        ("stream_name", "''", "23514"),
        ("max_len", "-1", "23514"),
        ("connect_timeout", "'0'", "23514"),
        ("connect_timeout", "'-1 s'", "23514"),
        ("connect_timeout", "'61 min'", "23514"),
        ("socket_timeout", "'0'", "23514"),
        ("socket_timeout", "'-1 s'", "23514"),
        ("socket_timeout", "'61 min'", "23514"),
        ("unix_socket", "'redis.sock'", "23514"),
        ("unix_socket", "''", "23514"),
        ("password_file", "'secret'", "23514"),
        ("tls", "null", "23502"),
        ("tls_insecure", "true", "23514"),
        ("tls_ca_file", "'/ca.pem'", "23514"),
        ("(tls, tls_ca_file)", "(true, 'ca.pem')", "23514"),
        ("(tls, tls_cert_file)", "(true, '/cert.pem')", "23514"),
        ("(tls, tls_key_file)", "(true, '/key.pem')", "23514"),
        ("(tls_cert_file, tls_key_file)", "('/cert.pem', '/key.pem')", "23514"),
        (
            "(tls, tls_cert_file, tls_key_file)",
            "(true, '/cert.pem', 'key.pem')",
            "23514",
        ),
        (
            "(tls, tls_cert_file, tls_key_file)",
            "(true, 'cert.pem', '/key.pem')",
            "23514",
        ),
        ("(tls, unix_socket)", "(true, '/redis.sock')", "23514"),
        ("allowed_streams", "'{a,null}'", "23514"),
        ("allowed_streams", "null", "23502"),
        ("delivery", "'perhaps'", "23514"),
        ("delivery", "null", "23502"),
        // Never, not even to the present value.
        ("number", "99", "428C9"),
        ("number", "default", "0A000"),
    ] {
        let mut client = stack.pg.client();
        client
            .batch_execute("begin; insert into outbox.backends (name) values ('other')")
            .expect("a backend");
        let sql = format!("update outbox.backends set {column} = {value} where name = 'default'");
        let said = Refused::of(client.execute(&sql, &[]));
        assert_eq!(said.code, code, "{sql}: {said:?}");
    }
    for (column, value) in [
        ("name", "repeat('ü', 63)"),
        ("port", "65535"),
        ("max_len", "0"),
        ("connect_timeout", "'1 ms'"),
        ("allowed_streams", "'{}'"),
    ] {
        stack.pg.exec(&format!(
            "begin; update outbox.backends set {column} = {value}; rollback"
        ));
    }
}

/// The worker reads files as the server's user, so a role that names them must have the right to read such files.
#[test]
fn file_columns_need_the_right_to_read_the_servers_files() {
    let stack = Stack::start();
    stack.pg.exec("create role keeper login; grant usage on schema outbox to keeper; grant select, insert, update on outbox.backends to keeper");
    let mut keeper = stack.pg.client_as("keeper", "postgres");
    for (columns, values, denied) in [
        ("password_file", "'/etc/passwd'", "password_file"),
        ("tls_ca_file", "'/etc/passwd'", "tls_ca_file"),
        (
            "tls_cert_file, tls_key_file",
            "'/etc/passwd', '/etc/shadow'",
            "tls_cert_file",
        ),
        ("tls_key_file", "'/etc/shadow'", "tls_key_file"),
    ] {
        for sql in [
            format!("update outbox.backends set (tls, {columns}) = (true, {values})"),
            format!("insert into outbox.backends (name, tls, {columns}) values ('b', true, {values})"),
            format!(
                "insert into outbox.backends (name, number, tls, {columns}) overriding system value values ('default', 1, true, {values})"
            ),
        ] {
            let said = Refused::of(keeper.execute(&sql, &[]));
            let expected = format!("permission denied to set {denied}");
            assert_eq!((said.code, said.message), ("42501".to_owned(), expected), "{sql}");
        }
    }
    keeper
        .execute("update outbox.backends set enabled = true, tls = true", &[])
        .expect("the rest may be changed");
    let all =
        "tls = true, password_file = '/nowhere', tls_ca_file = '/ca', tls_cert_file = '/cert', tls_key_file = '/key'";
    stack.pg.exec(&format!("update outbox.backends set {all}"));
    keeper
        .execute("update outbox.backends set max_len = 5", &[])
        .expect("what is there may stay");
    keeper
        .execute(
            "update outbox.backends set password_file = null, tls_ca_file = null, tls_cert_file = null, tls_key_file = null",
            &[],
        )
        .expect("and go");
    stack.pg.exec("grant pg_read_server_files to keeper");
    keeper
        .execute(&format!("update outbox.backends set {all}"), &[])
        .expect("now it may");
}

#[test]
fn passwords_are_changed_at_run_time() {
    let stack = locked("first-secret");
    let set = |password: &str| {
        stack
            .pg
            .exec(&format!("select outbox.set_backend_password('default', {password})"))
    };
    let mut expected = publish_many(&mut stack.pg.client(), "default", "", "t", 5);
    wait_trouble(&stack.pg, "default", "misconfigured", "NOAUTH");
    stack
        .pg
        .wait_log("HINT:  Set a password with outbox.set_backend_password(), or password_file.");
    set("'wrong-secret'");
    let wrong = wait_trouble(&stack.pg, "default", "misconfigured", "WRONGPASS");
    assert_eq!((wrong.pending, wrong.failed), (5, 0));
    stack.pg.wait_log("HINT:  Check the backend's username and password.");
    set("'first-secret'");
    assert_eq!(ids(&stack.wait_events(5)), expected);

    // Redis changes first: existing connections go on, and the next connection needs the new password.
    let mut admin = stack.redis.conn();
    tell(&mut admin, &["CONFIG", "SET", "requirepass", "second-secret"]);
    tell(&mut admin, &["CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes"]);
    expected.extend(publish_many(&mut stack.pg.client(), "default", "", "t", 5));
    wait_trouble(&stack.pg, "default", "misconfigured", "WRONGPASS");
    set("'second-secret'");
    wait_drained(&stack.pg, "default");
    assert_eq!(ids(&entries(&mut admin, "events")), expected);
    set("null");
    expected.extend(publish_many(&mut stack.pg.client(), "default", "", "t", 5));
    wait_trouble(&stack.pg, "default", "misconfigured", "NOAUTH");
    let secrets: i64 = stack.pg.one("select count(*) from outbox.backend_passwords");
    assert_eq!(secrets, 0);
    let said = Refused::of(
        stack
            .pg
            .client()
            .execute("select outbox.set_backend_password('none', 'x')", &[]),
    );
    assert_eq!(
        (said.code.as_str(), said.message.as_str()),
        ("42704", "backend \"none\" does not exist")
    );
    assert!(!stack.pg.log().contains("-secret"), "a password is in the log");
}

#[test]
fn passwords_cannot_be_read() {
    let stack = Stack::start();
    stack.pg.exec(
        "select outbox.set_backend_password('default', 'secret');
        create role reader login in role pg_read_all_data, pg_monitor",
    );
    let mut reader = stack.pg.client_as("reader", "postgres");
    let rows = reader
        .query("select * from outbox.backend_passwords", &[])
        .expect("no right is missing");
    assert_eq!(rows.len(), 0);
    let said = Refused::of(reader.execute("select outbox.set_backend_password('default', 'other')", &[]));
    assert_eq!(said.code, "42501");
    let dump = stack.pg.pg_dump("postgres");
    assert!(!dump.contains("secret"), "a password is in the dump");
    stack.pg.exec("delete from outbox.backends");
    assert_eq!(
        stack.pg.one::<i64>("select count(*) from outbox.backend_passwords"),
        0,
        "it goes with its backend"
    );
}

#[test]
fn a_password_file_is_read_at_each_connect() {
    let stack = locked("first");
    let path = password_file(&stack.pg, "first\nwhatever else\n");
    stack
        .pg
        .exec(&format!("update outbox.backends set password_file = '{path}'"));
    stack.publish("one");
    assert_eq!(types(&stack.wait_events(1)), ["one"]);
    let mut admin = stack.redis.conn();
    tell(&mut admin, &["CONFIG", "SET", "requirepass", "second"]);
    password_file(&stack.pg, "second");
    tell(&mut admin, &["CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes"]);
    stack.publish("two");
    wait_until("both", || kit::xlen(&mut admin, "events") == 2);

    std::fs::remove_file(Path::new(&path)).expect("remove");
    redis::cmd("CLIENT")
        .arg(&["KILL", "TYPE", "normal", "SKIPME", "yes"])
        .exec(&mut admin)
        .expect("CLIENT KILL");
    stack.publish("three");
    wait_trouble(
        &stack.pg,
        "default",
        "misconfigured",
        &format!("could not read password file \"{path}\""),
    );
    password_file(&stack.pg, "second");
    wait_until("all", || kit::xlen(&mut admin, "events") == 3);
    assert_eq!(types(&entries(&mut admin, "events")), ["one", "two", "three"]);
}

/// As Postgres treats its own key: a file that others may read or write is refused.
#[test]
fn a_password_file_that_others_may_read_is_refused() {
    let stack = locked("first");
    let path = password_file(&stack.pg, "first");
    let chmod = |mode| std::fs::set_permissions(&path, std::fs::Permissions::from_mode(mode)).expect("chmod");
    chmod(0o640);
    stack
        .pg
        .exec(&format!("update outbox.backends set password_file = '{path}'"));
    stack.publish("one");
    let refused = format!("password file \"{path}\" has group or world access");
    wait_trouble(&stack.pg, "default", "misconfigured", &refused);
    stack
        .pg
        .wait_log("HINT:  The file must have permissions u=rw (0600) or less");
    chmod(0o400);
    assert_eq!(types(&stack.wait_events(1)), ["one"]);
}

/// A Redis whose default user may do everything: if the login as another user is refused, nothing is written as the
/// default user.
#[test]
fn a_user_that_redis_rejects_does_not_become_the_default_user() {
    let stack = Stack::with(QUICK);
    let mut admin = stack.redis.conn();
    tell(&mut admin, &["ACL", "SETUSER", "relay", "on", ">secret", "~*", "+@all"]);
    // The connection of before belongs to the default user, and has claimed the guard.
    wait_until("the claim", || {
        format!("{:?}", tell(&mut admin, &["INFO", "commandstats"])).contains("cmdstat_exec")
    });
    stack.pg.exec("update outbox.backends set enabled = false");
    tell(&mut admin, &["CONFIG", "RESETSTAT"]);
    for (username, password, error) in [
        ("'relay'", "'wrong'", "WRONGPASS"),
        ("'relay'", "null", "WRONGPASS"),
        ("'nobody'", "'secret'", "WRONGPASS"),
        // Redis would say that this user has no password.
        ("null", "'secret'", "without any password configured"),
    ] {
        stack.pg.exec(&format!(
            "update outbox.backends set enabled = true, username = {username}; select outbox.set_backend_password('default', {password})"
        ));
        stack.publish("t");
        wait_trouble(&stack.pg, "default", "misconfigured", error);
        let attempts = || -> chrono::DateTime<chrono::Utc> {
            stack
                .pg
                .one("select coalesce(next_attempt_at, '-infinity') from outbox.backend_status")
        };
        let first = attempts();
        wait_until("another attempt", || attempts() > first);
        let stats = format!("{:?}", tell(&mut admin, &["INFO", "commandstats"]));
        assert!(!stats.contains("xadd") && !stats.contains("cmdstat_exec"), "{stats}");
    }
    stack.pg.exec("update outbox.backends set username = 'relay'");
    wait_drained(&stack.pg, "default");
    assert_eq!(stack.events().len(), 4);
    let clients = format!("{:?}", tell(&mut admin, &["CLIENT", "LIST"]));
    assert!(
        clients.contains("name=outbox_relay:postgres:default") && clients.contains("user=relay"),
        "{clients}"
    );
}

#[test]
fn a_redis_user_with_the_documented_rights_is_enough() {
    let stack = locked("admin");
    stack.redis.call(&[
        "ACL",
        "SETUSER",
        "relay",
        "on",
        ">secret",
        "~events",
        "resetchannels",
        "-@all",
        "+xadd",
        "+ping",
    ]);
    stack
        .pg
        .exec("update outbox.backends set username = 'relay', delivery = 'at_least_once'; select outbox.set_backend_password('default', 'secret')");
    let expected = publish_many(&mut stack.pg.client(), "default", "", "t", 50);
    assert_eq!(ids(&stack.wait_events(50)), expected);
    stack.pg.exec("update outbox.backends set username = 'stranger'");
    stack.publish("t");
    wait_trouble(&stack.pg, "default", "misconfigured", "WRONGPASS");
    assert_eq!(stack.redis.xlen("events"), 50);
    stack
        .redis
        .call(&["ACL", "SETUSER", "stranger", "on", ">secret", "~*", "+@all"]);
    stack.wait_events(51);
}

#[test]
fn a_unix_socket_and_a_database_are_used() {
    let stack = locked("secret");
    stack.pg.exec(&format!(
        "update outbox.backends set unix_socket = '{}', host = 'no..such..host', port = 1, db = 3;
        select outbox.set_backend_password('default', 'secret')",
        stack.redis.socket().display()
    ));
    let expected = publish_many(&mut stack.pg.client(), "default", "", "t", 3);
    wait_drained(&stack.pg, "default");
    assert_eq!(stack.redis.xlen("events"), 0);
    let mut conn = stack.redis.conn();
    redis::cmd("SELECT").arg(3).exec(&mut conn).expect("SELECT");
    assert_eq!(ids(&entries(&mut conn, "events")), expected);
    let clients: String = redis::cmd("CLIENT").arg("LIST").query(&mut conn).expect("CLIENT LIST");
    assert!(clients.contains("name=outbox_relay:postgres:default"), "{clients}");
    // A database that this Redis does not have.
    stack.pg.exec("update outbox.backends set db = 99");
    stack.publish("t");
    wait_trouble(&stack.pg, "default", "misconfigured", "DB index is out of range");
    assert_eq!(standing(&stack.pg, "default").failed, 0);
}

#[test]
fn streams_are_trimmed_to_about_max_len() {
    let stack = Stack::with(&[]);
    stack.pg.exec("update outbox.backends set max_len = 500");
    let expected = publish_many(&mut stack.pg.client(), "default", "", "t", 3_000);
    wait_drained(&stack.pg, "default");
    let kept = ids(&stack.events());
    // Redis trims whole nodes of 100 entries.
    assert!((500..=700).contains(&kept.len()), "{} entries", kept.len());
    assert_eq!(kept, expected[3_000 - kept.len()..]);
    stack
        .pg
        .exec("update outbox.backends set max_len = 0, stream_name = 'whole'");
    let expected = publish_many(&mut stack.pg.client(), "default", "", "t", 12_000);
    assert_eq!(ids(&stack.redis.wait_entries("whole", 12_000)), expected);
    stack
        .pg
        .exec("update outbox.backends set max_len = null, stream_name = 'standard'");
    publish_many(&mut stack.pg.client(), "default", "", "t", 12_000);
    wait_drained(&stack.pg, "default");
    let kept = stack.redis.xlen("standard");
    assert!((10_000..=10_200).contains(&kept), "{kept} entries");
}

/// With events of the streams alternating, in runs, and each in a separate transaction.
#[test]
fn each_stream_of_several_is_trimmed() {
    let stack = Stack::with(&[]);
    stack.pg.exec("update outbox.backends set max_len = 200");
    let publish = |stream: &str, events: u32| {
        stack.pg.exec(&format!(
            "select outbox.publish_event('t', 'kit', stream => {stream}) from generate_series(1, {events}) n"
        ));
    };
    publish("'turn' || n % 3", 1_800);
    publish("'run' || n / 600", 1_799);
    let mut client = stack.pg.client();
    for _ in 0..400 {
        publish_many(&mut client, "default", "single", "t", 1);
    }
    wait_drained(&stack.pg, "default");
    for stream in ["turn0", "turn1", "turn2", "run0", "run1", "run2", "single"] {
        let kept = stack.redis.xlen(stream);
        assert!((200..=320).contains(&kept), "{kept} entries in {stream}");
    }
}

#[test]
fn a_publisher_may_name_only_allowed_streams() {
    let stack = Stack::start();
    stack
        .pg
        .exec("update outbox.backends set allowed_streams = '{orders,audit.*,v?}'");
    let publish = |stream: &str| {
        stack
            .pg
            .client()
            .execute("select outbox.publish_event('t', 'kit', stream => $1)", &[&stream])
    };
    for stream in ["orders", "audit.", "audit.login", "v1"] {
        publish(stream).unwrap_or_else(|error| panic!("{stream}: {error:?}"));
        assert_eq!(types(&stack.redis.wait_entries(stream, 1)), ["t"]);
    }
    for stream in ["events", "orders2", "my.orders", "audit", "v", "v12", "ORDERS"] {
        let said = Refused::of(publish(stream));
        let message = format!("backend \"default\" does not allow the stream \"{stream}\"");
        assert_eq!((said.code.as_str(), said.message), ("42501", message));
    }
    // The backend's own stream needs no pattern.
    stack.publish("own");
    assert_eq!(types(&stack.wait_events(1)), ["own"]);
    // Open sessions notice the change.
    let mut session = stack.pg.client();
    let sql = "select outbox.publish_event('t', 'kit', stream => 'late')";
    assert_eq!(Refused::of(session.execute(sql, &[])).code, "42501");
    stack.pg.exec("update outbox.backends set allowed_streams = '{*}'");
    session.execute(sql, &[]).expect("allowed now");
    stack.redis.wait_entries("late", 1);
}
