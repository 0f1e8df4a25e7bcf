//! For other code, publishing is an INSERT into outbox.events: everything that others have defined on the table applies
//! to it, in each way to publish.

use kit::{Refused, Stack, ids, types, wait_drained, wait_eq};
use postgres::Client;
use uuid::Uuid;

/// A log of the changes of a table, as tools that rebuild tables keep one: after each row, in every session, with its
/// owner's rights.
pub(crate) const LOG_TRIGGER: &str = "
    create table public.log (id bigserial, tg_op text, tg_when text, row_data jsonb, who text);
    create function public.note() returns trigger language plpgsql security definer as $$
    begin
        insert into public.log (tg_op, tg_when, row_data, who)
            values (tg_op, tg_when || ' ' || tg_level, case when tg_level = 'ROW' and tg_op <> 'DELETE' then to_jsonb(new) end, session_user);
        return null;
    end $$;
    create trigger repack_trigger after insert or update or delete on outbox.events
        for each row execute function public.note();
    alter table outbox.events enable always trigger repack_trigger;";

/// The same event in all ways that publish at once; each returns SQL.
pub(crate) fn ways(event_type: &str) -> [String; 4] {
    [
        format!("select outbox.publish_event('{event_type}', 's', '{{\"a\": 1}}')"),
        format!(
            "select outbox.publish_events('[{{\"event_type\": \"{event_type}\", \"source\": \"s\", \"data\": {{\"a\": 1}}}}]')"
        ),
        format!("insert into outbox.events (event_type, source, data) values ('{event_type}', 's', '{{\"a\": 1}}')"),
        format!("select * from outbox.publish_events('[{{\"event_type\": \"{event_type}\", \"source\": \"s\"}}]')"),
    ]
}

fn publisher(stack: &Stack) -> Client {
    stack
        .pg
        .exec("create role app login; select outbox.grant_publisher('app'); grant usage on schema public to app");
    stack.pg.client_as("app", "postgres")
}

#[test]
fn a_log_trigger_sees_every_row_whoever_inserts_it() {
    let stack = Stack::start();
    stack.pg.exec(LOG_TRIGGER);
    let mut app = publisher(&stack);
    for sql in ways("t") {
        app.batch_execute(&sql).unwrap();
    }
    app.batch_execute("select outbox.publish_event('due', 's', scheduled_at => now() + interval '0.3 s')")
        .unwrap();
    let entries = stack.wait_events(5);
    assert_eq!(types(&entries), ["t", "t", "t", "t", "due"]);
    let logged: Vec<Uuid> = stack
        .pg
        .client()
        .query(
            "select (row_data ->> 'event_id')::uuid from public.log where tg_op = 'INSERT' order by id",
            &[],
        )
        .unwrap()
        .iter()
        .map(|row| row.get(0))
        .collect();
    assert_eq!(logged, ids(&entries));
    // The logged row is the row in the table.
    let differing: i64 = stack.pg.one(
        "select count(*) from public.log l join outbox.events e on e.seq = (l.row_data ->> 'seq')::bigint
         where to_jsonb(e) is distinct from l.row_data",
    );
    assert_eq!(differing, 0);
    // Deleted rows are logged, too.
    wait_drained(&stack.pg, "default");
    stack.pg.set("outbox_relay.published_retention", "0");
    wait_eq("deletes in the log", 5i64, || {
        stack.pg.one("select count(*) from public.log where tg_op = 'DELETE'")
    });
}

#[test]
fn triggers_of_others_fire_in_their_order_and_as_the_caller() {
    let stack = Stack::start();
    stack.pg.exec(
        "create table public.fired (id bigserial, name text, who text, event_id uuid, new_rows int);
         grant insert on public.fired to public; grant usage on sequence public.fired_id_seq to public;
         create function public.note() returns trigger language plpgsql as $$
         begin
             insert into public.fired (name, who, event_id)
                 values (tg_name, current_user, case when tg_level = 'ROW' then new.event_id end);
             return new;
         end $$;
         create function public.note_rows() returns trigger language plpgsql as $$
         begin
             insert into public.fired (name, who, new_rows) select tg_name, current_user, count(*) from new_rows;
             return null;
         end $$;
         create trigger a_before before insert on outbox.events for each row execute function public.note();
         create trigger z_before before insert on outbox.events for each row when (new.event_type <> 'skip') execute function public.note();
         create trigger after_row after insert on outbox.events for each row execute function public.note();
         create trigger before_all before insert on outbox.events for each statement execute function public.note();
         create trigger after_all after insert on outbox.events referencing new table as new_rows
             for each statement execute function public.note_rows();
         create trigger on_scheduled after insert on outbox.scheduled_events for each row execute function public.note();
         create trigger disabled after insert on outbox.events for each row execute function public.note();
         alter table outbox.events disable trigger disabled;
         create trigger replica after insert on outbox.events for each row execute function public.note();
         alter table outbox.events enable replica trigger replica;",
    );
    let mut app = publisher(&stack);
    let fired = |app: &mut Client, sql: &str| -> Vec<String> {
        stack.pg.exec("truncate public.fired");
        app.batch_execute(sql).unwrap();
        let rows = stack
            .pg
            .client()
            .query(
                "select name || ' ' || who || coalesce(' ' || new_rows, '') from public.fired order by id",
                &[],
            )
            .unwrap();
        rows.iter().map(|row| row.get(0)).collect()
    };
    let expected = [
        "before_all app",
        "a_before app",
        "z_before app",
        "after_row app",
        "after_all app 1",
    ];
    for sql in ways("t") {
        assert_eq!(fired(&mut app, &sql), expected, "{sql}");
    }
    assert_eq!(
        fired(&mut app, "select outbox.publish_event('skip', 's')"),
        ["before_all app", "a_before app", "after_row app", "after_all app 1"]
    );
    assert_eq!(
        fired(
            &mut app,
            "select outbox.publish_event('t', 's', scheduled_at => now() + interval '1 hour')"
        ),
        ["on_scheduled app"]
    );
    let replica = "set session_replication_role = replica; ";
    for sql in ways("t") {
        let mut client = stack.pg.client();
        let who: String = stack.pg.one("select current_user::text");
        assert_eq!(
            fired(&mut client, &format!("{replica}{sql}")),
            [format!("replica {who}")],
            "{sql}"
        );
    }
    assert_eq!(stack.wait_events(9).len(), 9);
}

#[test]
fn a_trigger_may_skip_a_row_and_change_the_publishers_columns() {
    let stack = Stack::start();
    stack.pg.exec(
        "create function public.shape() returns trigger language plpgsql as $$
         begin
             if new.event_type = 'out' then return null; end if;
             new.source := new.source || '+';
             return new;
         end $$;
         create trigger a_shape before insert on outbox.events for each row execute function public.shape();
         create trigger z_shape before insert on outbox.events for each row execute function public.shape();",
    );
    let mut app = publisher(&stack);
    let id: Option<Uuid> = app
        .query_one("select outbox.publish_event('out', 's')", &[])
        .unwrap()
        .get(0);
    assert_eq!(id, None);
    let list = "select e from outbox.publish_events('[{\"event_type\": \"a\", \"source\": \"s\"}, \
                {\"event_type\": \"out\", \"source\": \"s\"}, {\"event_type\": \"b\", \"source\": \"s\"}]') e";
    let rows = app.query(list, &[]).unwrap();
    let returned: Vec<Option<Uuid>> = rows.iter().map(|row| row.get(0)).collect();
    assert_eq!((returned.len(), returned[1]), (3, None));
    assert_eq!(
        app.execute(
            "insert into outbox.events (event_type, source) values ('out', 's')",
            &[]
        )
        .unwrap(),
        0
    );
    app.batch_execute("insert into outbox.events (event_type, source) values ('c', 's')")
        .unwrap();
    let entries = stack.wait_events(3);
    assert_eq!(types(&entries), ["a", "b", "c"]);
    assert!(entries.iter().all(|e| e.field("source") == "s++"), "{entries:?}");
    assert_eq!(ids(&entries)[..2], [returned[0].unwrap(), returned[2].unwrap()]);
}

/// In each way, before and after the extension's own trigger.
#[test]
fn a_trigger_that_changes_our_numbers_is_refused() {
    let stack = Stack::start();
    stack.pg.exec(
        "create function public.forge() returns trigger language plpgsql as $$
         begin
             case new.event_type
                 when 'seq' then new.seq := -5;
                 when 'xid' then new.xid := '3';
                 when 'backend_number' then new.backend_number := 77;
                 when 'event_id' then new.event_id := gen_random_uuid();
                 when 'source' then new.source := '';
                 else
             end case;
             return new;
         end $$;",
    );
    for name in ["z_forge", "a_forge"] {
        stack.pg.exec(&format!(
            "drop trigger if exists z_forge on outbox.events;
             create trigger {name} before insert on outbox.events for each row execute function public.forge()"
        ));
        let mut client = stack.pg.client();
        for field in ["seq", "xid", "backend_number", "event_id", "source"] {
            for (way, sql) in ways(field).iter().enumerate() {
                let outcome = client.simple_query(sql);
                // A plain INSERT may give these columns before the extension's trigger fills them in; the given values
                // are ignored.
                if name == "a_forge" && way == 2 && field != "source" {
                    assert!(outcome.is_ok(), "{sql}: {outcome:?}");
                    continue;
                }
                let refused = Refused::of(outcome);
                let expected = if field == "source" { "22023" } else { "27000" };
                assert_eq!(refused.code, expected, "{name} {sql}: {refused:?}");
                assert!(refused.detail.is_some() && refused.hint.is_some(), "{refused:?}");
            }
        }
    }
    stack.publish("good");
    let published = stack.wait_events(5);
    assert_eq!(types(&published), ["seq", "xid", "backend_number", "event_id", "good"]);
    let wrong: i64 = stack
        .pg
        .one("select count(*) from outbox.events where seq < 1 or backend_number <> 1");
    assert_eq!(wrong, 0);
}

/// Also with all fields of a Postgres error.
#[test]
fn errors_of_others_come_through_whole() {
    let stack = Stack::start();
    stack.pg.exec(
        "alter table outbox.events add constraint no_shouting check (event_type = lower(event_type));
         create function public.object() returns trigger language plpgsql as $$
         begin
             raise exception using errcode = 'ZX001', message = 'not this', detail = 'd', hint = 'h', constraint = 'c',
                 schema = 's', table = 't', column = 'k', datatype = 'y';
         end $$;
         create trigger object before insert on outbox.events for each row when (new.event_type = 'object')
             execute function public.object();",
    );
    let mut client = stack.pg.client();
    let mut error = |sql: &str| {
        let error = client.simple_query(sql).expect_err("refused");
        let error = error.as_db_error().expect("by the server");
        let fields = [
            error.constraint(),
            error.schema(),
            error.table(),
            error.column(),
            error.datatype(),
            error.detail(),
            error.hint(),
        ];
        let fields = fields.map(|field| field.map(str::to_owned));
        (
            error.code().code().to_owned(),
            error.message().to_owned(),
            fields,
            error.where_().map(str::to_owned),
        )
    };
    let id = Uuid::new_v4();
    let plain = |event_type: &str| {
        format!("insert into outbox.events (event_type, source, event_id) values ('{event_type}', 's', '{id}')")
    };
    let published = |event_type: &str| format!("select outbox.publish_event('{event_type}', 's', event_id => '{id}')");
    for event_type in ["LOUD", "object"] {
        let (code, message, fields, context) = error(&plain(event_type));
        let theirs = error(&published(event_type));
        assert_eq!((&theirs.0, &theirs.1), (&code, &message));
        // The detail of a CHECK shows the row, whose numbers differ.
        assert_eq!(theirs.2[..5], fields[..5]);
        assert_eq!(theirs.3, context);
    }
    assert_eq!(error(&published("object")).2[5], Some("d".into()));
    stack.pg.exec(&plain("quiet"));
    let theirs = error(&published("quiet"));
    assert_eq!(
        (theirs.0.as_str(), theirs.2[0].as_deref()),
        ("23505", Some("events_event_id_idx"))
    );
    stack
        .pg
        .exec("alter table outbox.events drop constraint no_shouting; drop trigger object on outbox.events");
    let theirs = error(&published("quiet"));
    assert_eq!(
        (theirs.0.as_str(), theirs.2[0].as_deref()),
        ("23505", Some("events_event_id_idx"))
    );
}

#[test]
fn constraints_generated_columns_and_defaults_hold() {
    let stack = Stack::start();
    stack.pg.exec(
        "create domain public.even as int check (value % 2 = 0);
         create table public.kinds (name text primary key); insert into public.kinds values ('order'), ('other');
         alter table outbox.events
             add column kind text generated always as (split_part(event_type, '.', 1)) stored,
             add column added_at timestamptz not null default clock_timestamp(),
             add column n public.even default 2,
             add column numbered bigint generated by default as identity,
             add constraint not_long check (length(source) < 10),
             add constraint known_kind foreign key (kind) references public.kinds,
             add constraint once unique (subject) deferrable initially deferred;
         alter table outbox.scheduled_events add constraint soon check (scheduled_at < '2999-01-01');",
    );
    let mut app = publisher(&stack);
    stack.pg.exec("grant select on public.kinds to app");
    for sql in ways("order.made") {
        app.batch_execute(&sql).unwrap();
    }
    let shown: i64 = stack
        .pg
        .one("select count(*) from outbox.events where kind = 'order' and added_at is not null and n = 2 and numbered between 1 and 4");
    assert_eq!(shown, 4);
    let mut code = |sql: &str| Refused::of(app.simple_query(sql)).code;
    for sql in ways("nowhere.made") {
        assert_eq!(code(&sql), "23503", "{sql}");
    }
    assert_eq!(
        code("select outbox.publish_event('order.made', 'a long source')"),
        "23514"
    );
    let twice = "begin; select outbox.publish_event('order.a', 's', subject => 'x');
                 select outbox.publish_event('order.b', 's', subject => 'x'); commit";
    assert_eq!(code(twice), "23505");
    app.batch_execute("rollback").unwrap();
    assert_eq!(
        Refused::of(app.simple_query("select outbox.publish_event('order.a', 's', scheduled_at => '3000-01-01')")).code,
        "23514"
    );
    stack.pg.exec("alter table outbox.events alter column n set default 3");
    assert_eq!(
        Refused::of(app.simple_query("select outbox.publish_event('order.a', 's')")).code,
        "23514"
    );
    // TRUNCATE would remove events that are not sent yet.
    stack.wait_events(4);
    stack.pg.exec(
        "alter table outbox.events drop column kind, drop column added_at, drop column n, drop column numbered,
             drop constraint not_long; truncate outbox.events;
             alter table outbox.events alter column subject set not null",
    );
    assert_eq!(
        Refused::of(app.simple_query("select outbox.publish_event('order.a', 's')")).code,
        "23502"
    );
    app.batch_execute("select outbox.publish_event('order.z', 's', subject => 'z')")
        .unwrap();
    assert_eq!(types(&stack.wait_events(5))[4], "order.z");
}

#[test]
fn policies_hold_for_the_caller() {
    let stack = Stack::start();
    let mut app = publisher(&stack);
    stack.pg.exec(
        "create table public.allowed (who name, source text);
         insert into public.allowed values ('app', 'mine'); grant select on public.allowed to app;
         alter table outbox.events enable row level security;
         create policy by_source on outbox.events for insert with check (
             exists (select from public.allowed a where a.who = current_user and a.source = events.source));",
    );
    for sql in ways("t") {
        app.batch_execute(&sql.replace("'s'", "'mine'").replace("\"s\"", "\"mine\""))
            .unwrap();
        let refused = Refused::of(app.simple_query(&sql));
        assert_eq!(
            (refused.code.as_str(), refused.message.as_str()),
            (
                "42501",
                "new row violates row-level security policy for table \"events\""
            )
        );
    }
    // Roles that bypass policies bypass them here, too.
    stack.publish("owner");
    assert_eq!(types(&stack.wait_events(5)), ["t", "t", "t", "t", "owner"]);
}

#[test]
fn publishing_needs_only_execute_whatever_triggers_the_table_has() {
    let stack = Stack::start();
    stack.pg.exec(LOG_TRIGGER);
    stack.pg.exec(
        "create role only_calls login; grant usage on schema outbox to only_calls;
         grant execute on all functions in schema outbox to only_calls;",
    );
    let mut client = stack.pg.client_as("only_calls", "postgres");
    let [one, list, insert, _] = ways("t");
    client.batch_execute(&one).unwrap();
    client.batch_execute(&list).unwrap();
    assert_eq!(Refused::of(client.simple_query(&insert)).code, "42501");
    assert_eq!(stack.wait_events(2).len(), 2);
    assert_eq!(
        stack
            .pg
            .one::<i64>("select count(*) from public.log where who = 'only_calls'"),
        2
    );
}

/// Events that a trigger publishes, also while it publishes.
#[test]
fn triggers_may_publish() {
    let stack = Stack::start();
    stack.pg.exec(
        "create function public.echo() returns trigger language plpgsql as $$
         begin
             if new.event_type not like 'echo%' then
                 perform outbox.publish_event('echo.' || tg_name, 's');
                 insert into outbox.events (event_type, source) values ('echo.plain', 's');
             end if;
             return new;
         end $$;
         create trigger a before insert on outbox.events for each row execute function public.echo();
         create trigger z before insert on outbox.events for each row execute function public.echo();
         create trigger after after insert on outbox.events for each row execute function public.echo();",
    );
    let mut client = stack.pg.client();
    client.batch_execute(&ways("t")[0]).unwrap();
    client.batch_execute(&ways("t")[2]).unwrap();
    let entries = stack.wait_events(14);
    let mut counted: Vec<(&str, usize)> = Vec::new();
    for name in ["echo.a", "echo.after", "echo.plain", "echo.z", "t"] {
        counted.push((name, types(&entries).iter().filter(|t| **t == name).count()));
    }
    assert_eq!(
        counted,
        [
            ("echo.a", 2),
            ("echo.after", 2),
            ("echo.plain", 6),
            ("echo.z", 2),
            ("t", 2)
        ]
    );
}

#[test]
fn rules_on_the_table_apply_too() {
    let stack = Stack::start();
    stack.pg.exec(
        "create table public.copied (event_type text);
         create rule copy as on insert to outbox.events where new.source <> 's' do also
             insert into public.copied values (new.event_type);",
    );
    let mut app = publisher(&stack);
    app.batch_execute("select outbox.publish_event('t', 'other'); select outbox.publish_event('u', 's')")
        .unwrap();
    assert_eq!(
        stack
            .pg
            .one::<String>("select string_agg(event_type, ' ') from public.copied"),
        "t"
    );
    assert_eq!(types(&stack.wait_events(2)), ["t", "u"]);
    stack
        .pg
        .exec("create or replace rule copy as on insert to outbox.events do also notify heard");
    assert_eq!(
        Refused::of(app.simple_query("select outbox.publish_event('t', 's')")).code,
        "0A000"
    );
    stack
        .pg
        .exec("create or replace rule copy as on insert to outbox.events do instead nothing");
    let id: Option<Uuid> = app
        .query_one("select outbox.publish_event('t', 's')", &[])
        .unwrap()
        .get(0);
    assert_eq!(id, None);
}
