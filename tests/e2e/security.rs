//! Whatever somebody adds to the extension's tables, or beside them, does not run with rights that it was not given:
//! neither the worker's, who is a superuser, nor those of functions that may do more than their caller.

mod installing;

use kit::{Postgres, Redis, Refused, Stack, publish_many, wait_eq, wait_until};
use postgres::Client;

/// Retention at once, so that the worker deletes too; events that Redis refuses fail at once.
const BUSY: &[(&str, &str)] = &[
    ("outbox_relay.published_retention", "0"),
    ("outbox_relay.failed_retention", "-1"),
    ("outbox_relay.max_retries", "1"),
    ("outbox_relay.retry_delay", "50ms"),
    ("outbox_relay.poll_interval", "200ms"),
];

/// The code of an attacker, `mallory`: it records with whose rights it runs, and tries to make its owner a superuser.
const EVIL: &str = "
    create role mallory login;
    create schema evil authorization mallory;
    grant usage on schema evil to public;
    create table evil.ran (place text, who text);
    grant insert on evil.ran to public;
    create function evil.run(place text) returns boolean language plpgsql as $$
    begin
        insert into evil.ran values (place, current_user);
        begin
            execute 'alter role mallory superuser';
        exception when others then
            null;
        end;
        return true;
    exception when others then
        return true;
    end $$;
    create function evil.trigger() returns trigger language plpgsql as $$
    begin
        perform evil.run(tg_table_name || ' ' || tg_name);
        if tg_level = 'STATEMENT' or tg_op = 'DELETE' then return old; end if;
        return new;
    end $$;";

fn start() -> Stack {
    let stack = Stack::of(Postgres::with(BUSY), Redis::start());
    stack.pg.exec(EVIL);
    stack
}

/// Code of the attacker that ran as somebody else, and where.
fn ran_as_others(pg: &Postgres, but: &str) -> Vec<String> {
    let sql = "select distinct place || ' as ' || who from evil.ran where who <> $1 order by 1";
    let rows = pg.client().query(sql, &[&but]).expect("evil.ran");
    rows.iter().map(|row| row.get(0)).collect()
}

#[track_caller]
fn assert_nothing_was_won(pg: &Postgres, but: &str) {
    assert_eq!(ran_as_others(pg, but), Vec::<String>::new());
    let supers = "select string_agg(rolname, ',') from pg_roles where rolsuper and rolname <> 'postgres'";
    assert_eq!(
        pg.one::<Option<String>>(supers),
        None,
        "somebody has become a superuser"
    );
}

fn tables(client: &mut Client) -> Vec<String> {
    let sql =
        "select relname::text from pg_class where relnamespace = 'outbox'::regnamespace and relkind = 'r' order by 1";
    let rows = client.query(sql, &[]).expect("tables");
    rows.iter().map(|row| row.get(0)).collect()
}

/// Makes the worker write all its tables, and lets `operator` call the functions that act with the owner's rights.
fn exercise(stack: &Stack) {
    stack.redis.call(&["SET", "wrong", "a string"]);
    let mut client = stack.pg.client();
    // Publishing fires triggers with the publisher's rights, as any INSERT: no superuser publishes here.
    client
        .batch_execute("set session_replication_role = replica")
        .expect("a superuser");
    publish_many(&mut client, "default", "", "sent", 5);
    publish_many(&mut client, "default", "wrong", "refused", 2);
    let later = "select outbox.publish_event('scheduled', 'kit', scheduled_at => now() + interval '300 ms')";
    client.batch_execute(later).expect("a scheduled event");
    let sent = "select count(*) from outbox.failed_events";
    wait_eq("failed events", 2, || stack.pg.one::<i64>(sent));
    stack.wait_events(6);
    // Sent events are purged: the retention is zero.
    wait_eq("events that are left", 0, || {
        stack.pg.one::<i64>("select count(*) from outbox.events")
    });
    let mut operator = stack.pg.client_as("operator", "postgres");
    for sql in [
        "select outbox.set_backend_password('default', 'some password')",
        "select outbox.set_backend_password('default', null)",
        "select outbox.take_over('default')",
        "select outbox.retry_failed()",
        "select * from outbox.backend_status, outbox.status",
        "insert into outbox.backends (name, host) values ('other', 'localhost')",
        "update outbox.backends set enabled = false where name = 'other'",
        "delete from outbox.backends where name = 'other'",
    ] {
        operator
            .batch_execute(sql)
            .unwrap_or_else(|error| panic!("{sql}: {error:?}"));
    }
    wait_until("the take-over", || {
        stack.pg.one::<i64>("select count(*) from outbox.take_overs") == 0
    });
    wait_eq("failed events", 2, || stack.pg.one::<i64>(sent));
}

/// A role that may only do what the DBA grants.
const OPERATOR: &str = "
    create role operator login in role pg_monitor;
    grant usage on schema outbox to operator;
    grant execute on all functions in schema outbox to operator;
    grant select, insert, update, delete on outbox.backends to operator;";

#[test]
fn triggers_of_others_do_not_run() {
    let stack = start();
    stack.pg.exec(OPERATOR);
    stack
        .pg
        .exec("grant usage on schema outbox to mallory; grant trigger on all tables in schema outbox to mallory");
    let mut mallory = stack.pg.client_as("mallory", "postgres");
    // The superuser's and the operator's own statements fire triggers with their own rights, as on any table.
    for table in tables(&mut mallory).iter().filter(|t| *t != "backends") {
        mallory
            .batch_execute(&format!(
                "create trigger aa_before before insert or update or delete on outbox.{table} for each row execute function evil.trigger();
                create trigger after_row after insert or update or delete on outbox.{table} for each row execute function evil.trigger();
                create trigger after_all after insert or update or delete on outbox.{table} execute function evil.trigger();
                create constraint trigger late after insert or update or delete on outbox.{table}
                    deferrable initially deferred for each row execute function evil.trigger();"
            ))
            .unwrap_or_else(|error| panic!("{table}: {error:?}"));
        // Needs the owner's rights.
        let always = format!("alter table outbox.{table} enable always trigger after_row");
        assert_eq!(Refused::of(mallory.simple_query(&always)).code, "42501", "{always}");
    }
    exercise(&stack);
    // A restored dump is recorded with the owner's rights.
    stack.pg.exec(
        "create role loader login; grant usage on schema outbox to loader; grant insert on outbox.events to loader;
        drop trigger aa_before on outbox.events; drop trigger after_row on outbox.events; drop trigger after_all on outbox.events;
        drop trigger late on outbox.events",
    );
    let mut loader = stack.pg.client_as("loader", "postgres");
    loader
        .batch_execute("insert into outbox.events (event_type, source, xid) values ('loaded', 's', '5')")
        .expect("a row of a dump");
    stack.wait_events(7);
    assert_nothing_was_won(&stack.pg, "nobody");
}

/// A role that lost its superuser's rights still owns the objects that it created, and can make code run there: with
/// its own rights.
#[test]
fn an_owner_gets_no_more_than_its_own_rights() {
    let stack = Stack {
        pg: Postgres::with(BUSY).start(),
        redis: Redis::start(),
    };
    stack.pg.exec(EVIL);
    stack.pg.exec("alter role mallory superuser");
    let mut mallory = stack.pg.client_as("mallory", "postgres");
    mallory
        .batch_execute("create extension outbox_relay")
        .expect("a superuser");
    stack.point("default", &stack.redis);
    stack.pg.exec(OPERATOR);
    stack.pg.exec("alter role mallory nosuperuser");
    stack.publish("before");
    stack.wait_events(1);
    for table in tables(&mut mallory).iter().filter(|t| *t != "backends") {
        mallory
            .batch_execute(&format!(
                "create trigger aa_before before insert or update or delete on outbox.{table} for each row execute function evil.trigger();
                create trigger after_row after insert or update or delete on outbox.{table} for each row execute function evil.trigger();
                alter table outbox.{table} enable always trigger aa_before;
                alter table outbox.{table} enable always trigger after_row;
                alter table outbox.{table} add column evil boolean default evil.run('{table} default') check (evil.run('{table} check'));
                alter table outbox.{table} enable row level security;
                alter table outbox.{table} force row level security;
                create policy anything on outbox.{table} using (evil.run('{table} policy')) with check (evil.run('{table} policy'));"
            ))
            .unwrap_or_else(|error| panic!("{table}: {error:?}"));
    }
    // Where Postgres allows a rule besides the extension's statements.
    mallory
        .batch_execute(
            "create rule also as on delete to outbox.take_overs do also select evil.run('rule');
            alter table outbox.take_overs enable always rule also",
        )
        .expect("an owner");
    // Publishers evaluate the defaults of the columns, as of any other table.
    for table in ["events", "scheduled_events"] {
        mallory
            .batch_execute(&format!("alter table outbox.{table} drop column evil"))
            .expect("an owner");
    }
    stack.redis.call(&["SET", "wrong", "a string"]);
    publish_many(&mut mallory, "default", "", "sent", 5);
    publish_many(&mut mallory, "default", "wrong", "refused", 2);
    let later = "select outbox.publish_event('scheduled', 'kit', scheduled_at => now() + interval '300 ms')";
    mallory.batch_execute(later).expect("a scheduled event");
    wait_until("code of the owner in the worker", || {
        stack
            .pg
            .one::<i64>("select count(distinct place) from evil.ran where place like 'cursors %' and who = 'mallory'")
            >= 4
    });
    stack.wait_events(7);
    assert_nothing_was_won(&stack.pg, "mallory");
}

/// Functions that write with the owner's rights disable others' triggers, which an owner that is no longer a superuser
/// may not do. Everything else works, also with a worker that starts then.
#[test]
fn an_owner_that_is_no_superuser_is_named_in_errors() {
    let stack = Stack {
        pg: Postgres::with(BUSY).start(),
        redis: Redis::start(),
    };
    stack.pg.exec("create role mallory login superuser");
    let mut mallory = stack.pg.client_as("mallory", "postgres");
    mallory
        .batch_execute("create extension outbox_relay")
        .expect("a superuser");
    stack.point("default", &stack.redis);
    stack.pg.exec("alter role mallory nosuperuser");
    let worker = stack.pg.wait_worker("postgres");
    stack.pg.exec(&format!("select pg_terminate_backend({worker})"));
    wait_until("another worker", || {
        stack.pg.worker_pid("postgres").is_some_and(|pid| pid != worker)
    });
    let mut admin = stack.pg.client();
    stack.redis.call(&["SET", "wrong", "a string"]);
    admin
        .batch_execute(
            "select outbox.publish_event('published', 's');
            select outbox.publish_event('scheduled', 's', scheduled_at => now() + interval '100 ms');
            select outbox.publish_event('refused', 's', stream => 'wrong');
            insert into outbox.events (event_type, source) values ('inserted', 's');
            insert into outbox.events (event_type, source, xid) values ('of a dump', 's', '5');
            insert into outbox.backends (name, host) values ('other', 'localhost');
            update outbox.backends set enabled = false where name = 'other';
            select * from outbox.backend_status, outbox.status;
            select outbox.has_waiting_events(1)",
        )
        .expect("a superuser");
    admin.batch_execute("call outbox.purge()").expect("a superuser");
    stack.wait_events(4);
    wait_eq("failed events", 1, || {
        stack.pg.one::<i64>("select count(*) from outbox.failed_events")
    });
    wait_eq("events that are left", 0, || {
        stack.pg.one::<i64>("select count(*) from outbox.events")
    });
    let calls = [
        "select outbox.retry_failed()",
        "select outbox.take_over('default')",
        "select outbox.set_backend_password('default', 'some password')",
        "delete from outbox.backends where name = 'other'",
    ];
    let refused = |admin: &mut Client, detail: &str| {
        let expected = Refused::new(
            "55000",
            "the owner of the tables and functions in schema outbox is not a superuser",
            detail,
            "Run ALTER ROLE mallory SUPERUSER, or REASSIGN OWNED BY mallory to a superuser.",
        );
        for sql in calls {
            assert_eq!(Refused::of(admin.simple_query(sql)), expected, "{sql}");
        }
    };
    refused(
        &mut admin,
        "It is \"mallory\", whose rights do not suffice to keep the triggers of others from running.",
    );
    // Nor do functions of a superuser write to tables of another owner, whose triggers would run with the superuser's
    // rights.
    admin
        .batch_execute(
            "do $$ declare f text; begin
                for f in select oid::regprocedure from pg_proc where pronamespace = 'outbox'::regnamespace and prokind = 'f' loop
                    execute format('alter function %s owner to postgres', f);
                end loop;
            end $$",
        )
        .expect("a superuser");
    refused(
        &mut admin,
        "It is \"mallory\", whose rights do not suffice to keep the triggers of others from running.",
    );
    // As the hint says.
    admin
        .batch_execute("reassign owned by mallory to postgres")
        .expect("a superuser");
    for sql in calls {
        admin
            .batch_execute(sql)
            .unwrap_or_else(|error| panic!("{sql}: {error:?}"));
    }
    // A role that may call it all the same gains nothing.
    stack
        .pg
        .exec("grant usage on schema outbox to mallory; grant execute on all functions in schema outbox to mallory");
    let said = Refused::of(mallory.simple_query("select outbox.silence_triggers()"));
    assert_eq!(said.code, "55000", "{said:?}");
    assert_eq!(stack.pg.one::<String>("show session_replication_role"), "origin");
}

/// With two owners, code of one could run with the rights of the other.
#[test]
fn all_tables_have_one_owner() {
    let stack = start();
    let mut client = stack.pg.client();
    for table in tables(&mut client) {
        client
            .batch_execute(&format!("alter table outbox.{table} owner to mallory"))
            .expect("a superuser");
        let said = Refused::of(client.simple_query("select * from outbox.backlog(1)"));
        assert_eq!(said.code, "55000", "{table}: {said:?}");
        assert!(
            said.message.ends_with("has another owner than outbox.events"),
            "{said:?}"
        );
        let other = if table == "events" { "backends" } else { &table };
        assert!(said.message.contains(&format!("outbox.{other} ")), "{said:?}");
        let mark = stack.pg.log().len();
        if table == "ticks" {
            stack.publish("waits");
            stack
                .pg
                .wait_log_after(mark, "table outbox.ticks has another owner than outbox.events");
        }
        client
            .batch_execute(&format!("alter table outbox.{table} owner to postgres"))
            .expect("a superuser");
    }
    stack.wait_events(1);
    // And the columns have the types that the code expects.
    client
        .batch_execute("alter extension outbox_relay drop view outbox.event_status; drop view outbox.event_status; alter table outbox.events alter column max_retries type bigint")
        .expect("a superuser");
    let said = Refused::of(stack.pg.client().simple_query("select outbox.publish_event('t', 's')"));
    assert_eq!(said.message, "column 16 of outbox.events has an unexpected type");
}

/// Operators, functions and types of the caller, before pg_catalog in the search_path.
#[test]
fn objects_in_the_callers_search_path_are_not_used() {
    let stack = start();
    stack.pg.exec(
        "grant pg_monitor to mallory; grant usage on schema outbox to mallory;
        grant insert on outbox.events to mallory; grant execute on all functions in schema outbox to mallory",
    );
    let mut mallory = stack.pg.client_as("mallory", "postgres");
    let mut attack = String::from(
        "create function evil.clock_timestamp() returns timestamptz language sql as $$select case when evil.run('clock') then now() end$$;
        create function evil.now() returns timestamptz language sql as $$select case when evil.run('now') then pg_catalog.now() end$$;
        create domain evil.xid8 as pg_catalog.xid8 check (evil.run('xid8'));
        create domain evil.text as pg_catalog.text check (evil.run('text'));
        create domain evil.pg_snapshot as pg_catalog.pg_snapshot check (evil.run('pg_snapshot'));
        create function evil.times(a numeric, b integer) returns numeric language sql as
            $$select case when evil.run('numeric *') then 1 end::numeric$$;
        create operator evil.* (leftarg = numeric, rightarg = integer, function = evil.times);
        create function evil.times(a bigint, b interval) returns interval language sql as
            $$select case when evil.run('bigint *') then b end$$;
        create operator evil.* (leftarg = bigint, rightarg = interval, function = evil.times);",
    );
    for (operator, name) in [("=", "eq"), ("<=", "le"), ("<", "lt"), ("<>", "ne"), (">", "gt")] {
        for kind in ["integer", "bigint", "pg_catalog.text", "uuid", "timestamptz", "boolean"] {
            attack += &format!(
                "create function evil.{name}(a {kind}, b {kind}) returns boolean language sql as
                    $$select evil.run('{operator}') and a operator(pg_catalog.{operator}) b$$;
                create operator evil.{operator} (leftarg = {kind}, rightarg = {kind}, function = evil.{name});"
            );
        }
    }
    // In the caller's own statements, they have no rights to gain.
    attack += "create temp table events (seq bigint); create temp table backends (seq bigint);
        create function pg_temp.now() returns timestamptz language sql as $$select pg_catalog.now()$$;";
    mallory.batch_execute(&attack).expect("its own schema");
    mallory
        .batch_execute(
            "set search_path = evil, pg_temp, pg_catalog;
            select outbox.set_backend_password('default', 'x');
            select outbox.set_backend_password('default', null);
            select * from outbox.backend_status;
            select * from outbox.status;
            select outbox.has_waiting_events(1);
            select outbox.guard_key('default');
            select outbox.take_over('default');
            select outbox.retry_failed();
            select outbox.publish_event('one', 's');
            insert into outbox.events (event_type, source, xid) values ('two', 's', '5');",
        )
        .expect("what it may");
    stack.wait_events(2);
    assert_nothing_was_won(&stack.pg, "mallory");
    // Nor do a superuser's calls with such a search_path use them.
    stack.pg.exec("delete from evil.ran");
    let mut admin = stack.pg.client();
    admin.batch_execute("set search_path = evil, pg_catalog").expect("set");
    admin.batch_execute("call outbox.purge()").expect("purge");
    admin
        .batch_execute("select outbox.wait_published(gen_random_uuid(), '1 ms')")
        .expect("wait");
    admin
        .batch_execute("select * from outbox.purge_piece(1, 0, 10)")
        .expect("piece");
    assert_nothing_was_won(&stack.pg, "nobody");
}

/// A role that may create objects in schema outbox, by a careless grant, can add overloaded functions: the extension's
/// own are called all the same.
#[test]
fn overloaded_functions_of_others_are_not_called() {
    let stack = start();
    stack.pg.exec(OPERATOR);
    stack.pg.exec(
        "grant usage, create on schema outbox to mallory;
        grant usage on type outbox.backends, outbox.cursors to mallory",
    );
    let mut mallory = stack.pg.client_as("mallory", "postgres");
    mallory
        .batch_execute(
            "create function outbox.expect_backend(varchar) returns outbox.backends language sql as
                $$select b from (select evil.run('expect_backend')) e, outbox.backends b$$;
            create function outbox.here(integer default 1) returns text language sql as $$select evil.run('here')::text$$;
            create function outbox.has_waiting_events(bigint) returns boolean language sql as $$select not evil.run('waits')$$;
            create function outbox.is_delivered(outbox.cursors, xid8, numeric) returns boolean language sql as $$select evil.run('is_delivered')$$;
            create function outbox.purge_piece(integer, bigint, bigint, out last_seq bigint) returns setof bigint language sql as
                $$select null::bigint where evil.run('purge_piece')$$;
            create function outbox.wake(integer default 1) returns void language sql as $$select evil.run('wake')$$;
            create function outbox.format(text, text, oid, integer) returns text language sql as $$select evil.run('format')::text$$;
            create function outbox.count(bigint) returns bigint language sql as $$select evil.run('count')::int::bigint$$;",
        )
        .expect("a careless grant");
    exercise(&stack);
    stack.pg.exec("call outbox.purge()");
    assert_nothing_was_won(&stack.pg, "mallory");
}
