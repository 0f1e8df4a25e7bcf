//! RETURNING and ON CONFLICT, as ORMs write them, by a role that may only publish.

use kit::{Postgres, Refused, Stack, types};
use postgres::Client;
use uuid::Uuid;

const KNOWN: &str = "11111111-1111-1111-1111-111111111111";
const INSERT: &str = "insert into outbox.events (event_type, source) values ('t', 's')";

/// With an event of another role, with a known id.
fn start() -> (Stack, Client) {
    let stack = Stack::start();
    stack.pg.exec(&format!(
        "create role publisher login; select outbox.grant_publisher('publisher');
        select outbox.publish_event('secret.type', 'secret-source', '{{\"secret\": 1}}', event_id => '{KNOWN}');"
    ));
    let publisher = stack.pg.client_as("publisher", "postgres");
    (stack, publisher)
}

#[test]
fn a_publisher_is_returned_what_it_gave() {
    let (stack, mut publisher) = start();
    let mut ids = Vec::new();
    for sql in [
        format!("{INSERT} returning event_id"),
        format!("{INSERT} returning events.event_id as id"),
        "insert into outbox.events as e (event_type, source) values ('t', 's') returning e.event_id".to_owned(),
        format!("{INSERT} on conflict do nothing returning event_id"),
        format!("{INSERT} on conflict (event_id) do nothing returning event_id"),
        "insert into outbox.events (event_type, source) values ('t', 's') returning event_id, event_type, source, backend, data, subject, stream, \
         data_schema, publisher_config, max_retries"
            .to_owned(),
        format!("with new as ({INSERT} returning event_id) select event_id from new"),
        format!("with a as ({INSERT} on conflict (event_id) do nothing), new as ({INSERT} returning event_id) select event_id from new"),
    ] {
        // Both protocols, and a plan that is kept.
        let id: Uuid = publisher
            .query_one(&sql, &[])
            .unwrap_or_else(|error| panic!("{sql}: {error:?}"))
            .get(0);
        ids.push(id);
        publisher.simple_query(&sql).unwrap();
        publisher.batch_execute(&format!("prepare p as {sql}")).unwrap();
        for _ in 0..7 {
            publisher.batch_execute("execute p").unwrap();
        }
        publisher.batch_execute("deallocate p").unwrap();
    }
    assert_eq!(stack.wait_events(1 + 9 * 9).len(), 82);
    let returned: i64 = {
        let row = stack
            .pg
            .client()
            .query_one("select count(*) from outbox.events where event_id = any($1)", &[&ids])
            .unwrap();
        row.get(0)
    };
    assert_eq!(returned, 8);
    // Several rows, within a function, and by COPY.
    let rows = publisher
        .query("insert into outbox.events (event_type, source) select 'row.' || i, 's' from generate_series(1, 3) i returning event_type", &[])
        .unwrap();
    assert_eq!(
        rows.iter().map(|row| row.get(0)).collect::<Vec<String>>(),
        ["row.1", "row.2", "row.3"]
    );
    publisher
        .batch_execute(
            "do $$ declare id uuid; begin
                insert into outbox.events (event_type, source) values ('do', 's') returning event_id into strict id;
                if id is null then raise exception 'no id'; end if;
            end $$;
            explain (analyze) insert into outbox.events (event_type, source) values ('explained', 's') returning event_id",
        )
        .unwrap();
    let mut copied = publisher
        .copy_out(&format!("copy ({INSERT} returning event_type) to stdout"))
        .unwrap();
    let mut text = String::new();
    std::io::Read::read_to_string(&mut copied, &mut text).unwrap();
    assert_eq!(text, "t\n");
}

#[test]
fn a_repeated_id_may_do_nothing() {
    let (stack, mut publisher) = start();
    let waiting = Uuid::new_v4();
    publisher
        .query(
            "select outbox.publish_event('t', 's', event_id => $1, scheduled_at => now() + interval '1 hour')",
            &[&waiting],
        )
        .unwrap();
    for id in [KNOWN.to_owned(), waiting.to_string()] {
        let insert = format!("insert into outbox.events (event_type, source, event_id) values ('t', 's', '{id}')");
        for clause in [
            "on conflict do nothing",
            "on conflict (event_id) do nothing",
            "on conflict (event_id) do nothing returning event_id",
            // As Rails writes it, which finds no unique index on event_id alone.
            "on conflict (event_id, branch) do nothing returning event_id",
        ] {
            assert_eq!(
                publisher.query(&format!("{insert} {clause}"), &[]).unwrap().len(),
                0,
                "{id} {clause}"
            );
        }
    }
    let fresh = Uuid::new_v4();
    let sql = "insert into outbox.events (event_type, source, event_id) values ('once', 's', $1) on conflict (event_id) do nothing";
    assert_eq!(publisher.execute(sql, &[&fresh]).unwrap(), 1);
    assert_eq!(publisher.execute(sql, &[&fresh]).unwrap(), 0);
    assert_eq!(types(&stack.wait_events(2)), ["secret.type", "once"]);
}

/// Everything else is refused; statements that an ORM is likely to try get a clear error.
#[test]
fn nothing_of_others_is_read() {
    let (stack, mut publisher) = start();
    let words = |what: &str| {
        Refused::new(
            "42501",
            "permission denied for table events",
            &format!("The statement reads columns that a publisher may not read: {what}."),
            "Name columns that publishers fill in, such as RETURNING event_id, or call outbox.publish_event(), which returns the id.",
        )
    };
    for (sql, expected) in [
        (
            format!("{INSERT} returning *"),
            words("seq, xid, created_at, backend_number, published_by"),
        ),
        (format!("{INSERT} returning event_id, seq"), words("seq")),
        (format!("{INSERT} returning events"), words("the whole row")),
        (format!("{INSERT} returning ctid"), words("ctid")),
        (
            format!("{INSERT} on conflict (seq) do nothing returning event_id"),
            words("seq"),
        ),
        (
            format!("{INSERT} on conflict on constraint events_pkey do nothing"),
            words("seq"),
        ),
        (
            format!("{INSERT} on conflict (event_id) do update set source = excluded.source returning event_id"),
            Refused::new(
                "42501",
                "permission denied for table events",
                "ON CONFLICT DO UPDATE would change an event, but events never change.",
                "Use ON CONFLICT (event_id) DO NOTHING.",
            ),
        ),
    ] {
        assert_eq!(Refused::of(publisher.simple_query(&sql)), expected, "{sql}");
        let within = format!("with new as ({sql}) select 1");
        assert_eq!(Refused::of(publisher.simple_query(&within)), expected, "{within}");
    }
    let plain = Refused::new("42501", "permission denied for table events", "", "");
    for sql in [
        &format!("{INSERT} returning event_id, (select count(*) from outbox.events)"),
        &format!("{INSERT} returning (select event_id from outbox.events limit 1)"),
        "select exists (select from outbox.events)",
    ] {
        assert_eq!(Refused::of(publisher.simple_query(sql)), plain, "{sql}");
    }
    // No other role gains by it.
    stack
        .pg
        .exec("create role nobody login; grant usage on schema outbox to nobody");
    let mut nobody = stack.pg.client_as("nobody", "postgres");
    for clause in [
        "returning event_id",
        "returning seq",
        "on conflict (event_id) do nothing",
    ] {
        assert_eq!(Refused::of(nobody.simple_query(&format!("{INSERT} {clause}"))), plain);
    }
    assert_eq!(types(&stack.wait_events(1)), ["secret.type"]);
}

/// Statements of an ORM that looks for a row first, saves one again, or uses all columns of the table.
#[test]
fn a_statement_that_a_publisher_may_not_run_gets_a_clear_error() {
    let (stack, mut publisher) = start();
    let words = |detail: &str, hint: &str| Refused::new("42501", "permission denied for table events", detail, hint);
    let reading = words(
        "A publisher can insert events, but not read them.",
        "Publish without reading first: with outbox.publish_event(), or with INSERT ... ON CONFLICT (event_id) DO NOTHING. \
         outbox.published_here() shows what this transaction has published.",
    );
    let changing = words(
        "Events are never changed.",
        "Publish another event. If an ORM's save() updates because the row has a key, have it insert; INSERT ... ON CONFLICT \
         (event_id) DO NOTHING publishes once.",
    );
    let deleting = words(
        "A publisher cannot delete events. They are deleted when their retention ends.",
        "Set outbox_relay.published_retention instead.",
    );
    let filling_in = |columns: &str| {
        words(
            &format!("A publisher cannot fill in: {columns}."),
            "Name only the other columns, and leave these out of an ORM's model: the server fills them in.",
        )
    };
    for (sql, expected) in [
        ("select event_id from outbox.events", &reading),
        ("select event_id from outbox.events for update", &reading),
        ("select event_id from outbox.events for share", &reading),
        ("select count(*) from outbox.events", &reading),
        (
            "select * from outbox.events where event_id = gen_random_uuid() limit 21",
            &reading,
        ),
        ("select event_id from (select event_id from outbox.events) e", &reading),
        (
            "insert into outbox.events (event_type, source) select event_type, 's' from outbox.events returning event_id",
            &reading,
        ),
        (
            "insert into outbox.events (event_type, source) select event_id::text, 's' from outbox.events on conflict (event_id) do nothing",
            &reading,
        ),
        (
            "select 1 as one from outbox.events e join (select 1) s on true",
            &reading,
        ),
        ("copy (select event_id from outbox.events) to stdout", &reading),
        ("copy outbox.events to stdout", &reading),
        (
            "copy outbox.events from stdin",
            &filling_in("seq, xid, created_at, backend_number, published_by, branch"),
        ),
        (
            "copy outbox.events (event_type, source, created_at) from stdin",
            &filling_in("created_at"),
        ),
        ("declare c cursor for select event_id from outbox.events", &reading),
        (
            &format!("with new as ({INSERT} returning event_id) select e.source from outbox.events e, new"),
            &reading,
        ),
        ("update outbox.events set source = 'x' returning event_id", &changing),
        (
            "update outbox.events set source = 'x' where event_id = gen_random_uuid()",
            &changing,
        ),
        ("delete from outbox.events returning event_id", &deleting),
        (
            "delete from outbox.events where event_id = gen_random_uuid()",
            &deleting,
        ),
        (
            "merge into outbox.events e using (select 1) s on e.event_id is not null when not matched then insert (event_type, source) values ('t', 's')",
            &reading,
        ),
        (
            "merge into outbox.events e using (select 1) s on true when matched and e.source > '' then do nothing",
            &reading,
        ),
        (
            "insert into outbox.events (event_type, source, seq) values ('t', 's', 1)",
            &filling_in("seq"),
        ),
        (
            "insert into outbox.events (event_type, source, seq) values ('t', 's', 1) returning event_id",
            &filling_in("seq"),
        ),
        (
            "insert into outbox.events (created_at, event_type, source, xid, branch) values (default, 't', 's', default, 0)",
            &filling_in("xid, created_at, branch"),
        ),
        (
            "insert into outbox.events values (default, default, now(), gen_random_uuid())",
            &filling_in("seq, xid, created_at"),
        ),
    ] {
        for sql in [sql.to_owned(), format!("explain {sql}")] {
            if sql.starts_with("explain copy") || sql.starts_with("explain declare") {
                continue;
            }
            let sql = if sql.starts_with("declare") {
                format!("begin; {sql}")
            } else {
                sql
            };
            assert_eq!(Refused::of(publisher.simple_query(&sql)), *expected, "{sql}");
            publisher.batch_execute("rollback").unwrap();
        }
    }
    // A driver prepares this to learn the columns before a COPY: nothing is read.
    publisher
        .prepare("select event_id, event_type from outbox.events limit 1")
        .unwrap();
    // A view is read with its owner's rights.
    stack
        .pg
        .exec("create view types as select event_type from outbox.events; grant select on types to publisher");
    assert_eq!(publisher.query("select * from types", &[]).unwrap().len(), 1);
    // One with the caller's rights takes RETURNING as the table does, and is in nobody's way.
    stack.pg.exec(
        "create view own_rights with (security_invoker) as select event_id, event_type, source from outbox.events;
        grant select, insert on own_rights to publisher",
    );
    let insert = "insert into own_rights (event_type, source) values ('by.view', 's') returning event_id";
    publisher.query_one(insert, &[]).unwrap();
    assert_eq!(Refused::of(publisher.simple_query("select * from own_rights")), reading);
    // Who was granted a column reads it.
    stack.pg.exec("grant select (event_type) on outbox.events to publisher");
    assert_eq!(
        publisher
            .query("select event_type from outbox.events", &[])
            .unwrap()
            .len(),
        2
    );
    let other_column = Refused::of(publisher.simple_query("select source from outbox.events"));
    assert_eq!(other_column, words("", ""));
    // A role that may not publish gets the error of Postgres.
    stack
        .pg
        .exec("create role nobody login; grant usage on schema outbox to nobody");
    let mut nobody = stack.pg.client_as("nobody", "postgres");
    assert_eq!(
        Refused::of(nobody.simple_query("select event_id from outbox.events")),
        words("", "")
    );
}

/// Roles that may read are not restricted by it, and policies of the table's owner apply.
#[test]
fn rights_that_were_granted_and_policies_hold() {
    let (stack, mut publisher) = start();
    stack.pg.exec("grant select (seq) on outbox.events to publisher");
    publisher.query_one(&format!("{INSERT} returning seq"), &[]).unwrap();
    stack.pg.exec("revoke select (seq) on outbox.events from publisher");
    assert_eq!(
        Refused::of(publisher.query_one(&format!("{INSERT} returning seq"), &[])).code,
        "42501"
    );
    stack
        .pg
        .client()
        .query_one(&format!("{INSERT} returning *"), &[])
        .unwrap();
    stack.pg.exec(
        "alter table outbox.events enable row level security;
        create policy publish on outbox.events for insert with check (true)",
    );
    publisher.batch_execute(INSERT).unwrap();
    assert_eq!(
        Refused::of(publisher.simple_query(&format!("{INSERT} returning event_id"))).code,
        "42501"
    );
}

/// Tables of the same name that do not belong to the extension.
#[test]
fn tables_of_others_are_not_touched() {
    let (stack, _) = start();
    stack
        .pg
        .exec("create schema other; create table other.events (event_id uuid default gen_random_uuid(), source text)");
    stack
        .pg
        .exec("grant usage on schema other to publisher; grant insert on other.events to publisher");
    let mut publisher = stack.pg.client_as("publisher", "postgres");
    let insert = "insert into other.events (source) values ('s') returning event_id";
    let plain = Refused::new("42501", "permission denied for table events", "", "");
    assert_eq!(Refused::of(publisher.simple_query(insert)), plain);
    // Without the extension.
    stack.pg.exec("create database without");
    stack.pg.exec_db(
        "without",
        "create schema outbox; create table outbox.events (event_id uuid default gen_random_uuid(), source text);
        grant usage on schema outbox to publisher; grant insert on outbox.events to publisher",
    );
    let mut elsewhere = stack.pg.client_as("publisher", "without");
    let insert = "insert into outbox.events (source) values ('s') returning event_id";
    assert_eq!(Refused::of(elsewhere.simple_query(insert)), plain);
}

/// The library is loaded while a session's first statement is being planned.
#[test]
fn without_the_library_preloaded_the_first_statement_of_a_session_may_be_any_of_these() {
    let pg = Postgres::with(&[("shared_preload_libraries", "")]).start();
    pg.extension();
    pg.exec(&format!(
        "create role publisher login; select outbox.grant_publisher('publisher');
        select outbox.publish_event('t', 's', event_id => '{KNOWN}');
        create function standard() returns void security definer begin atomic
            insert into outbox.events (event_type, source, event_id) values ('t', 's', '{KNOWN}') on conflict (event_id) do nothing; end;
        create view of_events as select event_id, event_type, source from outbox.events; grant insert, select on of_events to publisher"
    ));
    let insert = "insert into outbox.events (event_type, source, event_id)";
    let repeated = format!("{insert} values ('t', 's', '{KNOWN}')");
    for (first, rows) in [
        (format!("{INSERT} returning event_id"), 1),
        (format!("{repeated} on conflict do nothing"), 0),
        (format!("{repeated} on conflict (event_id) do nothing"), 0),
        (
            format!("{repeated} on conflict (event_id) do nothing returning event_id"),
            0,
        ),
        (
            format!(
                "{insert} values ('t', 's', gen_random_uuid()) on conflict (event_id) do nothing returning event_id"
            ),
            1,
        ),
        (
            format!(
                "{insert} values ('t', 's', gen_random_uuid()), ('t', 's', '{KNOWN}') on conflict (event_id) do nothing returning event_id"
            ),
            1,
        ),
        (
            format!(
                "{insert} select 't', 's', gen_random_uuid() from generate_series(1, 3) on conflict (event_id) do nothing returning event_id"
            ),
            3,
        ),
        (
            format!("with e as ({INSERT} on conflict (event_id) do nothing returning event_id) select event_id from e"),
            1,
        ),
        (
            format!("do $$ begin {repeated} on conflict (event_id) do nothing; end $$"),
            0,
        ),
        (
            format!("explain analyze {repeated} on conflict (event_id) do nothing"),
            0,
        ),
        ("select standard()".to_owned(), 1),
        (
            format!(
                "insert into of_events (event_type, source, event_id) values ('t', 's', '{KNOWN}') on conflict (event_id) do nothing returning event_id"
            ),
            0,
        ),
    ] {
        for simple in [false, true] {
            let mut session = pg.client_as("publisher", "postgres");
            let fails = |error: postgres::Error| -> usize { panic!("{first}: {error:?}") };
            let found = match simple {
                false => session.query(&first, &[]).map_or_else(fails, |found| found.len()),
                true => session.simple_query(&first).map_or_else(fails, |_| rows),
            };
            assert!(found == rows || first.starts_with("explain"), "{first}: {found}");
        }
    }
    assert_eq!(
        pg.one::<i64>(
            "select count(*) from outbox.events where event_id = '{KNOWN}'"
                .replace("{KNOWN}", KNOWN)
                .as_str()
        ),
        1
    );
    // What is refused is refused in the same words.
    for (first, detail) in [
        (
            format!("{INSERT} returning seq"),
            "The statement reads columns that a publisher may not read: seq.",
        ),
        (
            format!("{repeated} on conflict (event_id) do update set source = 'x'"),
            "ON CONFLICT DO UPDATE would change an event, but events never change.",
        ),
    ] {
        let refused = Refused::of(pg.client_as("publisher", "postgres").simple_query(&first));
        assert_eq!(
            (refused.code.as_str(), refused.detail.as_deref()),
            ("42501", Some(detail)),
            "{first}"
        );
    }
    let mut scheduler = pg.client();
    let sql = format!(
        "insert into outbox.scheduled_events (event_type, source, event_id, scheduled_at) values ('t', 's', '{KNOWN}', '2100-01-01') on conflict (event_id) do nothing"
    );
    assert_eq!(scheduler.execute(&sql, &[]).expect("left out"), 0);
}
