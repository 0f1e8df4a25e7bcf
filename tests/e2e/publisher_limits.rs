//! Publishers whose events are limited to some backends and streams, by `outbox.grant_publisher(role, backends,
//! streams)`: every way to publish applies the limits, rights add up, and other publishers have no cost.

use std::io::Write;

use kit::{Refused, Stack, types, wait_until};
use postgres::Client;

/// With the paused backends `orders`, `audit-1` and `other`, and the role `app`, which may publish to the first two,
/// into streams that begin with `orders:`.
fn start() -> (Stack, Client) {
    let stack = Stack::start();
    stack.pg.exec(
        "insert into outbox.backends (name, enabled, stream_name)
            values ('orders', false, 'orders:all'), ('audit-1', false, null), ('other', false, 'orders:all');
        create role app login;
        select outbox.grant_publisher('app', '{orders,audit-*}', '{orders:*}')",
    );
    let app = stack.pg.client_as("app", "postgres");
    (stack, app)
}

/// Every way to publish, to a backend, into a stream. An empty text means none.
const WAYS: [&str; 8] = [
    "select outbox.publish_event('t', 's', backend => nullif('B', ''), stream => nullif('S', ''))",
    "select outbox.publish_event('t', 's', '{}'::text, backend => 'B', stream => 'S')",
    "select outbox.publish_event('t', 's', backend => 'B', stream => 'S', scheduled_at => '2100-01-01')",
    "select outbox.publish_events('[{\"event_type\": \"t\", \"source\": \"s\", \"backend\": \"B\", \"stream\": \"S\"}]')",
    "insert into outbox.events (event_type, source, backend, stream) values ('t', 's', 'B', 'S')",
    "insert into outbox.events (event_type, source, backend, stream) select 't', 's', nullif('B', ''), nullif('S', '') from generate_series(1, 2)",
    "insert into outbox.events (event_type, source, backend, stream) values ('t', 's', 'B', 'S') on conflict do nothing returning event_id",
    "prepare p as select outbox.publish_event('t', 's', backend => $1, stream => $2); execute p('B', 'S'); deallocate p",
];

fn tried(client: &mut Client, way: &str, backend: &str, stream: &str) -> Result<(), postgres::Error> {
    let sql = way
        .replace("'B'", &format!("'{backend}'"))
        .replace("'S'", &format!("'{stream}'"));
    let sql = sql
        .replace("\"B\"", &format!("\"{backend}\""))
        .replace("\"S\"", &format!("\"{stream}\""));
    client.batch_execute("deallocate all")?;
    client.batch_execute(&sql)
}

fn copied(client: &mut Client, backend: &str, stream: &str) -> Result<u64, postgres::Error> {
    let mut rows = client.copy_in("copy outbox.events (event_type, source, backend, stream) from stdin")?;
    rows.write_all(format!("t\ts\t{backend}\t{stream}\n").as_bytes())
        .expect("sent");
    rows.finish()
}

#[track_caller]
fn assert_allowed(client: &mut Client, backend: &str, stream: &str) {
    for way in WAYS {
        tried(client, way, backend, stream).unwrap_or_else(|error| panic!("{way}: {error:?}"));
    }
    copied(client, backend, stream).expect("COPY");
}

#[track_caller]
fn assert_refused(client: &mut Client, backend: &str, stream: &str, said: &Refused) {
    for way in WAYS {
        assert_eq!(&Refused::of(tried(client, way, backend, stream)), said, "{way}");
    }
    assert_eq!(&Refused::of(copied(client, backend, stream)), said, "COPY");
}

fn no_backend(name: &str, allowed: &str) -> Refused {
    Refused::new(
        "42501",
        &format!("permission denied to publish to backend \"{name}\""),
        &format!("The current role may publish to these backends: {allowed}."),
        "Ask the administrator to allow more with outbox.grant_publisher().",
    )
}

fn no_stream(backend: &str, name: &str, allowed: &str) -> Refused {
    Refused::new(
        "42501",
        &format!("permission denied to publish to stream \"{name}\" of backend \"{backend}\""),
        &format!("The current role may publish to these streams of that backend: {allowed}."),
        "Ask the administrator to allow more with outbox.grant_publisher().",
    )
}

/// Whether a user may publish to the backend `other`.
fn may(client: &mut Client, sql_before: &str) -> bool {
    let sql = format!("{sql_before}; select outbox.publish_event('t', 's', backend => 'other')");
    let outcome = client.batch_execute(&sql);
    let is_allowed = outcome.is_ok();
    if !is_allowed {
        assert_eq!(Refused::of(outcome).code, "42501");
    }
    client.batch_execute("reset role").expect("no transaction is open");
    is_allowed
}

#[test]
fn every_way_to_publish_keeps_to_the_limits() {
    let (stack, mut app) = start();
    let (backends, streams) = ("orders, audit-*", "orders:*");
    assert_allowed(&mut app, "orders", "orders:1");
    assert_allowed(&mut app, "audit-1", "orders:2");
    // The backend's own stream counts as well.
    assert_allowed(&mut app, "orders", "");
    assert_refused(&mut app, "audit-1", "", &no_stream("audit-1", "events", streams));
    assert_refused(&mut app, "orders", "order", &no_stream("orders", "order", streams));
    assert_refused(
        &mut app,
        "orders",
        "x-orders:1",
        &no_stream("orders", "x-orders:1", streams),
    );
    assert_refused(&mut app, "other", "orders:1", &no_backend("other", backends));
    assert_refused(&mut app, "", "orders:1", &no_backend("default", backends));
    // The default backend is the session's.
    app.batch_execute("set outbox_relay.default_backend = 'other'")
        .expect("its own");
    assert_refused(&mut app, "", "orders:1", &no_backend("other", backends));
    app.batch_execute("set outbox_relay.default_backend = 'orders'")
        .expect("its own");
    assert_allowed(&mut app, "", "orders:1");
    // A stream that the backend does not allow is allowed to nobody.
    stack
        .pg
        .exec("update outbox.backends set allowed_streams = '{orders:1}' where name = 'orders'");
    let refused = Refused::of(tried(&mut app, WAYS[0], "orders", "orders:2"));
    assert_eq!(
        refused.detail.as_deref(),
        Some("No pattern in the backend's allowed_streams matches.")
    );
    // If one element is beyond the limits, none is published.
    let count = "select count(*) from outbox.events";
    let before: i64 = stack.pg.one(count);
    let two = "select outbox.publish_events('[{\"event_type\": \"t\", \"source\": \"s\"}, {\"event_type\": \"t\", \"source\": \"s\", \"backend\": \"other\"}]')";
    assert_eq!(Refused::of(app.batch_execute(two)), no_backend("other", backends));
    assert_eq!(stack.pg.one::<i64>(count), before);
    let elsewhere: i64 = stack
        .pg
        .one("select count(*) from outbox.events where backend not in ('orders', 'audit-1')");
    assert_eq!(elsewhere, 0);
    // Only one of the two is limited; an empty list allows none.
    stack.pg.exec("select outbox.grant_publisher('app', null, '{}')");
    assert_eq!(
        Refused::of(tried(&mut app, WAYS[0], "other", "orders:1")),
        no_stream("other", "orders:1", "none")
    );
    stack.pg.exec("select outbox.grant_publisher('app', '{other}')");
    tried(&mut app, WAYS[0], "other", "anything").expect("any stream");
}

/// Members of a limited role are limited if they have the right to publish only from limited roles.
#[test]
fn rights_add_up() {
    let (stack, _) = start();
    stack.pg.exec(
        "create role team; select outbox.grant_publisher('team', '{default}');
        create role third; select outbox.grant_publisher('third', '{other}', '{nothing}');
        create role member login in role app;
        create role outsider login noinherit in role app;
        create role in_both login in role app, team;
        create role granted login in role app; select outbox.grant_publisher('granted');
        create role inserter login in role app; grant usage on schema outbox to inserter; grant insert on outbox.events to inserter;
        create role indirect login in role granted;
        create role writer login in role app, pg_write_all_data;
        create role boss login superuser in role app;
        create schema lent; create function lent.other() returns uuid language sql security definer set search_path = pg_catalog, pg_temp
            return outbox.publish_event('t', 's', backend => 'other');
        grant usage on schema lent to app; grant execute on function lent.other to app",
    );
    let as_user = |user: &str| stack.pg.client_as(user, "postgres");
    for (user, sql_before, is_free) in [
        ("app", "", false),
        ("member", "", false),
        ("outsider", "set role app", false),
        ("in_both", "", false),
        ("granted", "", true),
        ("granted", "set role app", false),
        ("inserter", "", true),
        ("indirect", "", true),
        ("writer", "", true),
        ("boss", "", true),
        ("boss", "set role app", false),
    ] {
        assert_eq!(may(&mut as_user(user), sql_before), is_free, "{user} {sql_before}");
    }
    // Two limited roles: a member may do what either of them may.
    let mut both = as_user("in_both");
    for (backend, stream) in [("orders", "orders:1"), ("default", "anything"), ("default", "")] {
        tried(&mut both, WAYS[0], backend, stream).unwrap_or_else(|error| panic!("{backend} {stream}: {error:?}"));
    }
    assert_eq!(
        Refused::of(tried(&mut both, WAYS[0], "orders", "anything")).code,
        "42501"
    );
    stack.pg.exec("grant third to in_both");
    assert_eq!(
        Refused::of(tried(&mut both, WAYS[0], "other", "anything")),
        no_stream("other", "anything", "nothing")
    );
    // A function of a role that is not limited.
    as_user("app").batch_execute("select lent.other()").expect("lent");
    // Granting a limited role to somebody does not limit them.
    stack
        .pg
        .exec("create role free login; select outbox.grant_publisher('free'); grant app, team to free");
    assert!(may(&mut as_user("free"), ""));
}

/// The owner of the database is a member of pg_database_owner, which no catalog of roles says.
#[test]
fn a_former_owner_of_the_database_loses_what_owners_may() {
    let (stack, mut app) = start();
    stack
        .pg
        .exec("select outbox.grant_publisher('pg_database_owner'); alter database postgres owner to app");
    assert!(may(&mut app, ""), "as the owner");
    stack.pg.exec("alter database postgres owner to postgres");
    assert!(!may(&mut app, ""), "no more");
}

/// A session that has published follows each change in its next statement, also within a transaction that uses an older
/// snapshot.
#[test]
fn open_sessions_follow_changed_limits() {
    let (stack, _) = start();
    stack
        .pg
        .exec("create role plain login; create role group_of_app; select outbox.grant_publisher('plain')");
    let mut plain = stack.pg.client_as("plain", "postgres");
    assert!(may(&mut plain, ""));
    for (change, is_free) in [
        ("select outbox.grant_publisher('plain', '{orders}')", false),
        ("select outbox.grant_publisher('plain')", true),
        ("select outbox.grant_publisher('plain', null, '{orders:x}')", false),
        (
            "update outbox.publisher_limits set streams = '{orders:*}' where role::oid = 'plain'::regrole",
            true,
        ),
        (
            "select outbox.grant_publisher('group_of_app'); select outbox.grant_publisher('plain', '{orders}')",
            false,
        ),
        ("grant group_of_app to plain", true),
        ("revoke group_of_app from plain", false),
        ("alter role plain superuser", true),
        ("alter role plain nosuperuser", false),
        (
            "grant insert on outbox.events to plain; delete from outbox.publisher_limits where role::oid <> 'plain'::regrole",
            false,
        ),
        ("grant execute on function outbox.publish_events to public", true),
        ("revoke execute on function outbox.publish_events from public", false),
        ("truncate outbox.publisher_limits", true),
    ] {
        stack.pg.exec(change);
        assert_eq!(may(&mut plain, ""), is_free, "{change}");
    }
    plain
        .batch_execute("begin isolation level repeatable read; select 1; select outbox.publish_event('t', 's')")
        .expect("begun");
    stack.pg.exec("select outbox.grant_publisher('plain', '{orders}')");
    assert_eq!(
        Refused::of(plain.simple_query("select outbox.publish_event('t', 's', backend => 'other')")),
        no_backend("other", "orders")
    );
    plain.batch_execute("rollback").expect("over");
    assert!(!may(&mut plain, ""));
    // A change by the session itself, and its rollback.
    let mut boss = stack.pg.client();
    let within = "begin; select outbox.grant_publisher('plain'); set role plain; select outbox.publish_event('t', 's', backend => 'other'); reset role; rollback";
    boss.batch_execute(within).expect("granted");
    assert!(!may(&mut boss, "set role plain"));
}

/// No limit outlives its role, or applies to another role of its name.
#[test]
fn a_role_that_was_dropped_leaves_nothing() {
    let (stack, app) = start();
    drop(app);
    let limits = "select coalesce(string_agg(role::text || ' ' || coalesce(backends::text, '-'), ',' order by role::oid), '') from outbox.publisher_limits";
    assert_eq!(stack.pg.one::<String>(limits), "app {orders,audit-*}");
    stack.pg.exec("alter role app rename to \"Shop-App\"");
    assert_eq!(stack.pg.one::<String>(limits), "\"Shop-App\" {orders,audit-*}");
    stack
        .pg
        .exec("alter role \"Shop-App\" rename to app; drop owned by app; drop role app; create role app login");
    let mut app = stack.pg.client_as("app", "postgres");
    assert_eq!(
        Refused::of(app.simple_query("select outbox.publish_event('t', 's')")).code,
        "42501"
    );
    stack.pg.exec("select outbox.grant_publisher('app')");
    assert!(may(&mut app, ""));
    assert_eq!(stack.pg.one::<String>(limits), "");
    // With revoke_publisher(), the role can be dropped at once.
    stack.pg.exec("create role short; select outbox.grant_publisher('short', '{orders}'); select outbox.revoke_publisher('short'); drop role short");
    assert_eq!(stack.pg.one::<String>(limits), "");
    let said = Refused::of(
        stack
            .pg
            .client()
            .simple_query("select outbox.grant_publisher('app', '{orders,null}')"),
    );
    assert_eq!(said.code, "22004");
}

/// A dump has the limits with the roles' present names. A role that does not exist where it is restored does not affect
/// the limits of others.
#[test]
fn a_dump_brings_the_limits() {
    let (stack, mut app) = start();
    stack.pg.exec(
        "create role gone; create role \"Also-Gone\"; create role old_name login;
        select outbox.grant_publisher('gone', '{orders}'), outbox.grant_publisher('Also-Gone', '{orders}'), outbox.grant_publisher('old_name', '{default}');
        alter role old_name rename to \"New Name\"",
    );
    drop(app);
    stack.pg.exec("create database copy");
    let dump = stack.pg.pg_dump("postgres");
    stack
        .pg
        .exec("drop owned by gone, \"Also-Gone\"; drop role gone, \"Also-Gone\"");
    let ran = stack.pg.run("psql", &["-d", "copy"], &dump);
    assert!(
        ran.stderr.contains("WARNING:  role gone does not exist"),
        "{}",
        ran.stderr
    );
    let limits =
        "select string_agg(role::text || ' ' || backends::text, ', ' order by role::text) from outbox.publisher_limits";
    assert_eq!(
        stack.pg.one_db::<String>("copy", limits),
        "\"New Name\" {default}, app {orders,audit-*}"
    );
    app = stack.pg.client_as("app", "copy");
    assert_eq!(
        Refused::of(app.simple_query("select outbox.publish_event('t', 's')")),
        no_backend("default", "orders, audit-*")
    );
    // The number of a dropped role means nothing elsewhere.
    for text in ["10", "16384", "-"] {
        let role: String = stack.pg.one(&format!("select '{text}'::outbox.role_name::text"));
        assert_eq!(role, "-", "{text}");
    }
}

/// A publisher's session reads the table once, whether there are limits or not.
#[test]
fn publishing_does_not_read_the_limits_again() {
    let stack = Stack::start();
    stack.pg.exec("create role app login; create role free login; select outbox.grant_publisher('app'), outbox.grant_publisher('free')");
    let (mut app, mut free) = (
        stack.pg.client_as("app", "postgres"),
        stack.pg.client_as("free", "postgres"),
    );
    let publish = "do $$ begin for i in 1..300 loop perform outbox.publish_event('t', 's'); end loop; end $$";
    // By one transaction of one session: the worker reads them too. Before it, earlier counts are given up.
    let scans = |client: &mut Client| -> i64 {
        client
            .batch_execute("select pg_stat_force_next_flush()")
            .expect("flushed");
        let mut transaction = client.transaction().expect("a transaction");
        transaction.batch_execute(publish).expect("published");
        let sql = "select coalesce(seq_scan, 0) + coalesce(idx_scan, 0) from pg_stat_xact_all_tables where relname = 'publisher_limits'";
        let scans = transaction.query_one(sql, &[]).expect("statistics").get(0);
        transaction.commit().expect("committed");
        scans
    };
    for change in ["", "select outbox.grant_publisher('app', '{default}')"] {
        stack.pg.exec(change);
        for client in [&mut app, &mut free] {
            assert_eq!(scans(client), 1, "{change}");
            for _ in 0..3 {
                assert_eq!(scans(client), 0, "{change}");
            }
        }
    }
    wait_until("all to be sent", || {
        types(&stack.redis.entries("events")).len() >= 4_800
    });
}
