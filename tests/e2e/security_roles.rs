//! Roles that have some privileges of administrators, but are no superusers: they neither read events nor lose them.

use kit::env::postgres_major;
use kit::{Refused, Stack, ids, publish_many, types, wait_drained, wait_until};

/// Statements that each of these roles is refused, whatever else it may do.
const REFUSED: &[&str] = &[
    "select * from outbox.events",
    "select * from outbox.failed_events",
    "copy outbox.events to stdout",
    "select * from outbox.backends",
    "select * from outbox.backend_passwords",
    "select umoptions from pg_user_mapping",
    "update outbox.backends set host = 'evil'",
    "delete from outbox.events",
    "truncate outbox.events",
    "insert into outbox.cursors (backend_number) values (1)",
    "alter table outbox.events disable trigger all",
    "alter table outbox.events owner to somebody",
    "create trigger t before insert on outbox.events for each row execute function public.spy()",
    "create rule r as on insert to outbox.events do also select 1",
    "create policy p on outbox.events using (true)",
    "create index on outbox.events (data)",
    "create index on outbox.events ((public.leak(data)))",
    "create or replace function outbox.publish_event() returns uuid language sql as 'select null::uuid'",
    "create function outbox.mine() returns int language sql as 'select 1'",
    "alter function outbox.draw_seq() owner to somebody",
    "drop function outbox.draw_seq()",
    "drop extension outbox_relay cascade",
    "drop schema outbox cascade",
    "alter extension outbox_relay update",
    "alter schema outbox owner to somebody",
    "grant usage on schema outbox to somebody",
    "grant select on outbox.events to somebody",
    "select outbox.grant_publisher('somebody')",
    "select outbox.publish_event('t', 's')",
    "select outbox.wake()",
    "create publication p for all tables",
    "create publication p for table outbox.events",
    "create event trigger e on ddl_command_end execute function outbox.attach_children()",
    "drop event trigger outbox_relay_keep",
    "alter event trigger outbox_relay_keep disable",
    "create statistics outbox.s on event_type, source from outbox.events",
    "alter sequence outbox.events_seq_seq restart 1",
    "select setval('outbox.events_seq_seq', 1)",
    "select nextval('outbox.events_seq_seq')",
    "comment on table outbox.events is 'x'",
    "security label on table outbox.events is 'x'",
    "reassign owned by postgres to somebody",
    "alter role postgres set outbox_relay.default_backend = 'x'",
    "alter system set outbox_relay.enabled = off",
    "set session_replication_role = replica",
    "set role postgres",
    "load 'outbox_relay'",
    "select pg_terminate_backend(WORKER)",
    "select pg_cancel_backend(WORKER)",
];

/// What the role may do, in loops, while events are published; none is lost, and the order holds.
fn assert_harmless(stack: &Stack, role: &str, database: &str, allowed: &[&str], refused: &[&str]) {
    let worker = stack.pg.wait_worker("postgres");
    let mut client = stack.pg.client_as(role, database);
    for sql in refused {
        let outcome = client.batch_execute(&sql.replace("WORKER", &worker.to_string()));
        let code = outcome
            .as_ref()
            .err()
            .and_then(|error| error.code())
            .map(|code| code.code().to_owned());
        let is_refused = code
            .as_deref()
            .is_some_and(|code| ["42501", "0A000", "2BP01", "22023"].contains(&code));
        assert!(is_refused, "{role}: {sql}: {outcome:?}");
        let _ = client.batch_execute("rollback");
    }
    let mut publisher = stack.pg.client();
    let mut published = Vec::new();
    for round in 0..5 {
        for sql in allowed {
            published.extend(publish_many(&mut publisher, "default", "", &format!("round{round}"), 3));
            client
                .batch_execute(sql)
                .unwrap_or_else(|error| panic!("{role}: {sql}: {error:?}"));
        }
    }
    let entries = stack.redis.wait_entries("events", published.len());
    assert_eq!(ids(&entries), published, "{role}");
    wait_drained(&stack.pg, "default");
    assert_eq!(
        stack.pg.worker_pid("postgres"),
        Some(worker),
        "{role}: the worker is the same"
    );
    stack.redis.call(&["DEL", "events"]);
}

#[test]
fn roles_with_some_privileges_of_administrators_neither_read_nor_lose_events() {
    let stack = Stack::start();
    stack.pg.exec(
        "create function public.spy() returns trigger language plpgsql as 'begin return null; end';
         create function public.leak(data json) returns text language plpgsql immutable as $$ begin raise warning '%', data; return ''; end $$;
         create role somebody login; create role creator login createrole createdb; create role signaller login in role pg_signal_backend;
         create role watcher login in role pg_monitor, pg_read_all_settings, pg_stat_scan_tables, pg_checkpoint;
         create role app login; select outbox.grant_publisher('app')",
    );
    let refused =
        |except: &[&str]| -> Vec<&str> { REFUSED.iter().copied().filter(|sql| !except.contains(sql)).collect() };
    assert_harmless(&stack, "somebody", "postgres", &["select 1"], &refused(&[]));
    assert_harmless(
        &stack,
        "signaller",
        "postgres",
        &["select pg_cancel_backend(pid) from pg_stat_activity where usename = 'app'"],
        &refused(&[]),
    );
    // It may signal autovacuum's workers, whose flag in shared memory our worker has.
    if postgres_major() >= 18 {
        stack
            .pg
            .exec("create role cleaner login in role pg_signal_autovacuum_worker");
        assert_harmless(&stack, "cleaner", "postgres", &["select 1"], &refused(&[]));
    }
    assert_harmless(
        &stack,
        "watcher",
        "postgres",
        &["checkpoint", "select * from outbox.status"],
        // It uses the views' schema.
        &refused(&["grant usage on schema outbox to somebody"]),
    );
    // Before Postgres 16 such a role could grant itself any role that is no superuser: docs/security.md says so.
    if postgres_major() >= 16 {
        let own = [
            "grant app to creator",
            "grant pg_write_all_data to creator",
            "grant pg_read_all_data to creator",
            "grant pg_signal_backend to creator",
            "alter role app set outbox_relay.default_backend = 'x'",
            "alter role app password 'x'",
            "alter role app nologin",
            "drop role app",
            "alter role app rename to application",
        ];
        let all = [refused(&[]), own.to_vec()].concat();
        let allowed = [
            "create role made; grant made to creator; drop role made",
            "create role made; alter role made set outbox_relay.default_backend = 'x'; drop role made",
        ];
        assert_harmless(&stack, "creator", "postgres", &allowed, &all);
    }
}

/// VACUUM FULL, CLUSTER and REINDEX rewrite the tables and lock them, LOCK TABLE does as long as the role wants.
#[test]
fn a_role_that_may_maintain_tables_neither_reads_nor_loses_events() {
    if postgres_major() < 17 {
        return;
    }
    let stack = Stack::start();
    stack.pg.exec(
        "create function public.spy() returns trigger language plpgsql as 'begin return null; end';
         create function public.leak(data json) returns text language plpgsql immutable as $$ begin return ''; end $$;
         create role somebody; create role keeper login in role pg_maintain; grant usage on schema outbox to keeper",
    );
    assert_harmless(
        &stack,
        "keeper",
        "postgres",
        &[
            "vacuum full outbox.events",
            "cluster outbox.events using events_xid_idx",
            "reindex table outbox.events",
            "reindex table concurrently outbox.events",
            "vacuum (freeze, index_cleanup off) outbox.events",
            "analyze outbox.events",
            "begin; lock table outbox.events, outbox.cursors, outbox.backends in access exclusive mode; select pg_sleep(0.2); rollback",
            "vacuum full outbox.cursors, outbox.backends, outbox.scheduled_events",
            "reindex index outbox.events_event_id_idx",
        ],
        &REFUSED
            .iter()
            .copied()
            // Whoever has any right on an object gets only a WARNING: nothing is granted.
            .filter(|sql| !sql.starts_with("grant "))
            .collect::<Vec<_>>(),
    );
}

/// It may drop or lock its database as a whole, and no more.
#[test]
fn the_owner_of_the_database_neither_reads_nor_loses_events() {
    let stack = Stack::start();
    stack.pg.exec(
        "create function public.spy() returns trigger language plpgsql as 'begin return null; end';
         create function public.leak(data json) returns text language plpgsql immutable as $$ begin return ''; end $$;
         create role somebody; create role proprietor login; alter database postgres owner to proprietor;
         alter schema public owner to pg_database_owner",
    );
    assert_harmless(
        &stack,
        "proprietor",
        "postgres",
        &[
            "vacuum",
            "analyze",
            "alter database postgres set search_path = public, outbox; alter database postgres reset all",
            "alter database postgres set statement_timeout = 1; alter database postgres reset all",
            "alter database postgres set default_transaction_read_only = on; alter database postgres reset all",
            "alter database postgres set outbox_relay.default_backend = 'x'; alter database postgres reset all",
            "alter database postgres connection limit 3; alter database postgres connection limit -1",
            "create schema mine; drop schema mine",
            "grant create on database postgres to somebody; revoke create on database postgres from somebody",
            "comment on database postgres is 'mine'",
        ],
        REFUSED,
    );
    // With settings that a worker would start with.
    let (mut admin, before) = (stack.pg.client(), stack.pg.wait_worker("postgres"));
    stack
        .pg
        .client_as("proprietor", "postgres")
        .batch_execute(
            "create function public.to_jsonb(json) returns jsonb language sql as 'select null::jsonb';
             alter database postgres set search_path = public; alter database postgres set statement_timeout = 1;
             alter database postgres set default_transaction_read_only = on; alter database postgres set lock_timeout = 1",
        )
        .expect("its own");
    admin
        .execute("select pg_terminate_backend($1)", &[&before])
        .expect("a superuser");
    wait_until("another worker", || {
        let another = "select from pg_stat_activity where backend_type = 'outbox_relay worker' and pid <> $1";
        !admin.query(another, &[&before]).expect("a view").is_empty()
    });
    admin
        .batch_execute("select outbox.publish_event('t', 's')")
        .expect("published");
    stack.wait_events(1);
}

/// Event triggers are made by superusers, such as an extension's. Where they fail, what we do in their transaction
/// fails as a whole; where they drop what we make, nothing crashes.
#[test]
fn event_triggers_of_others_stop_statements_and_nothing_else() {
    let stack = Stack::start();
    let mut client = stack.pg.client();
    client
        .batch_execute(
            "create table public.t (id integer primary key, name text, parts text);
             create function public.stop() returns event_trigger language plpgsql as $$ begin raise 'stopped by %', tg_tag; end $$;
             create function public.meddle() returns event_trigger language plpgsql as $$
             declare o record;
             begin
                 for o in select * from pg_event_trigger_ddl_commands() where object_type in ('trigger', 'function') loop
                     if o.object_type = 'function' then
                         execute format('drop function if exists %s cascade', o.object_identity);
                     else
                         execute format('alter table public.t disable trigger all');
                     end if;
                 end loop;
             end $$;
             create function public.rename() returns event_trigger language plpgsql as $$
             begin
                 if exists (select from pg_attribute where attrelid = 'public.t'::regclass and attname = 'name') then
                     alter table public.t rename column name to renamed;
                 end if;
             end $$",
        )
        .expect("a superuser");
    let triggers = |client: &mut postgres::Client| -> i64 {
        let row = client.query_one(
            "select count(*) from pg_trigger where tgrelid = 'public.t'::regclass and tgname like 'outbox%'",
            &[],
        );
        row.expect("a count").get(0)
    };
    let attach = "select outbox.attach_table('public.t', columns => '{id,name}')";
    for (event, function) in [
        ("ddl_command_start", "stop"),
        ("ddl_command_end", "stop"),
        ("ddl_command_end", "meddle"),
        ("ddl_command_end", "rename"),
    ] {
        client
            .batch_execute(&format!(
                "create event trigger a_other on {event} execute function public.{function}()"
            ))
            .expect("a superuser");
        let outcome = client.batch_execute(attach);
        println!(
            "{event} {function}: {:?}",
            outcome
                .as_ref()
                .err()
                .and_then(|e| e.as_db_error())
                .map(|e| (e.code().code(), e.message()))
        );
        if function == "stop" {
            assert_eq!(Refused::of(outcome).code, "P0001", "{event}");
            assert_eq!(triggers(&mut client), 0, "{event}");
        }
        client.batch_execute("set session_replication_role = replica; drop event trigger a_other; set session_replication_role = origin").expect("dropped");
        // Statements on the table go on, or say what is wrong.
        if let Err(error) = client.batch_execute("insert into public.t (id) values (1); delete from public.t") {
            assert!(error.as_db_error().is_some(), "{event} {function}: {error:?}");
        }
        client
            .batch_execute("select outbox.detach_table('public.t')")
            .expect("detached");
        let _ = client.batch_execute("alter table public.t rename column renamed to name");
        client.batch_execute(attach).expect("as if nothing had happened");
        client
            .batch_execute(
                "insert into public.t (id) values (1); delete from public.t; select outbox.detach_table('public.t')",
            )
            .expect("published");
    }
    // The extension and its worker are not hindered, and are not left half-dropped.
    client
        .batch_execute("create event trigger a_other on sql_drop execute function public.stop()")
        .expect("a superuser");
    assert_eq!(
        Refused::of(client.batch_execute("drop extension outbox_relay cascade")).code,
        "P0001"
    );
    stack.publish("alive");
    wait_until("the last event", || types(&stack.events()).contains(&"alive"));
    client.batch_execute("drop event trigger a_other").expect("dropped");
}
