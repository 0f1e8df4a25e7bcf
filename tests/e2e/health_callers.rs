//! `outbox.health()` and what else an administrator or a probe calls: the same is said whatever the caller's session is
//! set to, and whatever transaction it is in.

use kit::{Refused, Stack, process, wait_drained};
use nix::sys::signal::Signal;
use postgres::Client;

use crate::health::{quick, wait_well};

/// What is not ok, in this session.
fn faults(client: &mut Client) -> Option<String> {
    let sql = "select string_agg(concat_ws(' ', \"check\" || ':', detail, hint), E'\\n') from outbox.health() where status <> 'ok'";
    client.query_one(sql, &[]).expect("it answers").get(0)
}

fn setting_exists(stack: &Stack, name: &str) -> bool {
    stack
        .pg
        .one(&format!("select count(*) > 0 from pg_settings where name = '{name}'"))
}

fn well() -> Stack {
    let stack = quick();
    stack.publish("one");
    wait_drained(&stack.pg, "default");
    wait_well(&stack.pg, "backend default");
    stack
}

#[test]
fn a_session_that_may_read_no_views_is_told_the_same() {
    let stack = well();
    if !setting_exists(&stack, "restrict_nonsystem_relation_kind") {
        return;
    }
    let mut client = stack.pg.client();
    let id = stack.publish("two");
    let set = "set restrict_nonsystem_relation_kind = 'view, foreign-table'";
    client.batch_execute(set).expect("it is set");
    assert_eq!(faults(&mut client), None);
    let sent = client.query_one("select outbox.wait_published($1)", &[&id]);
    assert!(sent.expect("it answers").get::<_, bool>(0));
    // The session itself stays restricted, also in the same transaction, and after a SET LOCAL.
    for begin in ["begin", "begin; set local restrict_nonsystem_relation_kind = 'view'"] {
        client.batch_execute(begin).expect("it begins");
        assert_eq!(faults(&mut client), None);
        let refused = Refused::of(client.query("select * from outbox.status", &[]));
        assert_eq!(refused.code, "55000", "{refused:?}");
        client.batch_execute("rollback").expect("it ends");
    }
    // So may be the worker.
    stack.pg.exec(&format!("alter database postgres {set}"));
    process::signal(stack.pg.wait_worker("postgres"), Signal::SIGTERM);
    stack.publish("three");
    stack.wait_events(3);
    wait_well(&stack.pg, "worker");
    assert_eq!(faults(&mut stack.pg.client()), None);
}

#[test]
fn settings_and_transactions_of_the_caller_change_nothing() {
    let stack = well();
    stack.pg.exec("create role watcher login; grant pg_monitor to watcher");
    for set in [
        "set search_path = ''",
        "set search_path = nowhere",
        "set row_security = off",
        "set plpgsql.extra_errors = 'all'",
        "set plan_cache_mode = force_custom_plan",
        "set plan_cache_mode = force_generic_plan",
        "set datestyle = 'German'; set intervalstyle = 'sql_standard'; set timezone = 'Asia/Kathmandu'",
        "set intervalstyle = 'iso_8601'; set bytea_output = 'escape'; set extra_float_digits = -15",
        "set standard_conforming_strings = off; set escape_string_warning = off; set backslash_quote = off",
        "set transform_null_equals = on; set array_nulls = off; set quote_all_identifiers = on",
        "set enable_nestloop = off; set enable_indexscan = off; set enable_seqscan = off; set enable_bitmapscan = off",
        "set enable_hashjoin = off; set enable_mergejoin = off; set enable_sort = off; set enable_material = off",
        "set from_collapse_limit = 1; set join_collapse_limit = 1; set geqo_threshold = 2",
        "set jit_above_cost = 0; set jit_inline_above_cost = 0; set jit_optimize_above_cost = 0",
        "set parallel_setup_cost = 0; set parallel_tuple_cost = 0; set min_parallel_table_scan_size = 0",
        "set statement_timeout = '30s'; set idle_in_transaction_session_timeout = '10s'",
        "set default_transaction_read_only = on",
        "set default_transaction_isolation = serializable",
        "set synchronous_commit = off",
        "begin read only",
        "begin isolation level serializable, read only, deferrable",
        "begin isolation level repeatable read; select 1",
        "begin isolation level serializable; select outbox.publish_event('a', 's')",
        "begin; savepoint a; create table outbox_gone (); rollback to a",
        "begin; declare c cursor with hold for select * from outbox.status; fetch c",
    ] {
        for role in ["postgres", "watcher"] {
            if role == "watcher" && (set.contains("publish_event") || set.contains("create")) {
                continue;
            }
            let mut client = stack.pg.client_as(role, "postgres");
            client
                .batch_execute(set)
                .unwrap_or_else(|error| panic!("{set}: {error:?}"));
            assert_eq!(faults(&mut client), None, "{role}: {set}");
            let read = "select (select count(*) from outbox.status) + (select count(*) from outbox.backend_status)
                + (select least(count(*), 1) from outbox.event_status) + (select least(count(*), 1) from outbox.metrics)
                + (select count(*) from outbox.top) + (select 0 * count(*) from outbox.consumers)
                + (select count(*) from outbox.attached_tables)";
            let count: i64 = client.query_one(read, &[]).expect(set).get(0);
            assert_eq!(count, 5, "{role}: {set}");
        }
    }
}

/// A backend that only this session uses is corrected in this session.
#[test]
fn a_default_backend_of_the_session_is_reset_there() {
    let stack = well();
    let ask = |client: &mut Client| {
        let sql = "select detail, hint from outbox.health() where \"check\" = 'default backend'";
        let row = client.query_one(sql, &[]).expect("a row");
        (row.get::<_, String>(0), row.get::<_, Option<String>>(1))
    };
    let follow = |client: &mut Client| {
        let (detail, hint) = ask(client);
        assert!(detail.contains("is \"gone\""), "{detail}");
        let hint = hint.expect("a hint");
        client
            .batch_execute(hint.strip_prefix("Run ").expect("a command"))
            .unwrap_or_else(|error| panic!("{hint}: {error:?}"));
        hint
    };
    let mut client = stack.pg.client();
    client
        .batch_execute("set outbox_relay.default_backend = 'gone'")
        .expect("it is set");
    follow(&mut client);
    assert_eq!(ask(&mut client).1, None);
    // As an argument of the connection (PGOPTIONS), where a RESET does not help.
    let mut config = stack.pg.config("postgres", "postgres");
    config.options("-c outbox_relay.default_backend=gone");
    let mut client = config.connect(postgres::NoTls).expect("a session");
    follow(&mut client);
    assert_eq!(ask(&mut client).1, None);
    // Of the database: what the hint does counts for sessions that begin after it.
    stack
        .pg
        .exec("alter database postgres set outbox_relay.default_backend = 'gone'");
    let hint = follow(&mut stack.pg.client());
    assert_eq!(hint, "Run ALTER DATABASE postgres RESET outbox_relay.default_backend;");
    assert_eq!(ask(&mut stack.pg.client()).1, None);
}

/// An ERROR that means that the transaction has to be run again is no finding.
#[test]
fn an_error_that_is_no_change_of_the_extension_is_not_called_one() {
    let stack = well();
    let mut client = stack.pg.client();
    let mut fail = |code: &str| {
        let replace = format!(
            "create or replace function outbox.route_health(out \"check\" text, out status text, out detail text, out hint text) \
             returns setof record language plpgsql as $$ begin raise exception using errcode = '{code}', message = 'so it is'; end $$"
        );
        stack.pg.exec(&replace);
        let sql = "select hint from outbox.health() where \"check\" = 'routes' and detail = 'This cannot be looked at: so it is.'";
        client.query_one(sql, &[]).map(|row| row.get::<_, String>(0))
    };
    for code in ["40001", "40P01"] {
        assert_eq!(Refused::of(fail(code)).code, code);
    }
    assert!(
        fail("42703")
            .expect("a row")
            .starts_with("Something of the extension was changed")
    );
    assert!(fail("54001").expect("a row").contains("FROM pg_settings"));
}
