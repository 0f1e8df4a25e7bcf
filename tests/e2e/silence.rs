//! Our functions keep the triggers of others from firing, but only until they end: whatever happens, the session's
//! `session_replication_role` is what it was.

use kit::{Refused, Stack, wait_drained};
use postgres::Client;

/// What a session says of its setting, and whether its triggers fire.
fn look(client: &mut Client) -> (String, bool) {
    let role = client
        .query_one("show session_replication_role", &[])
        .expect("shown")
        .get(0);
    let sql = "insert into heard values (0) returning fired";
    (role, client.query_one(sql, &[]).expect("inserted").get(0))
}

/// Functions that write with their owner's rights: one that succeeds, one that fails, one that a function of ours
/// calls.
const WORKS: &str = "perform outbox.erase((select event_id from outbox.events limit 1))";
const FAILS: &str = "perform outbox.erase(null)";

#[test]
fn a_silence_ends_with_its_function() {
    let stack = Stack::start();
    stack.pg.exec(&format!(
        "create table heard (n integer, fired boolean not null default false);
         create function fire() returns trigger language plpgsql as $$ begin new.fired := true; return new; end $$;
         create trigger fire before insert on heard for each row execute function fire();
         create function works_as_replica() returns void language plpgsql set session_replication_role = replica
            as $$ begin {WORKS}; end $$;
         create function fails_as_replica() returns void language plpgsql set session_replication_role = replica
            as $$ begin {FAILS}; end $$;
         create function becomes_replica_and_fails() returns void language plpgsql
            as $$ begin set local session_replication_role = replica; {FAILS}; end $$;
         create function changes() returns trigger language plpgsql
            as $$ begin set local session_replication_role = local; return null; end $$;
         create trigger changes before delete on outbox.failed_events execute function changes();
         alter table outbox.failed_events enable always trigger changes;
         insert into outbox.events (event_type, source) values ('t', 's')"
    ));
    wait_drained(&stack.pg, "default");
    let caught = |act: &str| format!("do $do$ begin begin {act}; exception when others then null; end; end $do$");
    let acts = [
        format!("do $do$ begin {WORKS}; end $do$"),
        caught(WORKS),
        caught(FAILS),
        caught(&format!("{WORKS}; {FAILS}")),
        caught(&format!(
            "begin {FAILS}; exception when others then null; end; {WORKS}; raise exception 'e'"
        )),
        caught("perform works_as_replica()"),
        caught("perform fails_as_replica()"),
        caught("perform becomes_replica_and_fails()"),
        caught("perform outbox.silence_triggers(); raise exception 'e'"),
        // By two levels of functions of ours.
        caught("update outbox.backends set enabled = false; update outbox.backends set name = null"),
    ];
    let mut client = stack.pg.client();
    for act in &acts {
        // On its own, and within a transaction that goes on, at two depths.
        client
            .batch_execute(act)
            .unwrap_or_else(|error| panic!("{act}: {error:?}"));
        assert_eq!(look(&mut client), ("origin".to_owned(), true), "{act}");
        client
            .batch_execute(&format!("begin; savepoint a; {act}"))
            .expect("as before");
        assert_eq!(look(&mut client), ("origin".to_owned(), true), "{act}");
        client
            .batch_execute("release a; savepoint b; select outbox.silence_triggers(); rollback to b")
            .expect("undone");
        assert_eq!(look(&mut client), ("origin".to_owned(), true), "{act}");
        client.batch_execute("commit").expect("committed");
        // In a session that is a replica for itself.
        client
            .batch_execute(&format!("begin; set local session_replication_role = replica; {act}"))
            .expect("as before");
        assert_eq!(look(&mut client), ("replica".to_owned(), false), "{act}");
        client.batch_execute("commit").expect("committed");
        assert_eq!(look(&mut client), ("origin".to_owned(), true), "{act}");
    }
    // A trigger of the owner fires, and changes the setting in the silence.
    for act in [
        "perform outbox.discard_failed()",
        "perform outbox.discard_failed(); raise exception 'e'",
    ] {
        client.batch_execute(&caught(act)).expect("caught");
        assert_eq!(look(&mut client), ("origin".to_owned(), true), "{act}");
    }
    // An ERROR that nobody catches, and a statement that a transaction has after the function.
    for sql in ["select outbox.erase(null)", "select outbox.silence_triggers(), 1 / 0"] {
        client.batch_execute(sql).expect_err("it fails");
        assert_eq!(look(&mut client), ("origin".to_owned(), true), "{sql}");
    }
    client
        .batch_execute("begin; select outbox.silence_triggers()")
        .expect("a superuser");
    assert_eq!(look(&mut client), ("replica".to_owned(), false));
    client
        .batch_execute("savepoint a; do $do$ begin perform 1 / 0; exception when others then null; end $do$")
        .expect("caught");
    assert_eq!(look(&mut client), ("replica".to_owned(), false));
    client.batch_execute("rollback to a; commit").expect("committed");
    assert_eq!(look(&mut client), ("origin".to_owned(), true));
}

#[test]
fn a_trigger_of_the_owner_may_change_the_setting_in_a_silence() {
    let stack = Stack::start();
    stack.pg.exec(
        "create table heard (n integer, fired boolean not null default false);
         create function fire() returns trigger language plpgsql as $$ begin new.fired := true; return new; end $$;
         create trigger fire before insert on heard for each row execute function fire();
         create function refuse() returns trigger language plpgsql as $$ begin raise exception 'it fires'; end $$;
         create trigger refuse before update on outbox.events for each row execute function refuse();
         create function act() returns trigger language plpgsql
            as $$ begin execute current_setting('test.act'); return null; end $$;
         create trigger act before delete on outbox.failed_events execute function act();
         alter table outbox.failed_events enable always trigger act;
         insert into outbox.events (event_type, source) values ('t', 's')",
    );
    wait_drained(&stack.pg, "default");
    let mut client = stack.pg.client();
    let mut discard = |act: &str, after: &str| {
        let act = act.replace('\'', "''");
        client
            .batch_execute(&format!(
                "set test.act = '{act}'; begin; select outbox.discard_failed(); {after}"
            ))
            .unwrap_or_else(|error| panic!("{act}: {error:?}"));
        let seen = look(&mut client);
        client.batch_execute("reset all").expect("reset");
        seen
    };
    let [origin, local] = ["origin", "local"].map(|role| (role.to_owned(), true));
    // As Postgres says of a function with a SET clause: SET without LOCAL outlasts the function.
    assert_eq!(discard("set session_replication_role = local", "commit"), local);
    assert_eq!(discard("set session_replication_role = local", "rollback"), origin);
    assert_eq!(discard("set local session_replication_role = local", "commit"), origin);
    // A function of ours that it calls begins a silence again.
    let erase = "do $$ begin perform outbox.erase((select event_id from outbox.events)); end $$";
    for end in ["rollback", "commit"] {
        let act = format!("set local session_replication_role = local; {erase}");
        assert_eq!(discard(&act, end), origin, "{end}");
    }
    assert_eq!(
        discard(&format!("set session_replication_role = local; {erase}"), "commit"),
        local
    );
    // RESET ALL ends a silence.
    client
        .batch_execute(
            "set session_replication_role = local; begin; select outbox.silence_triggers(); reset all; commit",
        )
        .expect("a superuser");
    assert_eq!(look(&mut client), origin);
}

#[test]
fn nobody_else_begins_a_silence() {
    let stack = Stack::start();
    let mut client = stack.pg.client();
    client.batch_execute("load 'outbox_relay'").expect("loaded");
    for sql in [
        "set outbox_relay.is_silent = on",
        "select set_config('outbox_relay.is_silent', 'on', true)",
        "alter system set outbox_relay.is_silent = on",
        "alter role postgres set outbox_relay.is_silent = on",
    ] {
        let said = Refused::of(client.simple_query(sql));
        assert_eq!(said.code, "55P02", "{sql}: {said:?}");
    }
    let own = "create function own() returns void language sql set outbox_relay.is_silent = on as 'select'";
    assert_eq!(Refused::of(client.simple_query(own)).code, "55P02");
}

/// Where a row goes that these statements insert, or delete, decides a rule. Each is a way to keep what was made of a
/// statement: a plan of PL/pgSQL, of a prepared statement, of an SQL function, of a foreign key.
const WAYS_TO_WRITE: [&str; 6] = [
    "perform write_in_plpgsql()",
    "perform write_in_sql()",
    "perform write_in_a_parsed_body()",
    "perform write_to_a_view()",
    "delete from parents; insert into parents values (1); insert into children values (1)",
    "execute 'execute prepared'",
];

#[test]
fn a_plan_that_was_made_without_rules_is_used_only_in_a_silence() {
    let stack = Stack::start();
    stack.pg.exec(
        "create table seen (n integer);
         create table ruled (n integer);
         create view shown as select n from ruled;
         create rule seen as on insert to ruled do also insert into seen values (1);
         create function write_in_plpgsql() returns void language plpgsql as $$ begin insert into ruled values (1); end $$;
         create function in_sql() returns integer language sql as $$ insert into ruled values (1) returning n $$;
         create function in_a_parsed_body() returns integer begin atomic insert into ruled values (1) returning n; end;
         create function write_in_sql() returns integer language plpgsql
            as $$ declare n integer; begin n := in_sql(); return n; end $$;
         create function write_in_a_parsed_body() returns integer language plpgsql
            as $$ declare n integer; begin n := in_a_parsed_body(); return n; end $$;
         create function write_to_a_view() returns void language plpgsql as $$ begin insert into shown values (1); end $$;
         create table parents (n integer primary key);
         create table children (n integer references parents on delete cascade);
         create rule seen as on delete to children do also insert into seen values (1);
         insert into parents values (1);
         insert into children values (1);
         do $$ declare t name; begin
            for t in select tgname from pg_trigger where tgrelid = 'parents'::regclass loop
                execute format('alter table parents enable always trigger %I', t);
            end loop;
         end $$;
         create function act() returns trigger language plpgsql set search_path = public
            as $$ begin execute current_setting('test.act'); return null; end $$;
         create trigger act before delete on outbox.failed_events for each statement execute function act();
         alter table outbox.failed_events enable always trigger act",
    );
    let act = |statement: &str| format!("do $act$ begin {statement}; end $act$");
    let silently = |statement: &str| {
        let act = act(statement).replace('\'', "''");
        format!("set test.act = '{act}'; select outbox.discard_failed()")
    };
    let mut stale = Vec::new();
    for way in WAYS_TO_WRITE {
        // What is only prepared is planned later.
        let (first, written) = match way.contains("prepared") {
            true => ("execute 'prepare prepared as insert into ruled values (1)'", 0),
            false => (way, 1),
        };
        let ways = [
            ([silently(first), act(way), silently(way)], [0, 1, 1]),
            ([act(first), silently(way), act(way)], [written, written, written + 1]),
        ];
        for (statements, expected) in &ways {
            for begin in ["", "begin; "] {
                let mut client = stack.pg.client();
                // A plan is used only under the search_path that it was made under.
                let set = format!("{begin}set search_path = public; truncate seen");
                client.batch_execute(&set).expect("set");
                let counts = statements.each_ref().map(|sql| -> i64 {
                    client
                        .batch_execute(sql)
                        .unwrap_or_else(|error| panic!("{sql}: {error:?}"));
                    let count = client.query_one("select count(*) from seen", &[]);
                    count.expect("counted").get(0)
                });
                if counts != *expected {
                    stale.push(format!("{counts:?} instead of {expected:?}: {begin}{}", statements[0]));
                }
            }
        }
    }
    assert!(stale.is_empty(), "{}", stale.join("\n"));
}
