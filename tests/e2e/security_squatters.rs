//! Objects that exist before the extension, or look like its own: a schema in which others may create, numbers of
//! backends chosen in advance, objects that look like numbers.

use std::io::Write;

use kit::{Postgres, Refused, Stack, wait_drained, wait_until};
use postgres::Client;

/// A schema in which another role may create objects is refused for the extension, whoever owns it.
#[test]
fn a_schema_in_which_others_may_create_is_refused() {
    let pg = Postgres::start();
    pg.exec("create role mallory login; create role friends; grant friends to mallory");
    for grant in [
        "grant create on schema outbox to mallory",
        "grant all on schema outbox to friends",
        "grant usage, create on schema outbox to public",
        "grant create on schema outbox to mallory with grant option",
    ] {
        pg.exec(&format!("create schema outbox; {grant}"));
        let said = Refused::of(pg.client().simple_query("create extension outbox_relay"));
        assert_eq!(
            (said.code.as_str(), said.message.as_str()),
            (
                "55000",
                "schema \"outbox\" exists, and roles other than its owner may create objects in it"
            ),
            "{grant}: {said:?}"
        );
        pg.exec("drop schema outbox");
    }
    // Existing objects may be used instead of the extension's, even an empty table, or default privileges.
    pg.exec("create schema outbox; alter default privileges in schema outbox grant execute on functions to mallory");
    assert_eq!(
        Refused::of(pg.client().simple_query("create extension outbox_relay")).code,
        "55000"
    );
    pg.exec("drop schema outbox cascade; create schema outbox authorization mallory");
    assert_eq!(
        Refused::of(pg.client().simple_query("create extension outbox_relay")).code,
        "55000"
    );
    // A superuser's schema, which others may only use, is accepted.
    pg.exec("drop schema outbox; create schema outbox; grant usage on schema outbox to mallory");
    pg.extension();
    let overload = "create function outbox.publish_event(text, text) returns uuid language sql as 'select null::uuid'";
    assert_eq!(
        Refused::of(pg.client_as("mallory", "postgres").simple_query(overload)).code,
        "42501"
    );
}

/// What the one who creates the extension grants on each new object is not granted on the extension's. Together with
/// the use of the schema, which publishers have, it would open all events, passwords and limits.
#[test]
fn default_privileges_open_nothing() {
    let pg = Postgres::start();
    pg.exec(
        "create role app login; create role reader login;
         alter default privileges grant execute on functions to app;
         alter default privileges grant all on tables to app with grant option;
         alter default privileges grant all on sequences to app;
         alter default privileges grant usage on types to app;
         alter default privileges grant usage on schemas to app, reader;
         alter default privileges grant select on tables to public, reader",
    );
    pg.extension();
    let granted = "select coalesce(string_agg(o.name || ' to ' || a.grantee::regrole, ', '), '') from (
            select c.oid::regclass::text as name, relacl as acl from pg_class c where relnamespace = 'outbox'::regnamespace
            union all select p.oid::regprocedure::text, proacl from pg_proc p where pronamespace = 'outbox'::regnamespace
            union all select t.oid::regtype::text, typacl from pg_type t where typnamespace = 'outbox'::regnamespace
        ) o, aclexplode(o.acl) a where a.grantee in (0, 'app'::regrole, 'reader'::regrole)";
    assert_eq!(pg.one::<String>(granted), "");
    // Nor on what is made anew.
    pg.exec(
        "alter extension outbox_relay drop function outbox.discard_failed; drop function outbox.discard_failed;
         alter extension outbox_relay drop view outbox.top; drop view outbox.top",
    );
    assert_eq!(pg.one::<i64>("select outbox.restore_objects()"), 2);
    assert_eq!(pg.one::<String>(granted), "");
    pg.exec("select outbox.grant_publisher('app', '{default}', '{mine}')");
    let mut app = pg.client_as("app", "postgres");
    app.batch_execute("select outbox.publish_event('t', 's', stream => 'mine')")
        .expect("a publisher");
    for sql in [
        "select data from outbox.events",
        "delete from outbox.publisher_limits",
        "select outbox.set_backend_password('default', 'x')",
        "select outbox.discard_failed()",
        "select nextval('outbox.events_seq_seq')",
        "select * from outbox.top",
    ] {
        assert_eq!(Refused::of(app.simple_query(sql)).code, "42501", "{sql}");
    }
    // The rights that the extension itself grants are there.
    pg.exec("create role monitor login in role pg_monitor");
    pg.client_as("monitor", "postgres")
        .batch_execute("select * from outbox.status; select * from outbox.health()")
        .expect("pg_monitor may read the views");
}

/// Procedures that commit have no search_path of their own. A role that may create objects in a schema that a superuser
/// has put before pg_catalog gives a domain the name of a type; its check would run as the superuser.
#[test]
fn procedures_use_no_type_of_others() {
    let pg = Postgres::start();
    pg.extension();
    pg.exec(
        "create schema shared;
         create role mallory login;
         grant usage, create on schema shared to mallory;
         insert into outbox.failed_events (seq, xid, created_at, event_id, backend_number, event_type, source, backend, attempts, last_error, failed_at)
            select n, '3', now(), gen_random_uuid(), 1, 't', 's', 'default', 1, 'e', '2020-01-01' from generate_series(1, 3) n;
         insert into outbox.inbox (consumer, event_id, consumed_at) values ('c', gen_random_uuid(), '2020-01-01')",
    );
    pg.client_as("mallory", "postgres")
        .batch_execute(
            "create function shared.refuse() returns boolean language plpgsql
                as $$ begin raise exception 'it runs as %', current_user; end $$;
             do $do$ declare t pg_catalog.name; begin
                for t in select typname from pg_type where typnamespace = 'pg_catalog'::regnamespace and typtype = 'b' and typname !~ '^_' loop
                    execute format('create domain shared.%1$I as pg_catalog.%1$I check (shared.refuse())', t);
                end loop;
             end $do$",
        )
        .expect("created");
    let mut client = pg.client();
    client
        .batch_execute("set search_path = shared, pg_catalog")
        .expect("a superuser's own choice");
    for call in [
        "call outbox.retry_all_failed()",
        "call outbox.retry_all_failed('default', 't')",
        "call outbox.purge()",
    ] {
        client
            .batch_execute(call)
            .unwrap_or_else(|error| panic!("{call}: {error:?}"));
    }
    client
        .query_one("select null::timestamptz", &[])
        .expect_err("the domain is found by its name alone");
}

/// Numbers come from a sequence: only a restore of a dump chooses them.
#[test]
fn a_role_cannot_choose_the_number_of_a_backend() {
    let stack = Stack::start();
    stack.pg.exec(
        "create role keeper login; grant usage on schema outbox to keeper; grant select, insert, update, delete on outbox.backends to keeper;
        create role writer login in role pg_read_all_data, pg_write_all_data;
        insert into outbox.backends (name) values ('gone'), ('other'); select outbox.publish_event('t', 's', backend => 'gone');
        update outbox.backends set host = '127.0.0.1', port = (select port from outbox.backends where name = 'default') where name <> 'default'",
    );
    wait_drained(&stack.pg, "gone");
    let mut open = stack.pg.client();
    open.batch_execute("begin; select outbox.publish_event('late', 's', backend => 'gone')")
        .expect("an event of a backend that goes");
    stack.pg.exec("delete from outbox.backends where name = 'gone'");
    let mut keeper = stack.pg.client_as("keeper", "postgres");
    let mut writer = stack.pg.client_as("writer", "postgres");
    for number in ["0", "-1", "-2147483648", "2", "4", "1000", "2147483647"] {
        for role in [&mut keeper, &mut writer] {
            let insert =
                format!("insert into outbox.backends (name, number) overriding system value values ('evil', {number})");
            assert_eq!(Refused::of(role.simple_query(&insert)).code, "42501", "{insert}");
            let many = format!(
                "insert into outbox.backends (number, name) overriding system value select {number}, 'evil' \
                 on conflict (name) do update set host = 'evil'"
            );
            assert_eq!(Refused::of(role.simple_query(&many)).code, "42501", "{many}");
            let copied = copy(role, &format!("evil\t{number}\n"));
            assert_eq!(copied.code, "42501", "{number}: {copied:?}");
        }
        let said = Refused::of(keeper.simple_query(&format!(
            "insert into outbox.backends (name, number) values ('evil', {number})"
        )));
        assert_eq!(said.code, "428C9", "{said:?}");
        let said = Refused::of(keeper.simple_query(&format!("update outbox.backends set number = {number}")));
        assert_eq!(said.code, "428C9", "{said:?}");
    }
    let expected = Refused::new(
        "42501",
        "permission denied to choose the number of backend \"evil\"",
        "Events refer to backends, including deleted ones, by their numbers.",
        "Omit number: it comes from a sequence.",
    );
    let chosen = "insert into outbox.backends (name, number) overriding system value values ('evil', 7)";
    assert_eq!(Refused::of(keeper.simple_query(chosen)), expected);
    // Not even a superuser can set an impossible number.
    for number in ["0", "-1"] {
        let sql =
            format!("insert into outbox.backends (name, number) overriding system value values ('evil', {number})");
        assert_eq!(Refused::of(stack.pg.client().simple_query(&sql)).code, "23514", "{sql}");
    }
    // Drawn numbers ascend, also several in one statement; and a number that was used is not drawn again after the
    // sequence was set back.
    keeper
        .batch_execute(
            "insert into outbox.backends (name) select 'n' || n from generate_series(1, 3) n order by n desc",
        )
        .expect("granted");
    copy_names(&mut keeper, "m1\nm2\n");
    writer
        .batch_execute("select setval('outbox.backends_number_seq', 1, false)")
        .expect("it may write all sequences");
    keeper
        .batch_execute("insert into outbox.backends (name) values ('new')")
        .expect("granted");
    let given: Vec<i32> = stack
        .pg
        .one("select array_agg(number order by number) from outbox.backends");
    assert_eq!(given.len(), 8);
    assert!(
        !given.contains(&2),
        "the number of the deleted backend was given again: {given:?}"
    );
    open.batch_execute("commit").expect("commit");
    wait_until("the late event", || {
        stack.pg.one::<i64>("select count(*) from outbox.failed_events") == 1
    });
}

/// COPY of names and numbers.
fn copy(client: &mut Client, rows: &str) -> Refused {
    let mut writer = client
        .copy_in("copy outbox.backends (name, number) from stdin")
        .expect("granted");
    let written = writer.write_all(rows.as_bytes());
    assert!(written.is_ok());
    Refused::of(writer.finish())
}

fn copy_names(client: &mut Client, rows: &str) {
    let mut writer = client
        .copy_in("copy outbox.backends (name) from stdin")
        .expect("granted");
    writer.write_all(rows.as_bytes()).expect("rows");
    assert_eq!(writer.finish().expect("granted"), 2);
}

/// Every way to publish, with a `publisher_config` as SQL text.
fn all_ways(config: &str) -> Vec<String> {
    let quoted = config.replace('\'', "''");
    vec![
        format!("select outbox.publish_event('function', 's', publisher_config => '{quoted}')"),
        format!(
            "select outbox.publish_event('scheduled', 's', publisher_config => '{quoted}', scheduled_at => clock_timestamp() + interval '300 ms')"
        ),
        format!(
            "select * from outbox.publish_events(jsonb_build_array(jsonb_build_object('event_type', 'array', 'source', 's', 'publisher_config', '{quoted}'::jsonb)))"
        ),
        format!("insert into outbox.events (event_type, source, publisher_config) values ('insert', 's', '{quoted}')"),
    ]
}

fn copy_event(client: &mut Client, config: &str) -> Result<u64, postgres::Error> {
    let mut writer = client
        .copy_in("copy outbox.events (event_type, source, publisher_config) from stdin")
        .expect("granted");
    writer
        .write_all(format!("copy\ts\t{}\n", config.replace('\\', "\\\\")).as_bytes())
        .expect("a row");
    writer.finish()
}

/// Names that the JSON parser uses internally for numbers and raw values are ordinary names.
#[test]
fn a_json_object_is_refused_as_a_number() {
    let stack = Stack::start();
    stack
        .pg
        .exec("create role publisher login; select outbox.grant_publisher('publisher')");
    let mut publisher = stack.pg.client_as("publisher", "postgres");
    for value in [
        r#"{"$serde_json::private::Number": "1"}"#,
        r#"{"$serde_json::private::RawValue": "1"}"#,
        r#"{"$serde_json::private::RawValue": "{}"}"#,
        r#"{"\u0024serde_json::private::Number": "1"}"#,
        r#"{"$serde_json::private::Number": "1", "other": 2}"#,
    ] {
        let config = format!(r#"{{"k": {value}}}"#);
        let message = "publisher_config key \"k\" has a value that is not a string, number or boolean";
        let mut said: Vec<Refused> = all_ways(&config)
            .iter()
            .map(|sql| Refused::of(publisher.simple_query(sql)))
            .collect();
        said.push(Refused::of(copy_event(&mut publisher, &config)));
        for said in said {
            assert_eq!(
                (said.code.as_str(), said.message.as_str()),
                ("22023", message),
                "{config}: {said:?}"
            );
        }
    }
    // As a key of the config itself it is an ordinary name.
    for sql in all_ways(r#"{"$serde_json::private::Number": "1"}"#) {
        publisher
            .batch_execute(&sql)
            .unwrap_or_else(|error| panic!("{sql}: {error:?}"));
    }
    for entry in stack.wait_events(4) {
        assert_eq!(entry.field("$serde_json::private::Number"), "1");
    }
}

/// A number has the same digits in the stream in each way to publish, or is refused in all.
#[test]
fn all_ways_to_publish_keep_the_same_digits() {
    let stack = Stack::start();
    let numbers = [
        "1e400",
        "1E+2",
        "-0",
        "-0.00",
        "1.10",
        "1.5e-7",
        "0.005e4",
        "0e-3",
        "12.50e1",
        "123456789012345678901234567890",
        "1e-400",
        "-1.7976931348623157e308",
        "5e-324",
        "0.1e1",
        "100e-2",
    ];
    let config = format!(
        "{{{}}}",
        numbers
            .iter()
            .enumerate()
            .map(|(n, number)| format!("\"n{n}\": {number}"))
            .collect::<Vec<_>>()
            .join(", ")
    );
    let mut client = stack.pg.client();
    for sql in all_ways(&config) {
        client
            .batch_execute(&sql)
            .unwrap_or_else(|error| panic!("{sql}: {error:?}"));
    }
    copy_event(&mut client, &config).expect("a row");
    let entries = stack.wait_events(5);
    for (n, number) in numbers.iter().enumerate() {
        let expected: String = stack.pg.one(&format!("select '{number}'::jsonb::text"));
        for entry in &entries {
            assert_eq!(
                entry.field(&format!("n{n}")),
                expected,
                "{number} by {}",
                entry.field("event_type")
            );
        }
    }
    for number in ["1e131072", "1e-16384", "1e999999999999"] {
        let config = format!("{{\"n\": {number}}}");
        for sql in all_ways(&config) {
            assert_eq!(Refused::of(client.simple_query(&sql)).code, "22003", "{sql}");
        }
        assert_eq!(Refused::of(copy_event(&mut client, &config)).code, "22003", "{config}");
    }
    // Short to write, but larger than an event may be.
    let many: Vec<String> = (0..9).map(|n| format!("\"n{n}\": 1e131071")).collect();
    let config = format!("{{{}}}", many.join(", "));
    let mut codes: Vec<String> = all_ways(&config)
        .iter()
        .map(|sql| Refused::of(client.simple_query(sql)).code)
        .collect();
    codes.push(Refused::of(copy_event(&mut client, &config)).code);
    assert!(codes.iter().all(|code| code == "54000"), "{codes:?}");
}
