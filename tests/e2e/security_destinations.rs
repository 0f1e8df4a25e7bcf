//! Secrets stay with their destination: a role that may write backends, and may not set their passwords, moves none of
//! the passwords elsewhere.

mod settings_file;

use kit::{Eavesdropper, Postgres, QUICK, Redis, Refused, Stack, types, wait_drained, wait_trouble, wait_until};
use postgres::Client;

const SECRET: &str = "Xq7-zK9.wQ2y";
const MOVED: &str = "the backend's password was set for another destination";

/// A Redis that requires a password, which the backend `default` has; the roles `keeper`, who may write backends, and
/// `writer`, who may write all data.
fn start() -> (Stack, Client, Client) {
    let redis = Redis::with(&["--requirepass", SECRET]);
    let stack = Stack::of(Postgres::with(QUICK), redis);
    roles(&stack.pg);
    stack
        .pg
        .exec(&format!("select outbox.set_backend_password('default', '{SECRET}')"));
    stack.publish("first");
    wait_drained(&stack.pg, "default");
    let (keeper, writer) = (
        stack.pg.client_as("keeper", "postgres"),
        stack.pg.client_as("writer", "postgres"),
    );
    (stack, keeper, writer)
}

fn roles(pg: &Postgres) {
    pg.exec(
        "create role keeper login; grant usage on schema outbox to keeper;
        grant select, insert, update, delete on outbox.backends to keeper;
        create role writer login in role pg_write_all_data, pg_read_all_data",
    );
}

fn secret_file(pg: &Postgres) -> String {
    let path = pg.host().join("password");
    kit::env::server_file(&path, SECRET.as_bytes(), 0o600);
    path.display().to_string()
}

#[track_caller]
fn assert_told_nothing(evil: &Eavesdropper) {
    assert_eq!((evil.accepted(), evil.heard()), (0, String::new()));
}

/// Each column of the destination: the password is not sent, no connection is made, and the old destination gets the
/// password again.
#[test]
fn a_password_stays_with_its_destination() {
    let (stack, mut keeper, mut writer) = start();
    let evil = Eavesdropper::start();
    let (port, own) = (evil.port(), stack.redis.port());
    let socket = stack.redis.socket().display().to_string();
    let back = format!(
        "update outbox.backends set mode = 'standalone', host = '127.0.0.1', port = {own}, unix_socket = null, nodes = null,
            sentinel_master = null, tls = false, tls_insecure = false, username = null, name = 'default' where number = 1"
    );
    for (number, change) in [
        format!("port = {port}"),
        format!("host = 'localhost', port = {port}"),
        "host = 'localhost'".to_owned(),
        "host = null".to_owned(),
        format!("host = null, port = null, unix_socket = '{socket}'"),
        format!("mode = 'sentinel', host = null, port = null, nodes = '{{127.0.0.1:{port}}}', sentinel_master = 'm'"),
        "tls = true".to_owned(),
        "tls = true, tls_insecure = true".to_owned(),
        "username = 'other'".to_owned(),
        format!("name = 'renamed', port = {port}"),
    ]
    .iter()
    .enumerate()
    {
        let role = if number % 2 == 0 { &mut keeper } else { &mut writer };
        role.batch_execute(&format!("update outbox.backends set {change} where number = 1"))
            .unwrap_or_else(|error| panic!("{change}: {error:?}"));
        let name: String = stack.pg.one("select name from outbox.backends where number = 1");
        wait_trouble(&stack.pg, &name, "misconfigured", MOVED);
        role.batch_execute(&back).expect("granted");
        stack.publish("again");
        wait_until("the entry", || stack.redis.xlen("events") == number + 2);
    }
    stack
        .pg
        .wait_log("HINT:  A role that may not set its password has created the backend or changed its destination.");
    assert_told_nothing(&evil);
    // Changes of other columns have no effect.
    keeper
        .batch_execute("update outbox.backends set enabled = false, max_len = 7, stream_name = 'events', name = 'd', db = 0 where number = 1")
        .expect("granted");
    keeper
        .batch_execute("update outbox.backends set enabled = true, name = 'default' where number = 1")
        .expect("granted");
    stack.publish("last");
    wait_drained(&stack.pg, "default");
    assert!(!stack.pg.log().contains(SECRET));
}

/// Every statement that changes a backend or replaces it.
#[test]
fn no_statement_moves_a_password_to_another_destination() {
    let (stack, mut keeper, mut writer) = start();
    let evil = Eavesdropper::start();
    let (port, own) = (evil.port(), stack.redis.port());
    let mended = format!("update outbox.backends set host = '127.0.0.1', port = {own} where name = 'default'");
    for (sql, moved) in [
        (
            format!(
                "insert into outbox.backends (name, host, port) values ('default', '127.0.0.1', {port}) on conflict (name) do update set port = excluded.port"
            ),
            true,
        ),
        (
            format!(
                "insert into outbox.backends (name, number, host, port) overriding system value values ('default', 1, '127.0.0.1', {port})"
            ),
            true,
        ),
        (
            format!(
                "merge into outbox.backends b using (select 1) s on b.name = 'default' when matched then update set port = {port}"
            ),
            true,
        ),
        (
            format!(
                "with changed as (update outbox.backends set port = {port} where name = 'default' returning 1) select count(*) from changed"
            ),
            true,
        ),
        (
            format!(
                "begin; update outbox.backends set port = {port} where name = 'default'; savepoint s;
                update outbox.backends set max_len = 100 where name = 'default'; release s; commit"
            ),
            true,
        ),
        (
            format!(
                "delete from outbox.backends where name = 'default'; insert into outbox.backends (name, host, port) values ('default', '127.0.0.1', {port})"
            ),
            false,
        ),
    ] {
        // MERGE exists since Postgres 15.
        if sql.starts_with("merge")
            && stack
                .pg
                .one::<i32>("select current_setting('server_version_num')::integer")
                < 150_000
        {
            continue;
        }
        keeper
            .batch_execute(&sql)
            .unwrap_or_else(|error| panic!("{sql}: {error:?}"));
        if moved {
            wait_trouble(&stack.pg, "default", "misconfigured", MOVED);
            assert_told_nothing(&evil);
            writer.batch_execute(&mended).expect("it may write all");
            stack.publish("again");
            wait_drained(&stack.pg, "default");
        } else {
            stack.publish("for somebody else");
            wait_until("somebody else", || evil.accepted() > 0);
        }
    }
    assert!(!evil.heard().contains("AUTH"), "{}", evil.heard());
}

/// Names are not part of a destination: two backends that swap their names keep their passwords.
#[test]
fn swapping_names_does_not_swap_passwords() {
    let (stack, mut keeper, _) = start();
    let evil = Eavesdropper::start();
    stack.pg.exec(&format!(
        "insert into outbox.backends (name, host, port) values ('evil', '127.0.0.1', {});
        select outbox.set_backend_password('evil', 'of its own')",
        evil.port()
    ));
    wait_until("a call", || evil.accepted() > 0);
    keeper
        .batch_execute(
            "update outbox.backends set name = 'x' where name = 'evil'; update outbox.backends set name = 'evil' where name = 'default';
            update outbox.backends set name = 'default' where name = 'x'; update outbox.backends set enabled = false where name = 'default';
            update outbox.backends set enabled = true where name = 'default'",
        )
        .expect("granted");
    stack.pg.exec("select outbox.publish_event('t', 's', backend => 'evil'), outbox.publish_event('t', 's', backend => 'default')");
    wait_drained(&stack.pg, "evil");
    let calls = evil.accepted();
    wait_until("another call", || evil.accepted() > calls);
    assert!(
        evil.heard().contains("of its own") && !evil.heard().contains(SECRET),
        "{}",
        evil.heard()
    );
}

/// A role that may set the password, or a superuser, moves it; changes of other columns approve nothing that somebody
/// else has changed.
#[test]
fn a_role_that_may_set_a_password_may_move_it() {
    let (stack, mut keeper, _) = start();
    let other = Redis::with(&["--requirepass", SECRET]);
    stack.point("default", &other);
    stack.publish("moved by a superuser");
    assert_eq!(types(&other.wait_entries("events", 1)), ["moved by a superuser"]);
    keeper
        .batch_execute(&format!("update outbox.backends set port = {}", stack.redis.port()))
        .expect("granted");
    wait_trouble(&stack.pg, "default", "misconfigured", MOVED);
    // A superuser who changes something else, or one column of several, has not confirmed the destination.
    stack
        .pg
        .exec("update outbox.backends set max_len = 1000; update outbox.backends set host = 'localhost'");
    stack.publish("waits");
    wait_trouble(&stack.pg, "default", "misconfigured", MOVED);
    assert_eq!(stack.redis.xlen("events"), 1);
    stack
        .pg
        .exec(&format!("select outbox.set_backend_password('default', '{SECRET}')"));
    stack.redis.wait_entries("events", 2);
    // The role was told that somebody has changed the destination.
    stack
        .pg
        .wait_log("WARNING:  backend \"default\" connects to another destination than when its password was set");
    stack
        .pg
        .exec("grant execute on function outbox.set_backend_password to keeper");
    keeper
        .batch_execute(&format!("update outbox.backends set port = {}", other.port()))
        .expect("granted");
    stack.publish("moved by a keeper of passwords");
    other.wait_entries("events", 2);
    // Only a superuser sets these settings.
    stack.pg.exec("update outbox.backends set host = null, port = null");
    let port = stack.redis.port().to_string();
    stack.pg.configure(&[
        ("outbox_relay.redis_host", "127.0.0.1"),
        ("outbox_relay.redis_port", &port),
    ]);
    stack.pg.reload();
    stack.publish("moved by the settings");
    wait_until("the entry", || {
        types(&stack.events()).contains(&"moved by the settings")
    });
}

/// The tables of destinations are protected like the passwords.
#[test]
fn no_role_writes_the_tables_of_password_destinations() {
    let (stack, mut keeper, mut writer) = start();
    let evil = Eavesdropper::start();
    keeper
        .batch_execute(&format!("update outbox.backends set port = {}", evil.port()))
        .expect("granted");
    for sql in [
        "update outbox.backend_passwords set destination = (select outbox.destination(b) from outbox.backends b)",
        "update outbox.backend_passwords set destination = '{}'",
        "delete from outbox.backend_passwords",
        "delete from outbox.moved_backends",
        "update outbox.moved_backends set destination = '{}'",
    ] {
        let changed = writer.execute(sql, &[]);
        assert!(
            matches!(changed, Ok(0)) || Refused::of(changed).code == "42501",
            "{sql}"
        );
    }
    for sql in [
        "insert into outbox.backend_passwords values (1, 'x', '{}') on conflict (backend_number) do update set destination = '{}'",
        "insert into outbox.moved_backends values (1, '{}')",
        "select outbox.destination(b) from outbox.backends b",
        "select outbox.set_backend_password('default', 'x')",
        "create trigger t after update on mine for each row execute function outbox.keep_password()",
    ] {
        if sql.starts_with("create") {
            stack.pg.exec("create table mine (like outbox.backends); alter table mine owner to writer; grant all on schema public to writer");
        }
        assert_eq!(Refused::of(writer.simple_query(sql)).code, "42501", "{sql}");
    }
    wait_trouble(&stack.pg, "default", "misconfigured", MOVED);
    assert_told_nothing(&evil);
    // Also past the trigger.
    stack
        .pg
        .exec(&format!("update outbox.backends set port = {}", stack.redis.port()));
    stack.publish("again");
    wait_drained(&stack.pg, "default");
    stack.pg.exec(&format!(
        "begin; alter table outbox.backends disable trigger user; update outbox.backends set port = {};
        alter table outbox.backends enable trigger user; commit",
        evil.port()
    ));
    stack.pg.exec("update outbox.backends set max_len = 5");
    wait_trouble(&stack.pg, "default", "misconfigured", MOVED);
    assert_told_nothing(&evil);
}

/// A password file is protected like its content.
#[test]
fn a_password_file_stays_with_its_destination() {
    let stack = Stack::of(Postgres::with(QUICK), Redis::with(&["--requirepass", SECRET]));
    roles(&stack.pg);
    let mut keeper = stack.pg.client_as("keeper", "postgres");
    let evil = Eavesdropper::start();
    let file = secret_file(&stack.pg);
    stack
        .pg
        .exec(&format!("update outbox.backends set password_file = '{file}'"));
    stack.publish("one");
    wait_drained(&stack.pg, "default");
    keeper
        .batch_execute(&format!("update outbox.backends set port = {}", evil.port()))
        .expect("granted");
    wait_trouble(&stack.pg, "default", "misconfigured", MOVED);
    // Neither by another change of the same role, nor by one of a superuser who has not confirmed the destination.
    keeper
        .batch_execute("update outbox.backends set host = 'localhost'")
        .expect("granted");
    stack
        .pg
        .exec("update outbox.backends set max_len = 100; update outbox.backends set host = '127.0.0.1'");
    stack.publish("two");
    wait_trouble(&stack.pg, "default", "misconfigured", MOVED);
    assert_told_nothing(&evil);
    keeper
        .batch_execute(&format!("update outbox.backends set port = {}", stack.redis.port()))
        .expect("granted");
    stack.redis.wait_entries("events", 2);
    // A superuser moves it, or sets the file again for the new destination.
    let other = Redis::with(&["--requirepass", SECRET]);
    stack.point("default", &other);
    stack.publish("three");
    other.wait_entries("events", 1);
    keeper
        .batch_execute(&format!("update outbox.backends set port = {}", stack.redis.port()))
        .expect("granted");
    wait_trouble(&stack.pg, "default", "misconfigured", MOVED);
    stack.pg.exec("update outbox.backends set password_file = null");
    wait_trouble(&stack.pg, "default", "misconfigured", "NOAUTH");
    stack
        .pg
        .exec(&format!("update outbox.backends set password_file = '{file}'"));
    stack.publish("four");
    stack.redis.wait_entries("events", 3);
}
