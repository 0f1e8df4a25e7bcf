//! The attempts of a publisher: it can publish, and do nothing else.

use std::time::{Duration, Instant};

use kit::{Refused, Stack, types};
use postgres::Client;
use uuid::Uuid;

const KNOWN: &str = "11111111-1111-1111-1111-111111111111";

/// With an event of another role, with a known id, and a role `publisher` that has its own schema.
fn start() -> (Stack, Client) {
    let stack = Stack::start();
    stack.pg.exec(&format!(
        "create role publisher login; create schema mine authorization publisher; grant create on database postgres to publisher;
        select outbox.grant_publisher('publisher');
        select outbox.publish_event('secret.type', 'secret-source', '{{\"secret\": \"payload\"}}', event_id => '{KNOWN}');"
    ));
    let publisher = stack.pg.client_as("publisher", "postgres");
    (stack, publisher)
}

#[test]
fn a_publisher_can_do_nothing_else() {
    let (stack, mut publisher) = start();
    let insert = "insert into outbox.events (event_type, source) values ('t', 's')";
    let denied = [
        "select 1 from outbox.events",
        "select count(*) from outbox.events",
        "select ctid, xmin from outbox.events",
        "table outbox.backends",
        "copy outbox.events to stdout",
        "copy (select * from outbox.events) to stdout",
        "copy outbox.events (event_type, source, seq) from stdin",
        "copy outbox.events (event_type, source, xid) from stdin",
        "copy outbox.events (event_type, source, backend_number) from stdin",
        "copy outbox.events (event_type, source, created_at) from stdin",
        "copy outbox.events from stdin",
        "insert into outbox.events values (1)",
        &format!("{insert} returning *"),
        &format!("{insert} returning seq"),
        &format!("{insert} on conflict do nothing returning created_at"),
        &format!("{insert} on conflict (event_id) do update set source = excluded.source"),
        &format!("{insert} on conflict on constraint events_pkey do nothing"),
        "with gone as (delete from outbox.events returning *) select * from gone",
        "update outbox.events set data = null",
        "merge into outbox.events e using (select 1) s on e.seq = 1 when matched then delete",
        "truncate outbox.events",
        "do $$ begin lock table outbox.events in access exclusive mode; end $$",
        "select for_update.seq from outbox.events for_update for update",
        "insert into outbox.scheduled_events (event_type) values ('t')",
        "insert into outbox.failed_events (event_type) values ('t')",
        "insert into outbox.backends (name, host) values ('evil', 'example.org')",
        "insert into outbox.restores (backend_number, xid) values (1, '5')",
        "delete from outbox.cursors",
        "select nextval('outbox.events_seq_seq')",
        "select currval('outbox.events_seq_seq')",
        "select setval('outbox.events_seq_seq', 1)",
        "select last_value from outbox.events_seq_seq",
        "select lastval()",
        "alter sequence outbox.events_seq_seq restart",
        "create trigger t before insert on outbox.events for each row execute function mine.f()",
        "create trigger t before insert on mine.events for each row execute function outbox.complete_event()",
        "create rule r as on insert to outbox.events do also notify evil",
        "create policy p on outbox.events using (true)",
        "create index on outbox.events (seq)",
        "alter table outbox.events enable row level security",
        "alter table outbox.events add column x text",
        "create table mine.child () inherits (outbox.events)",
        "create table mine.reference (seq bigint references outbox.events (seq))",
        "create statistics mine.s on seq, xid from outbox.events",
        "create function outbox.f() returns void language sql as ''",
        "create view outbox.v as select 1",
        "grant select on outbox.events to publisher",
        "grant execute on function outbox.publish_events to public",
        "grant usage on schema outbox to public",
        "set session_replication_role = replica",
        "set outbox_relay.max_event_size = '1GB'",
        "set outbox_relay.redis_host = 'example.org'",
        "alter system set outbox_relay.redis_host = 'example.org'",
        "alter role publisher set outbox_relay.max_event_size = '1GB'",
        "select outbox.grant_publisher('publisher')",
        "analyze outbox.events",
    ];
    publisher
        .batch_execute(
            "create function mine.f() returns trigger language plpgsql as 'begin return new; end'; create table mine.events (seq bigint);",
        )
        .expect("its own schema");
    // So that lastval() is about the extension's sequence.
    publisher
        .batch_execute("select outbox.publish_event('t', 's')")
        .expect("its right");
    for sql in denied {
        let Err(error) = publisher.simple_query(sql) else {
            assert!(
                sql.starts_with("analyze") || sql.starts_with("grant"),
                "{sql} was allowed"
            );
            continue;
        };
        let said = Refused::of::<()>(Err(error));
        // 42501, and the codes for settings of other contexts and for unknown names.
        let codes = ["42501", "55P02", "42809"];
        assert!(codes.contains(&said.code.as_str()), "{sql}: {said:?}");
        let shown = format!("{said:?}");
        assert!(!shown.contains("secret"), "{sql}: {shown}");
    }
    let acl: bool = stack.pg.one(
        "select has_table_privilege('publisher', 'outbox.events', 'select') or has_schema_privilege('public', 'outbox', 'usage')
            or has_function_privilege('public', 'outbox.publish_event(text,text,jsonb,text,text,timestamptz,integer,jsonb,text,text,uuid,bytea)', 'execute')",
    );
    assert!(!acl, "a grant without grant option went through");
    // According to the catalog, only the functions that publish may be called.
    let callable: Vec<String> = stack
        .pg
        .client()
        .query(
            "select proname::text from pg_proc where pronamespace = 'outbox'::regnamespace
                and has_function_privilege('publisher', oid, 'execute') order by 1",
            &[],
        )
        .expect("functions")
        .iter()
        .map(|row| row.get(0))
        .collect();
    assert_eq!(
        callable,
        [
            "analyse_as",
            "any_number_in",
            "any_subject_in",
            "any_time",
            "any_time",
            "any_time_in",
            "any_value",
            "any_value_in",
            "attach_table",
            "binary_data",
            "condition_query",
            "detach_table",
            "expect_backend_name",
            "expect_condition",
            "family_of",
            "publish_event",
            "publish_event",
            "publish_event",
            "publish_events",
            "published_here",
            "refuse_number",
            "refuse_time",
            "refuse_value",
            "row_events",
            "wait_for_event",
            "wait_published",
            "write_row_function"
        ]
    );
    let readable: i64 = stack.pg.one(
        "select count(*) from pg_class where relnamespace = 'outbox'::regnamespace and relkind in ('r', 'v', 'S')
            and (case when relkind = 'S' then has_sequence_privilege('publisher', oid, 'usage, select, update')
                else has_any_column_privilege('publisher', oid, 'select, update, references')
                    or has_table_privilege('publisher', oid, 'delete, truncate, trigger') end)",
    );
    assert_eq!(readable, 0);
}

/// The error for a repeated id shows that the id is taken. It does not show the event.
#[test]
fn errors_show_no_event_of_others() {
    let (stack, mut publisher) = start();
    for sql in [
        format!("select outbox.publish_event('t', 's', event_id => '{KNOWN}')"),
        format!(
            "select outbox.publish_events('[{{\"event_type\": \"t\", \"source\": \"s\", \"event_id\": \"{KNOWN}\"}}]')"
        ),
        format!("insert into outbox.events (event_type, source, event_id) values ('t', 's', '{KNOWN}')"),
        format!(
            "select outbox.publish_event('t', 's', event_id => '{KNOWN}', scheduled_at => now() + '1 hour'::interval)"
        ),
    ] {
        let said = Refused::of(publisher.simple_query(&sql));
        assert_eq!(said.code, "23505", "{sql}: {said:?}");
        let shown = format!("{said:?}");
        assert!(!shown.contains("secret") && !shown.contains("seq"), "{sql}: {shown}");
    }
    // Without a conflict target it needs no right to read, and shows no more than the error does.
    let quiet = format!(
        "insert into outbox.events (event_type, source, event_id) values ('t', 's', '{KNOWN}') on conflict do nothing"
    );
    assert_eq!(publisher.execute(&quiet, &[]).expect("nothing"), 0);
    // The errors of refused rows show what the publisher gave, and none of the extension's numbers.
    for sql in [
        "insert into outbox.events (event_type, source) values ('t', null)",
        "insert into outbox.events (event_type, source, data) values ('t', 's', '{')",
        "insert into outbox.events (event_type, source, backend) values ('t', 's', 'nowhere')",
    ] {
        let shown = format!("{:?}", Refused::of(publisher.simple_query(sql)));
        assert!(!shown.contains("Failing row"), "{sql}: {shown}");
    }
    let stats = "select count(*) from pg_stats where schemaname = 'outbox'";
    stack.pg.exec("analyze outbox.events");
    assert_eq!(publisher.query_one(stats, &[]).expect("pg_stats").get::<_, i64>(0), 0);
    assert_eq!(types(&stack.wait_events(1)), ["secret.type"]);
}

/// The publisher's own tables, functions, operators, casts and types, before outbox and pg_catalog in the search_path.
#[test]
fn objects_of_the_publisher_change_nothing() {
    let (stack, mut publisher) = start();
    publisher
        .batch_execute(
            "create temp table events (seq bigint, event_type text, source text);
            create temp table backends (name text, number integer, allowed_streams text[]);
            create temp table scheduled_events (seq bigint);
            create temp sequence events_seq_seq;
            insert into backends values ('default', 99, '{*}');
            create table mine.events (like pg_temp.events); create table mine.backends (like pg_temp.backends);
            create function mine.complete_event() returns trigger language plpgsql as 'begin return null; end';
            create function mine.nextval(regclass) returns bigint language sql as 'select 1::bigint';
            create function mine.pg_current_xact_id() returns xid8 language sql as $$select '5'::xid8$$;
            create function mine.eq(uuid, uuid) returns boolean language sql as 'select true';
            create operator mine.= (leftarg = uuid, rightarg = uuid, function = mine.eq);
            create function mine.text_eq(text, text) returns boolean language sql as 'select false';
            create operator mine.= (leftarg = text, rightarg = text, function = mine.text_eq);
            create domain mine.text as pg_catalog.text check (false);
            create domain mine.jsonb as pg_catalog.jsonb check (false);
            create type mine.parcel as (x integer);
            create function mine.to_json(mine.parcel) returns json language sql as $$select '{}'::json$$;
            create cast (mine.parcel as json) with function mine.to_json(mine.parcel) as assignment;
            set search_path = pg_temp, mine, pg_catalog",
        )
        .expect("its own");
    let ids: Vec<Uuid> = [
        "select outbox.publish_event('one', 's', '{\"a\": 1}')",
        "select * from outbox.publish_events('[{\"event_type\": \"two\", \"source\": \"s\"}]')",
    ]
    .iter()
    .map(|sql| publisher.query_one(*sql, &[]).expect("published").get(0))
    .collect();
    assert_ne!(ids[0], ids[1]);
    publisher
        .batch_execute(
            "insert into outbox.events (event_type, source, data) values ('three', 's', row(1)::mine.parcel)",
        )
        .expect("a cast of its own");
    assert_eq!(types(&stack.wait_events(4)), ["secret.type", "one", "two", "three"]);
    let own: i64 = publisher
        .query_one("select count(*) from mine.events", &[])
        .expect("its own")
        .get(0);
    assert_eq!(own, 0);
    let numbers = "select count(*) from outbox.events where backend_number <> 1 or xid = '5' or seq < 1";
    assert_eq!(stack.pg.one::<i64>(numbers), 0);
}

/// The right to publish can be lent by a function of a role that has it, and by no other.
#[test]
fn publishing_through_a_function_needs_its_owners_right() {
    let (stack, mut publisher) = start();
    stack.pg.exec("create role nobody login; create schema theirs authorization nobody; grant usage on schema mine, theirs to public");
    let body = "returns uuid language sql security definer set search_path = pg_catalog as $$select outbox.publish_event('lent', 's')$$";
    publisher
        .batch_execute(&format!("create function mine.publish() {body}"))
        .expect("its own");
    let mut nobody = stack.pg.client_as("nobody", "postgres");
    nobody.batch_execute("select mine.publish()").expect("lent");
    let theirs = format!("set check_function_bodies = off; create function theirs.publish() {body}");
    nobody.batch_execute(&theirs).expect("its own");
    for client in [&mut nobody, &mut publisher] {
        assert_eq!(
            Refused::of(client.simple_query("select theirs.publish()")).code,
            "42501"
        );
    }
    assert_eq!(types(&stack.wait_events(2)), ["secret.type", "lent"]);
}

#[test]
fn allowed_streams_are_only_glob_patterns() {
    let (stack, mut publisher) = start();
    let mut publish =
        |stream: &str| publisher.execute("select outbox.publish_event('t', 's', stream => $1)", &[&stream]);
    let long = "a".repeat(1_000);
    let many = "*a".repeat(2_000) + "b";
    let cases: &[(&[&str], &[&str], &[&str])] = &[
        (&[], &[], &["events", "a", "*", "{}"]),
        (
            &["Orders"],
            &["Orders"],
            &["orders", "ORDERS", "Orders ", " Orders", "Orders\n"],
        ),
        (&["**"], &["a", "*", "a\nb", "{x}"], &[]),
        (&["a**b"], &["ab", "axb", "a\n\nb"], &["a", "b", "abc"]),
        (&["{a,b}"], &["{a,b}"], &["a", "b"]),
        (&["[a-z]"], &["[a-z]"], &["a", "-"]),
        (&["a\\*"], &["a\\", "a\\x"], &["a*", "a"]),
        (&["line?end"], &["line\nend", "line-end"], &["lineend", "line\n\nend"]),
        (&["é?"], &["éé", "é日"], &["e", "é", "ée\u{301}"]),
        (&["%", "a_c", "", "a.*"], &["%", "a_c", "a."], &["x", "abc", "a"]),
        (
            &["*:x"],
            &["a:x", "outbox:x"],
            &["outbox_relay:x", "outbox_relay:guard:x"],
        ),
        (
            &["*"],
            &["a", "outbox_relay"],
            &["outbox_relay:", "outbox_relay:guard:x:1:2"],
        ),
        // The work is at most the product of the lengths.
        (&[&many], &[], &[&long]),
        (&[&long, "?*?"], &[&long, "ab"], &["a"]),
    ];
    for (patterns, allowed, refused) in cases {
        let mut admin = stack.pg.client();
        let patterns: Vec<&str> = patterns.to_vec();
        admin
            .execute("update outbox.backends set allowed_streams = $1", &[&patterns])
            .expect("patterns");
        let start = Instant::now();
        for stream in *allowed {
            publish(stream).unwrap_or_else(|error| panic!("{stream:?} by {patterns:?}: {error:?}"));
        }
        for stream in *refused {
            assert_eq!(Refused::of(publish(stream)).code, "42501", "{stream:?} by {patterns:?}");
        }
        assert!(
            start.elapsed() < Duration::from_secs(2),
            "{:?} for {patterns:.20?}",
            start.elapsed()
        );
    }
    // Text has no zero byte.
    let zero = "select outbox.publish_events('[{\"event_type\": \"t\", \"source\": \"s\", \"stream\": \"a\\u0000\"}]')";
    assert_eq!(Refused::of(publisher.simple_query(zero)).code, "22P05");
}

/// A role that may write backends can do that and what needs no other right, but no more.
#[test]
fn a_role_that_may_write_backends_writes_backends() {
    let (stack, mut publisher) = start();
    stack
        .pg
        .exec("grant select, insert, update, delete on outbox.backends to publisher");
    publisher
        .batch_execute(
            "insert into outbox.backends (name, host) values ('b', 'localhost'); update outbox.backends set host = '127.0.0.1' where name = 'b';",
        )
        .expect("granted");
    for sql in [
        "update outbox.backends set password_file = '/etc/passwd' where name = 'b'",
        "insert into outbox.backends (name, password_file) values ('c', '/etc/passwd')",
        "select * from outbox.backend_passwords",
        "select outbox.set_backend_password('b', 'x')",
        "alter table outbox.backends disable trigger check_backend",
        "truncate outbox.backends",
    ] {
        assert_eq!(Refused::of(publisher.simple_query(sql)).code, "42501", "{sql}");
    }
    stack
        .pg
        .exec("update outbox.backends set password_file = '/etc/hostname' where name = 'b'");
    // A file column that is set can be cleared or kept; swapping names moves no file to another backend.
    publisher
        .batch_execute("update outbox.backends set name = 'd' where name = 'b'; update outbox.backends set password_file = null where name = 'd'")
        .expect("granted");
    stack
        .pg
        .exec("select outbox.set_backend_password('d', 'some password')");
    publisher
        .batch_execute("delete from outbox.backends where name = 'd'")
        .expect("granted");
    assert_eq!(stack.pg.one::<i64>("select count(*) from outbox.backend_passwords"), 0);
    let waiting = "select outbox.publish_event('t', 's', scheduled_at => now() + '1 day'::interval)";
    publisher.batch_execute(waiting).expect("its right");
    assert_eq!(
        Refused::of(publisher.simple_query("delete from outbox.backends")).code,
        "55006"
    );
}

/// A stream that a publisher may not name is neither appended to nor trimmed.
#[test]
fn a_stream_that_is_not_allowed_is_not_trimmed() {
    let (stack, mut publisher) = start();
    let mut admin = stack.redis.conn();
    for _ in 0..500 {
        kit::tell(&mut admin, &["XADD", "of-others", "*", "k", "v"]);
    }
    stack
        .pg
        .exec("update outbox.backends set max_len = 1, allowed_streams = '{mine:*}'");
    for sql in [
        "select outbox.publish_event('t', 's', stream => 'of-others')",
        "insert into outbox.events (event_type, source, stream) values ('t', 's', 'of-others')",
        "select outbox.publish_event('t', 's', stream => 'of-others', scheduled_at => now() + interval '1 hour')",
    ] {
        assert_eq!(Refused::of(publisher.simple_query(sql)).code, "42501", "{sql}");
    }
    publisher
        .batch_execute("select outbox.publish_event('t', 's', stream => 'mine:1')")
        .expect("allowed");
    stack.redis.wait_entries("mine:1", 1);
    assert_eq!(stack.redis.xlen("of-others"), 500);
    // With all streams allowed, as in a new backend, naming a stream also means trimming it.
    stack.pg.exec("update outbox.backends set allowed_streams = default");
    publisher
        .batch_execute("select outbox.publish_event('t', 's', stream => 'of-others')")
        .expect("allowed");
    kit::wait_until("trimming", || stack.redis.xlen("of-others") < 500);
}

/// Revoking takes back the granted rights, and no others.
#[test]
fn a_revoked_publisher_cannot_publish() {
    let (stack, mut publisher) = start();
    stack
        .pg
        .exec("create role other login; grant usage on schema outbox to other; grant select on outbox.backends to other; select outbox.grant_publisher('other')");
    let ways = [
        "select outbox.publish_event('t', 's')",
        "select outbox.publish_events('[]')",
        "insert into outbox.events (event_type, source) values ('t', 's')",
    ];
    let mut other = stack.pg.client_as("other", "postgres");
    for sql in ways {
        publisher
            .batch_execute(sql)
            .unwrap_or_else(|error| panic!("{sql}: {error:?}"));
    }
    stack
        .pg
        .exec("select outbox.revoke_publisher('publisher'), outbox.revoke_publisher('other'), outbox.revoke_publisher('other')");
    for sql in ways {
        for role in [&mut publisher, &mut other] {
            assert_eq!(Refused::of(role.simple_query(sql)).code, "42501", "{sql}");
        }
    }
    other
        .batch_execute("table outbox.backends")
        .expect("it was granted that");
    let usage = "select has_schema_privilege('publisher', 'outbox', 'usage') or has_any_column_privilege('publisher', 'outbox.events', 'insert')";
    assert!(!stack.pg.one::<bool>(usage));
    assert_eq!(
        Refused::of(other.simple_query("select outbox.revoke_publisher('publisher')")).code,
        "42501"
    );
    assert_eq!(
        Refused::of(stack.pg.client().simple_query("select outbox.revoke_publisher(null)")).code,
        "22004"
    );
}

/// A narrower right than a publisher's: a function that publishes one kind of event, for a role that has no other right
/// here.
#[test]
fn a_function_may_grant_a_narrower_right() {
    let (stack, mut publisher) = start();
    stack.pg.exec(
        "create role app login; create schema app;
        create function app.order_placed(data jsonb) returns uuid language sql security definer set search_path = pg_catalog, pg_temp
            return outbox.publish_event('order.placed', 'shop', data, backend => 'default', stream => 'orders');
        revoke all on function app.order_placed from public; grant usage on schema app to app; grant execute on function app.order_placed to app",
    );
    let mut app = stack.pg.client_as("app", "postgres");
    app.batch_execute("select app.order_placed('{\"id\": 1}')")
        .expect("lent");
    assert_eq!(types(&stack.redis.wait_entries("orders", 1)), ["order.placed"]);
    for sql in [
        "select outbox.publish_event('t', 's', stream => 'of-others')",
        "insert into outbox.events (event_type, source) values ('t', 's')",
    ] {
        assert_eq!(Refused::of(app.simple_query(sql)).code, "42501", "{sql}");
    }
    assert_eq!(
        Refused::of(publisher.simple_query("select app.order_placed('{}')")).code,
        "42501"
    );
}

/// By its name as pg_roles shows it, whatever characters it has and however it is typed; everything else fails with a
/// clear error.
#[test]
fn role_names_are_taken_as_pg_roles_shows_them() {
    let stack = Stack::start();
    stack
        .pg
        .exec("create role \"Shop-App\"; create role plain; create role \"Plain\"");
    let can = |role: &str| -> bool {
        stack.pg.one(&format!(
            "select has_any_column_privilege('{role}', 'outbox.events', 'insert')"
        ))
    };
    for (given, role) in [
        ("'Shop-App'", "Shop-App"),
        ("'\"Shop-App\"'", "Shop-App"),
        ("'\"Shop-App\"'::regrole", "Shop-App"),
        ("'Shop-App'::text", "Shop-App"),
        ("'Shop-App'::name", "Shop-App"),
        ("'plain'", "plain"),
        ("'PLAIN'", "plain"),
        ("'Plain'", "Plain"),
        ("role => 'plain'", "plain"),
        ("(select oid from pg_roles where rolname = 'plain')", "plain"),
        ("current_user", "postgres"),
        ("session_user", "postgres"),
    ] {
        stack.pg.exec(&format!("select outbox.grant_publisher({given})"));
        assert!(can(role), "{given}");
        stack.pg.exec(&format!("select outbox.revoke_publisher({given})"));
        assert!(!can(role) || role == "postgres", "{given}");
    }
    let mut client = stack.pg.client();
    for function in ["grant_publisher", "revoke_publisher"] {
        for (given, code, message) in [
            ("null", "22004", "role must not be null"),
            ("null::regrole", "22004", "role must not be null"),
            ("null::text", "22004", "role must not be null"),
            ("'No One'", "42704", "role \"No One\" does not exist"),
            ("''", "42704", "role \"\" does not exist"),
            ("'-'", "42704", "role \"-\" does not exist"),
            ("'-'::regrole", "42704", "role \"-\" does not exist"),
            ("'a.b.c'", "42704", "role \"a.b.c\" does not exist"),
            ("'public'", "42704", "role \"public\" does not exist"),
            ("1234567::regrole", "42704", "role \"1234567\" does not exist"),
        ] {
            let said = Refused::of(client.simple_query(&format!("select outbox.{function}({given})")));
            assert_eq!((said.code.as_str(), said.message.as_str()), (code, message), "{given}");
            assert!(said.detail.is_some() && said.hint.is_some(), "{said:?}");
        }
    }
}
