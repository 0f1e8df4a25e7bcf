//! Internal functions that are called in other ways than intended.

use kit::{Refused, Stack, types, wait_until};

/// A trigger function that is called in another way fails with a clear error, and no process ends.
#[test]
fn internal_functions_refuse_other_uses() {
    let stack = Stack::start();
    let pid = stack.pg.pid();
    let mut client = stack.pg.client();
    client
        .batch_execute("create table public.t (id int); create view public.v as select 1 as id")
        .unwrap();
    let functions = ["complete_event", "confirm_event", "backends_changed", "expect_room"];
    let mut tried = 0;
    for function in functions {
        for table in [
            "public.t",
            "outbox.events",
            "outbox.scheduled_events",
            "outbox.failed_events",
            "outbox.backends",
        ] {
            for timing in ["before", "after"] {
                for operation in ["insert", "update", "delete", "truncate"] {
                    for level in ["row", "statement"] {
                        let create = format!(
                            "create trigger a_tried {timing} {operation} on {table} for each {level} execute function outbox.{function}()"
                        );
                        client.batch_execute("begin").unwrap();
                        if client.batch_execute(&create).is_err() {
                            client.batch_execute("rollback").unwrap();
                            continue;
                        }
                        let statement = match (table, operation) {
                            ("public.t", "insert") => "insert into public.t values (1)".to_owned(),
                            ("outbox.events", "insert") => "insert into outbox.events (event_type, source) values ('t', 's')".to_owned(),
                            ("outbox.scheduled_events", "insert") => {
                                "select outbox.publish_event('t', 's', scheduled_at => '2900-01-01')".to_owned()
                            }
                            ("outbox.failed_events", "insert") => "insert into outbox.failed_events (seq, xid, created_at, event_id, \
                                 backend_number, event_type, source, backend, attempts, last_error) \
                                 values (1, '3', now(), gen_random_uuid(), 1, 't', 's', 'default', 1, 'e')"
                                .to_owned(),
                            ("outbox.backends", "insert") => "insert into outbox.backends (name) values ('x')".to_owned(),
                            ("public.t", "update") => "insert into public.t values (1); update public.t set id = 2".to_owned(),
                            ("outbox.backends", "update") => "update outbox.backends set enabled = true".to_owned(),
                            (table, "update") => format!("update {table} set source = 'x'"),
                            ("public.t", "delete") => "insert into public.t values (1); delete from public.t".to_owned(),
                            ("outbox.backends", "delete") => "insert into outbox.backends (name) values ('x'); delete from outbox.backends where name = 'x'".to_owned(),
                            (table, "delete") => format!("delete from {table}"),
                            ("outbox.backends", _) => "truncate outbox.backends, outbox.routes".to_owned(),
                            (table, _) => format!("truncate {table}"),
                        };
                        let outcome = client.batch_execute(&statement);
                        if let Err(error) = outcome {
                            let code = error
                                .as_db_error()
                                .unwrap_or_else(|| panic!("{create}: {error:?}"))
                                .code()
                                .code()
                                .to_owned();
                            assert!(["39P01", "55000"].contains(&code.as_str()), "{create}: {error:?}");
                        }
                        client.batch_execute("rollback").unwrap();
                        tried += 1;
                    }
                }
            }
        }
    }
    assert!(tried > 150, "{tried}");
    // The simplest of these calls is refused, not just ignored.
    for level in ["row", "statement"] {
        client
            .batch_execute(&format!(
                "begin; create trigger a before insert on public.t for each {level} execute function outbox.complete_event()"
            ))
            .unwrap();
        assert_eq!(
            Refused::of(client.simple_query("insert into public.t values (1)")).code,
            "39P01"
        );
        client.batch_execute("rollback").unwrap();
    }
    client
        .batch_execute(
            "create trigger a instead of insert on public.v for each row execute function outbox.complete_event()",
        )
        .unwrap();
    assert_eq!(
        Refused::of(client.simple_query("insert into public.v values (1)")).code,
        "39P01"
    );
    // Directly, with other declarations than the extension's, and with nulls.
    let library: String = stack
        .pg
        .one("select probin from pg_proc where proname = 'publish_events'");
    for (symbol, arguments, result) in [
        ("complete_event", "", "int"),
        ("confirm_event", "int", "int"),
        ("backends_changed", "", "int"),
        ("publish_event", "", "uuid"),
        ("publish_event", "text", "uuid"),
        ("publish_event_of_any_types", "", "uuid"),
        ("publish_event_of_any_types", "text", "uuid"),
        ("publish_events", "", "setof uuid"),
        ("publish_events", "jsonb", "uuid"),
        ("publish_events", "jsonb", "setof uuid"),
        ("fan_out", "", "int"),
        ("check_route", "", "int"),
        ("plan_first_branch", "", "int"),
        ("plan_first_branch", "text", "int"),
        ("matches", "", "bool"),
        ("matches", "text", "bool"),
        ("hash_slot", "", "int"),
        ("hash_slot", "text", "int"),
        ("hash_tag_wrapper", "", "text"),
        ("hash_tag_wrapper", "int", "text"),
        ("backlog_wrapper", "", "setof record"),
        ("has_waiting_events_wrapper", "int", "bool"),
        ("purge_piece_wrapper", "int", "bigint"),
        ("worker_status_wrapper", "int", "int"),
        ("wake_wrapper", "int", "void"),
        ("here_wrapper", "int", "text"),
    ] {
        let create = format!(
            "create or replace function public.f({arguments}) returns {result} language c as '{library}', '{symbol}'"
        );
        client
            .batch_execute(&format!("drop function if exists public.f; {create}"))
            .unwrap();
        let call = if arguments.is_empty() {
            "select public.f()".to_owned()
        } else {
            format!("select public.f(null::{arguments})")
        };
        if let Err(error) = client.simple_query(&call) {
            assert!(error.as_db_error().is_some(), "{create}: {error:?}");
        }
        client.batch_execute("drop function public.f").unwrap();
    }
    assert_eq!(stack.pg.pid(), pid);
    stack.publish("alive");
    assert_eq!(types(&stack.wait_events(1)), ["alive"]);
    wait_until("no crash in the log", || {
        !stack.pg.log().contains("was terminated by signal")
    });
}
