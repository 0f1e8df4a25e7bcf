//! The rights of each role: PUBLIC may do nothing, a publisher publish, pg_monitor read the views.

use std::io::Write;

use kit::{Refused, Stack};
use postgres::Client;
use uuid::Uuid;

/// Every function and procedure that a user could call, with valid arguments.
const CALLS: &[&str] = &[
    "select outbox.publish_event('t', 's')",
    "select outbox.publish_events('[]')",
    "select * from outbox.published_here()",
    "select outbox.replay('default', now())",
    "select outbox.preview('00000000-0000-0000-0000-000000000000')",
    "select outbox.test_backend('default')",
    "select outbox.erase('00000000-0000-0000-0000-000000000000')",
    "call outbox.retry_all_failed()",
    "select outbox.wake()",
    "select outbox.retry_failed()",
    "select outbox.wait_published('00000000-0000-0000-0000-000000000000', '0')",
    "select outbox.set_backend_password('default', 'x')",
    "select outbox.grant_publisher('nobody')",
    "select outbox.revoke_publisher('nobody')",
    "select outbox.has_waiting_events(1)",
    "select * from outbox.worker_status()",
    "select * from outbox.backlog(1)",
    "select * from outbox.purge_piece(1, 0, 1)",
    "call outbox.purge()",
];

const TABLES: &[&str] = &[
    "events",
    "backends",
    "backend_passwords",
    "scheduled_events",
    "failed_events",
    "refused_events",
    "cursors",
    "ticks",
    "consumer_groups",
    "status",
    "backend_status",
    "event_status",
    "events_seq_seq",
];

fn start() -> Stack {
    let stack = Stack::start();
    stack.pg.exec(
        "create role nobody login; create role publisher login; create role monitor login in role pg_monitor; \
                   create role reader login in role pg_read_all_data, pg_write_all_data",
    );
    stack
}

#[track_caller]
fn assert_denied(client: &mut Client, sql: &str, what: &str) {
    let refused = Refused::of(client.simple_query(sql));
    let expected = ("42501", format!("permission denied for {what}"));
    assert_eq!((refused.code.as_str(), refused.message), expected, "{sql}");
}

#[test]
fn the_public_has_nothing() {
    let stack = start();
    let mut client = stack.pg.client_as("nobody", "postgres");
    for sql in CALLS {
        assert_denied(&mut client, sql, "schema outbox");
    }
    for table in TABLES {
        assert_denied(&mut client, &format!("select * from outbox.{table}"), "schema outbox");
    }
    // Also if somebody grants everybody the use of the schema.
    stack.pg.exec("grant usage on schema outbox to public");
    for sql in CALLS {
        let name = &sql[sql.find("outbox.").unwrap() + 7..sql.find('(').unwrap()];
        let kind = if sql.starts_with("call") {
            "procedure"
        } else {
            "function"
        };
        assert_denied(&mut client, sql, &format!("{kind} {name}"));
    }
    for table in TABLES {
        let kind = match *table {
            "status" | "backend_status" | "event_status" => "view",
            "events_seq_seq" => "sequence",
            _ => "table",
        };
        assert_denied(
            &mut client,
            &format!("select * from outbox.{table}"),
            &format!("{kind} {table}"),
        );
    }
    assert_denied(
        &mut client,
        "insert into outbox.events (event_type, source) values ('t', 's')",
        "table events",
    );
    assert_eq!(stack.pg.one::<i64>("select count(*) from outbox.events"), 0);
}

/// According to the catalogs, so that nothing is forgotten: no object is granted to PUBLIC, and each has a comment.
#[test]
fn every_object_has_a_comment_and_nothing_is_public() {
    let stack = Stack::start();
    let mut client = stack.pg.client();
    let names = |client: &mut Client, sql: &str| -> Vec<String> {
        client.query(sql, &[]).unwrap().iter().map(|row| row.get(0)).collect()
    };
    let public = "select format('%s %s', o.kind, o.name) from ( \
            select 'schema' as kind, nspname::text as name, coalesce(nspacl, acldefault('n', nspowner)) as acl, oid as namespace \
                from pg_namespace where nspname = 'outbox' \
            union all select 'relation', relname, coalesce(relacl, acldefault(case relkind when 'S' then 's' else 'r' end::\"char\", relowner)), relnamespace \
                from pg_class where relkind in ('r', 'v', 'S', 'm', 'p', 'f') \
            union all select 'function', proname, coalesce(proacl, acldefault('f', proowner)), pronamespace from pg_proc \
        ) o where o.namespace = 'outbox'::regnamespace and exists (select from aclexplode(o.acl) a where a.grantee = 0)";
    assert_eq!(names(&mut client, public), Vec::<String>::new());
    let silent = "select pg_describe_object(d.classid, d.objid, 0) from pg_depend d \
        where d.refclassid = 'pg_extension'::regclass and d.deptype = 'e' \
            and d.refobjid = (select oid from pg_extension where extname = 'outbox_relay') \
            and d.classid in ('pg_class'::regclass, 'pg_proc'::regclass) \
            and obj_description(d.objid, d.classid::regclass::name) is null \
            and not (d.classid = 'pg_class'::regclass and exists (select from pg_depend s \
                where s.classid = d.classid and s.objid = d.objid and s.deptype = 'i')) \
            and pg_describe_object(d.classid, d.objid, 0) not like '%index%' order by 1";
    assert_eq!(names(&mut client, silent), Vec::<String>::new());
    let members: i64 = stack.pg.one(
        "select count(*) from pg_depend where refclassid = 'pg_extension'::regclass and deptype = 'e' \
         and refobjid = (select oid from pg_extension where extname = 'outbox_relay')",
    );
    assert!(members > 25, "only {members} objects were looked at");
    let about: Option<String> = stack
        .pg
        .one("select obj_description(oid, 'pg_extension') from pg_extension where extname = 'outbox_relay'");
    assert!(about.is_some_and(|about| !about.is_empty()));
}

#[test]
fn a_publisher_publishes_and_does_nothing_else() {
    let stack = start();
    stack.pg.exec("select outbox.grant_publisher('publisher')");
    stack.pg.exec("select outbox.set_backend_password('default', null)");
    let mut client = stack.pg.client_as("publisher", "postgres");
    let id = Uuid::new_v4();
    client
        .batch_execute("select outbox.publish_event('by event', 's')")
        .unwrap();
    client
        .batch_execute("select outbox.publish_events('[{\"event_type\": \"by events\", \"source\": \"s\"}]')")
        .unwrap();
    let insert = "insert into outbox.events (event_id, event_type, source, backend, data, subject, stream, data_schema, \
                  publisher_config, max_retries) values ($1, 'by insert', 's', 'default', '1', 'x', 'events', 'y', '{}', 1)";
    client.execute(insert, &[&id]).unwrap();
    let mut copy = client
        .copy_in("copy outbox.events (event_type, source) from stdin")
        .unwrap();
    writeln!(copy, "by copy\ts").unwrap();
    copy.finish().unwrap();
    client
        .batch_execute("select outbox.publish_event('scheduled', 's', scheduled_at => now() + interval '1 hour')")
        .unwrap();
    let types: Vec<String> = stack
        .wait_events(4)
        .iter()
        .map(|e| e.field("event_type").to_string())
        .collect();
    assert_eq!(types, ["by event", "by events", "by insert", "by copy"]);

    let used = format!("select outbox.publish_event('t', 's', event_id => '{id}')");
    assert_eq!(Refused::of(client.simple_query(&used)).code, "23505");
    for table in TABLES
        .iter()
        .filter(|table| !["status", "backend_status", "event_status", "events_seq_seq"].contains(table))
    {
        for sql in [
            format!("select * from outbox.{table}"),
            format!("delete from outbox.{table}"),
            format!("truncate outbox.{table}"),
        ] {
            assert_denied(&mut client, &sql, &format!("table {table}"));
        }
    }
    for view in ["status", "backend_status", "event_status"] {
        assert_denied(
            &mut client,
            &format!("select * from outbox.{view}"),
            &format!("view {view}"),
        );
    }
    for sql in [
        "update outbox.events set source = 'x'",
        "insert into outbox.events (event_type, source) values ('t', 's') returning seq",
        "insert into outbox.events (event_type, source, created_at) values ('t', 's', now())",
        "insert into outbox.events (event_type, source, seq) values ('t', 's', 1)",
        "insert into outbox.events (event_type, source, xid) values ('t', 's', '5')",
        "insert into outbox.events (event_type, source, backend_number) values ('t', 's', 1)",
    ] {
        assert_denied(&mut client, sql, "table events");
    }
    assert_denied(
        &mut client,
        "select nextval('outbox.events_seq_seq')",
        "sequence events_seq_seq",
    );
    assert_denied(
        &mut client,
        "update outbox.backends set host = 'evil'",
        "table backends",
    );
    for sql in CALLS.iter().filter(|sql| {
        !["publish_event", "published_here", "wait_published"]
            .iter()
            .any(|name| sql.contains(name))
    }) {
        let name = &sql[sql.find("outbox.").unwrap() + 7..sql.find('(').unwrap()];
        let kind = if sql.starts_with("call") {
            "procedure"
        } else {
            "function"
        };
        assert_denied(&mut client, sql, &format!("{kind} {name}"));
    }
}

#[test]
fn a_monitor_reads_the_views_and_nothing_else() {
    let stack = start();
    stack.publish("seen");
    stack.wait_events(1);
    let mut client = stack.pg.client_as("monitor", "postgres");
    kit::wait_eq("the event's status", "published".to_string(), || {
        client
            .query_one("select status from outbox.event_status where event_type = 'seen'", &[])
            .unwrap()
            .get(0)
    });
    let row = client
        .query_one(
            "select backend, state, pending, published_total from outbox.backend_status",
            &[],
        )
        .unwrap();
    let row: (String, String, i64, i64) = (row.get(0), row.get(1), row.get(2), row.get(3));
    assert_eq!(row, ("default".to_string(), "idle".to_string(), 0, 1));
    let row = client
        .query_one("select worker_pid, state, published_total from outbox.status", &[])
        .unwrap();
    let row: (i32, String, i64) = (row.get(0), row.get(1), row.get(2));
    assert_eq!(row, (stack.pg.wait_worker("postgres"), "running".to_string(), 1));
    for table in [
        "events",
        "backends",
        "backend_passwords",
        "scheduled_events",
        "failed_events",
        "refused_events",
        "cursors",
    ] {
        assert_denied(
            &mut client,
            &format!("select * from outbox.{table}"),
            &format!("table {table}"),
        );
    }
    assert_denied(&mut client, "select outbox.wake()", "function wake");
    assert_denied(
        &mut client,
        "select outbox.publish_event('t', 's')",
        "function publish_event",
    );
}

/// Passwords are kept separately: even roles that may read and write all data see none, and a dump has none.
#[test]
fn nobody_reads_a_password() {
    let stack = start();
    stack
        .pg
        .exec("select outbox.set_backend_password('default', 'secret-word')");
    let mut client = stack.pg.client_as("reader", "postgres");
    assert_eq!(
        client
            .query("select * from outbox.backend_passwords", &[])
            .unwrap()
            .len(),
        0
    );
    assert_eq!(
        client
            .execute("update outbox.backend_passwords set password = 'x'", &[])
            .unwrap(),
        0
    );
    let refused = Refused::of(client.simple_query("insert into outbox.backend_passwords values (1, 'x')"));
    assert_eq!(refused.code, "42501");
    assert_eq!(client.query("select * from outbox.backends", &[]).unwrap().len(), 1);
    assert!(!stack.pg.pg_dump("postgres").contains("secret-word"));
    assert!(
        stack.pg.one::<bool>(
            "select length(password) > 11 and encode(password, 'escape') !~ 'secret' from outbox.backend_passwords"
        ),
        "it is there, and sealed"
    );
    stack.pg.exec("select outbox.set_backend_password('default', null)");
    assert_eq!(stack.pg.one::<i64>("select count(*) from outbox.backend_passwords"), 0);
    let missing = Refused::of(
        stack
            .pg
            .client()
            .simple_query("select outbox.set_backend_password('nowhere', 'x')"),
    );
    assert_eq!(
        (missing.code.as_str(), missing.message.as_str()),
        ("42704", "backend \"nowhere\" does not exist")
    );
}

#[test]
fn only_a_role_that_may_read_server_files_may_name_them() {
    let stack = start();
    stack
        .pg
        .exec("grant usage on schema outbox to nobody; grant select, update, insert on outbox.backends to nobody");
    let mut client = stack.pg.client_as("nobody", "postgres");
    let expected = Refused::new(
        "42501",
        "permission denied to set password_file",
        "The server reads that file.",
        "Only roles with the privileges of pg_read_server_files may set it.",
    );
    for sql in [
        "update outbox.backends set password_file = '/etc/hostname'",
        "insert into outbox.backends (name, password_file) values ('b', '/etc/hostname')",
    ] {
        assert_eq!(Refused::of(client.simple_query(sql)), expected);
    }
    stack.pg.exec("grant pg_read_server_files to nobody");
    client
        .batch_execute("update outbox.backends set password_file = '/etc/hostname'")
        .unwrap();
}

/// A table with a column of our tables' types would stop every ALTER of these tables that rewrites them, as an update
/// of the extension may.
#[test]
fn nobody_builds_a_table_of_our_rows() {
    let stack = start();
    stack
        .pg
        .exec("select outbox.grant_publisher('publisher'); grant create on schema public to public");
    let relations = "select string_agg(oid::regclass::text, ' ') from pg_class where relnamespace = 'outbox'::regnamespace and relkind in ('r', 'v')";
    let relations: String = stack.pg.one(relations);
    for role in ["publisher", "monitor"] {
        let mut client = stack.pg.client_as(role, "postgres");
        for relation in relations.split(' ') {
            let refused = Refused::of(client.batch_execute(&format!("create table theirs (its {relation})")));
            let expected = ("42501", format!("permission denied for type {relation}"));
            assert_eq!((refused.code.as_str(), refused.message), expected, "{role}");
        }
        assert_denied(
            &mut client,
            "create table theirs as select null::outbox.events as its",
            "type outbox.events",
        );
    }
    stack.pg.exec(
        "alter table outbox.events add note double precision not null default random(); drop extension outbox_relay",
    );
}
