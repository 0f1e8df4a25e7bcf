//! `outbox.health()`: what somebody has changed of the extension's tables is named, and the hint, executed as it
//! stands, mends it.

use kit::{Refused, Stack, wait_drained, wait_until};

use crate::health::{check, follow, health, quick, wait_ill, wait_well};

/// What breaks it, the check that names it, and its words.
type Breakage = (&'static str, &'static str, &'static str);

#[track_caller]
fn break_and_mend(stack: &Stack, (sql, name, words): Breakage) {
    stack.pg.exec(sql);
    let ill = wait_ill(&stack.pg, name, words);
    follow(&stack.pg, "postgres", &ill);
    wait_well(&stack.pg, name);
    wait_until(&format!("all to be well after {sql}"), || {
        health(&stack.pg).iter().all(|check| check.status == "ok")
    });
    stack.publish("more");
    wait_drained(&stack.pg, "default");
}

#[test]
fn columns_that_were_changed_are_named() {
    let stack = quick();
    for breakage in [
        (
            "alter table outbox.backends alter column port type bigint",
            "columns",
            "Column port of outbox.backends has type bigint instead of integer.",
        ),
        (
            "alter table outbox.events rename column subject to topic",
            "columns",
            "outbox.events has no column subject.",
        ),
        (
            "alter table outbox.cursors drop column last_hint",
            "columns",
            "outbox.cursors has no column last_hint.",
        ),
        (
            "alter table outbox.events alter column branch drop default",
            "columns",
            "Column branch of outbox.events has no default instead of the default outbox.first_branch().",
        ),
        (
            "alter table outbox.events alter column xid drop not null",
            "columns",
            "Column xid of outbox.events may be NULL.",
        ),
        (
            "alter table outbox.events add column tenant text not null default ''; alter table outbox.events alter column tenant drop default",
            "columns",
            "Column tenant of outbox.events is not of this extension",
        ),
    ] {
        break_and_mend(&stack, breakage);
    }
}

#[test]
fn constraints_indexes_rules_and_policies_are_named() {
    let stack = quick();
    for breakage in [
        // What an interrupted REINDEX CONCURRENTLY leaves.
        (
            "create index events_created_at_idx_ccnew on outbox.events (created_at); \
             update pg_index set indisvalid = false where indexrelid = 'outbox.events_created_at_idx_ccnew'::regclass",
            "indexes",
            "outbox.events_created_at_idx_ccnew is not valid.",
        ),
        (
            "create table public.reference (seq bigint references outbox.events on delete cascade)",
            "constraints",
            "public.reference has the foreign key \"reference_seq_fkey\" on outbox.events",
        ),
        (
            "alter table outbox.backends drop constraint backends_port_check",
            "constraints",
            "outbox.backends has no constraint \"backends_port_check\".",
        ),
        (
            "alter table outbox.events add constraint short check (length(event_type) < 50)",
            "constraints",
            "\"short\", which is not of this extension",
        ),
        (
            "create unique index one_subject on outbox.events (subject)",
            "constraints",
            "outbox.one_subject is a unique index",
        ),
        (
            "create rule nothing as on insert to outbox.events do instead nothing",
            "tables",
            "has the rule \"nothing\"",
        ),
        (
            "alter table outbox.events enable row level security",
            "tables",
            "outbox.events has row security",
        ),
        (
            "alter table outbox.backend_passwords disable row level security",
            "tables",
            "outbox.backend_passwords has no row security any more",
        ),
        (
            "create policy all_of_it on outbox.backend_passwords using (true)",
            "tables",
            "has the policy \"all_of_it\"",
        ),
        (
            "alter table outbox.events set unlogged",
            "tables",
            "outbox.events is unlogged",
        ),
        (
            "create publication all_of_it for tables in schema outbox",
            "publications",
            "\"all_of_it\" has all tables of schema outbox",
        ),
        (
            "create publication everything for all tables",
            "publications",
            "\"everything\" has all tables",
        ),
        (
            "create publication cursors for table outbox.events, outbox.cursors; \
             alter table outbox.cursors replica identity nothing",
            "publications",
            "outbox.cursors has REPLICA IDENTITY NOTHING",
        ),
    ] {
        break_and_mend(&stack, breakage);
    }
}

/// It leaves indexes that are not valid, also of the TOAST table.
#[test]
fn what_an_interrupted_reindex_leaves_is_named() {
    let stack = quick();
    let mut writer = stack.pg.client();
    writer
        .batch_execute("begin; select outbox.publish_event('open', 'kit')")
        .expect("it publishes");
    let mut admin = stack.pg.client();
    admin.batch_execute("set statement_timeout = '1s'").expect("it is set");
    let interrupted = Refused::of(admin.batch_execute("reindex table concurrently outbox.events"));
    assert_eq!(interrupted.code, "57014", "{interrupted:?}");
    writer.batch_execute("commit").expect("it commits");
    for index in ["outbox.events_xid_idx_ccnew", "pg_toast.pg_toast_"] {
        let ill = check(&health(&stack.pg), "indexes");
        assert!(ill.status == "fail" && ill.detail.contains(index), "{ill:?}");
    }
    follow(&stack.pg, "postgres", &check(&health(&stack.pg), "indexes"));
    wait_well(&stack.pg, "indexes");
    stack.publish("more");
    wait_drained(&stack.pg, "default");
}

#[test]
fn tables_that_were_moved_renamed_or_given_away_are_named() {
    let stack = quick();
    stack.pg.exec("create schema elsewhere; create role somebody superuser");
    for breakage in [
        (
            "alter table outbox.cursors set schema elsewhere",
            "tables",
            "outbox.cursors is missing.",
        ),
        (
            "alter table outbox.events set schema elsewhere",
            "tables",
            "outbox.events is missing.",
        ),
        (
            "alter table outbox.events rename to messages",
            "tables",
            "outbox.events is missing.",
        ),
        (
            "alter table outbox.inbox rename to seen",
            "tables",
            "outbox.inbox is missing.",
        ),
        (
            "alter sequence outbox.events_seq_seq rename to numbers",
            "tables",
            "outbox.events_seq_seq is missing.",
        ),
        (
            "create table public.child () inherits (outbox.events)",
            "inheritance",
            "public.child inherits from outbox.events.",
        ),
        (
            "create table public.parent (source text); alter table outbox.events inherit public.parent",
            "inheritance",
            "outbox.events inherits from public.parent.",
        ),
        // Another table in its place, as somebody does who makes it partitioned.
        (
            "alter table outbox.events rename to events_old; \
             create table outbox.events (like outbox.events_old including all)",
            "tables",
            "outbox.events is not the table that this extension made",
        ),
        (
            "alter extension outbox_relay drop table outbox.inbox",
            "tables",
            "outbox.inbox is not the table that this extension made",
        ),
        (
            "alter table outbox.cursors owner to somebody",
            "owner",
            "outbox.cursors belongs to somebody, and the extension to postgres.",
        ),
    ] {
        break_and_mend(&stack, breakage);
    }
    // The schema itself.
    stack.pg.exec("alter schema outbox rename to inbox");
    let hint: String = stack.pg.one("select hint from inbox.health()");
    assert_eq!(hint, "Run ALTER SCHEMA inbox RENAME TO outbox;");
    stack.pg.exec(&hint["Run ".len()..]);
    stack.publish("last");
    wait_drained(&stack.pg, "default");
    wait_well(&stack.pg, "worker");
}

#[test]
fn functions_and_views_that_were_dropped_or_changed_are_restored() {
    let stack = quick();
    let facts = "select string_agg(concat_ws(' ', p.oid::regprocedure, p.prosrc, p.proacl, p.proconfig, p.prosecdef, p.prokind,
            obj_description(p.oid, 'pg_proc'), exists (select from pg_depend d where d.objid = p.oid and d.deptype = 'e')), '\n'
            order by p.oid::regprocedure::text)
        || (select string_agg(concat_ws(' ', c.relname, regexp_replace(pg_get_viewdef(c.oid), ' AS int[48]', '', 'g'), c.relacl, c.reloptions, obj_description(c.oid, 'pg_class'),
            exists (select from pg_depend d where d.objid = c.oid and d.deptype = 'e')), '\n' order by c.relname)
            from pg_class c where c.relnamespace = 'outbox'::regnamespace and c.relkind = 'v')
        from pg_proc p where p.pronamespace = 'outbox'::regnamespace";
    let made: String = stack.pg.one(facts);
    stack.pg.exec("create role somebody superuser");
    for (sql, words) in [
        (
            "alter extension outbox_relay drop function outbox.drain(interval); drop function outbox.drain(interval)",
            "outbox.drain(interval) is missing.",
        ),
        (
            "alter function outbox.wake() rename to wake_up; \
             alter extension outbox_relay drop function outbox.wake_up(); drop function outbox.wake_up()",
            "outbox.wake() is missing.",
        ),
        (
            "alter extension outbox_relay drop procedure outbox.purge(); drop procedure outbox.purge()",
            "outbox.purge() is missing.",
        ),
        (
            "alter extension outbox_relay drop function outbox.keep_rows(); drop function outbox.keep_rows() cascade",
            "outbox.keep_rows() is missing.",
        ),
        (
            "create or replace function outbox.event_health(old interval, out \"check\" text, out status text, out detail text, out hint text)
             returns setof record language sql as $$ select 'all', 'ok', 'fine', null $$",
            "outbox.event_health(interval) was changed.",
        ),
        (
            "alter function outbox.take_over(text) reset search_path",
            "outbox.take_over(text) was changed.",
        ),
        (
            "alter function outbox.erase(uuid) owner to somebody",
            "outbox.erase(uuid) belongs to somebody",
        ),
        (
            "alter extension outbox_relay drop view outbox.top; drop view outbox.top; \
             alter extension outbox_relay drop view outbox.event_status; drop view outbox.event_status",
            "The view outbox.event_status is missing. The view outbox.top is missing.",
        ),
    ] {
        break_and_mend(&stack, (sql, "functions", words));
        let now: String = stack.pg.one(facts);
        assert!(now == made, "after {sql}: {now}");
    }
    // All that begin with p, those that publish too: a few are named.
    stack.pg.exec(
        "create schema elsewhere;
         do $$
         declare f regprocedure;
         begin
             for f in select p.oid from pg_proc p where p.pronamespace = 'outbox'::regnamespace and p.proname ~ '^p' and p.prokind = 'f' loop
                 execute format('alter function %s set schema elsewhere', f);
             end loop;
         end $$",
    );
    let ill = wait_ill(&stack.pg, "functions", " more.");
    follow(&stack.pg, "postgres", &ill);
    wait_well(&stack.pg, "functions");
    stack.publish("last");
    wait_drained(&stack.pg, "default");
}

/// Columns whose default is a function of ours lose it when the function is dropped.
#[test]
fn a_function_that_was_dropped_with_all_that_needs_it_is_restored() {
    let stack = quick();
    stack.pg.exec(
        "alter extension outbox_relay drop function outbox.first_branch(); drop function outbox.first_branch() cascade",
    );
    for check in ["functions", "columns"] {
        let ill = wait_ill(&stack.pg, check, "first_branch");
        follow(&stack.pg, "postgres", &ill);
        wait_well(&stack.pg, check);
    }
    stack.publish("one");
    wait_drained(&stack.pg, "default");
}

/// One part that cannot look keeps no other from saying what is wrong.
#[test]
fn a_column_that_is_missing_hides_no_other_check() {
    let stack = quick();
    stack
        .pg
        .exec("alter table outbox.failed_events rename column failed_at to at");
    let checks = health(&stack.pg);
    assert_eq!(check(&checks, "columns").status, "fail");
    assert_eq!(check(&checks, "events").status, "fail");
    assert_eq!(check(&checks, "backend default").status, "ok");
    assert_eq!(check(&checks, "locks").status, "ok");
    follow(&stack.pg, "postgres", &check(&checks, "columns"));
    wait_well(&stack.pg, "columns");
}

/// Definitions are compared as Postgres writes them, and how it writes them is set.
#[test]
fn settings_of_a_session_or_database_are_no_change_of_an_object() {
    let stack = quick();
    stack
        .pg
        .exec("insert into outbox.routes (event_type, backend) values ('order.*', 'default')");
    let look = |db: &str, set: &str| {
        let mut client = stack.pg.client_db(db);
        client.batch_execute(set).expect("it can be set");
        let sql = "select string_agg(\"check\" || ': ' || detail, E'\\n') from outbox.health() where status = 'fail' or \"check\" = 'routes' and status <> 'ok'";
        let wrong: Option<String> = client.query_one(sql, &[]).expect("it looks").get(0);
        assert_eq!(wrong, None, "{db}: {set}");
        let restored: i64 = client
            .query_one("select outbox.restore_objects()", &[])
            .expect("it looks")
            .get(0);
        assert_eq!(restored, 0, "{db}: {set}");
    };
    for (number, setting) in ["quote_all_identifiers = on", "standard_conforming_strings = off"]
        .iter()
        .enumerate()
    {
        look("postgres", &format!("set {setting}"));
        let db = format!("db{number}");
        stack.pg.exec(&format!("create database {db}"));
        stack.pg.exec(&format!("alter database {db} set {setting}"));
        stack.pg.exec_db(
            &db,
            "create extension outbox_relay; update outbox.backends set enabled = false",
        );
        stack.pg.wait_worker(&db);
        for set in [
            "reset all",
            "set quote_all_identifiers = off; set standard_conforming_strings = on",
        ] {
            look(&db, set);
        }
    }
}
