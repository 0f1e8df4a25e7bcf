//! Keys of guards are no streams, in whatever way a role names a stream: an entry there would stop the backend whose
//! guard it is.

use std::io::Write;

use kit::{Refused, Stack, wait_drained, wait_eq};
use postgres::Client;

/// The key of a guard that does not exist yet, of another backend or another server.
const GUARD: &str = "outbox_relay:guard:0b0e63a2-9a3c-4f2e-8a57-6a1f1f0f2b11:5:2";

/// COPY of one event, with these columns besides type and source.
fn copied(client: &mut Client, columns: &str, values: &str) -> Result<u64, postgres::Error> {
    let sql = format!("copy outbox.events (event_type, source, {columns}) from stdin");
    let mut copy = client.copy_in(&sql).expect("begun");
    writeln!(copy, "t\ts\t{values}").expect("written");
    copy.finish()
}

#[test]
fn no_row_of_a_backend_and_no_setting_names_the_key_of_a_guard() {
    let stack = Stack::start();
    stack.pg.exec(
        "create role keeper login; grant usage on schema outbox to keeper;
         grant select, insert, update on outbox.backends to keeper; grant select, insert, update on outbox.routes to keeper;
         update outbox.backends set enabled = false; select outbox.publish_event('waits', 's')",
    );
    let mut keeper = stack.pg.client_as("keeper", "postgres");
    for sql in [
        "update outbox.backends set stream_name = 'GUARD'",
        "update outbox.backends set stream_name = 'GUARD{event_type}'",
        // The stream of events that were published before there was a template.
        "update outbox.backends set stream_name = '{event_type}', own_stream = 'GUARD'",
        "insert into outbox.backends (name, stream_name) values ('new', 'GUARD')",
        "insert into outbox.backends (name, stream_name, own_stream) values ('new', '{event_type}', 'GUARD')",
        "insert into outbox.routes (event_type, backend, stream) values ('t', 'default', 'GUARD')",
        "insert into outbox.routes (event_type, backend, stream) values ('t', 'default', 'GUARD{event_type}')",
    ] {
        let refused = Refused::of(keeper.batch_execute(&sql.replace("GUARD", GUARD)));
        assert_eq!(refused.code, "23514", "{sql}: {refused:?}");
    }
    for value in [GUARD, "outbox_relay:{event_type}"] {
        let refused = Refused::of(
            stack
                .pg
                .client()
                .batch_execute(&format!("alter system set outbox_relay.redis_stream_name = '{value}'")),
        );
        assert_eq!(refused.code, "22023", "{value}: {refused:?}");
    }
    stack.pg.exec("update outbox.backends set enabled = true");
    stack.wait_events(1);
    assert_eq!(stack.redis.xlen(GUARD), 0);
}

/// A row may carry the number of its backend, which decides while a dump is restored. It decides for nobody else.
#[test]
fn roles_that_may_insert_whole_rows_go_only_where_publishers_may_go() {
    let stack = Stack::start();
    stack.pg.exec(
        "update outbox.backends set allowed_streams = '{events,a}';
         insert into outbox.backends (name, enabled) values ('second', false);
         create role inserter login; select outbox.grant_publisher('inserter', '{second}', '{own}');
         grant insert on outbox.events to inserter;
         create role loader login in role pg_write_all_data; grant usage on schema outbox to loader",
    );
    let mut inserter = stack.pg.client_as("inserter", "postgres");
    copied(&mut inserter, "backend, backend_number, stream", "second\t2\town").expect("within its limits");
    for values in [
        format!("nope\t1\t{GUARD}"),
        "nope\t1\tevents".to_owned(),
        "default\t1\tevents".to_owned(),
        format!("second\t2\t{GUARD}"),
    ] {
        let code = Refused::of(copied(&mut inserter, "backend, backend_number, stream", &values)).code;
        assert!(["42501", "42704"].contains(&code.as_str()), "{code}: {values}");
    }
    let mut loader = stack.pg.client_as("loader", "postgres");
    for (columns, values) in [
        ("backend, backend_number, stream", format!("nope\t1\t{GUARD}")),
        ("backend, backend_number, stream", "default\t1\tof-others".to_owned()),
        ("backend, backend_number, stream, xid", format!("nope\t1\t{GUARD}\t7")),
        (
            "backend, backend_number, stream, xid",
            "default\t1\tof-others\t7".to_owned(),
        ),
    ] {
        let code = Refused::of(copied(&mut loader, columns, &values)).code;
        assert!(["42501", "42704"].contains(&code.as_str()), "{code}: {values}");
    }
    // The name decides.
    copied(&mut inserter, "backend, backend_number, stream", "second\t1\town").expect("as if it gave no number");
    copied(&mut loader, "backend, backend_number, stream", "default\t2\ta").expect("as if it gave no number");
    stack.redis.wait_entries("a", 1);
    // Nor is a guard written by whoever restores.
    let code = Refused::of(copied(
        &mut stack.pg.client(),
        "backend, backend_number, stream",
        &format!("nope\t1\t{GUARD}"),
    ))
    .code;
    assert_eq!(code, "42501");
    let sql = "select count(*) from outbox.events where backend_number = 1 and stream is distinct from 'a'";
    assert_eq!(stack.pg.one::<i64>(sql), 0);
    assert_eq!(stack.redis.xlen(GUARD), 0);
}

/// It changes rows of events that wait, which nobody checks again.
#[test]
fn a_role_that_may_write_all_rows_makes_no_entry_in_a_guard() {
    let stack = Stack::with(&[("outbox_relay.max_retries", "0")]);
    stack.redis.call(&["SET", "taken", "no stream"]);
    stack.pg.exec(
        "create role writer login in role pg_write_all_data, pg_read_all_data; grant usage on schema outbox to writer;
         select outbox.publish_event('fails', 's', stream => 'taken');
         select outbox.publish_event('later', 's', scheduled_at => now() + interval '1 hour')",
    );
    let failed = || -> i64 { stack.pg.one("select count(*) from outbox.failed_events") };
    wait_eq("the failed event", 1, failed);
    let mut writer = stack.pg.client_as("writer", "postgres");
    for table in ["failed_events", "scheduled_events"] {
        writer
            .batch_execute(&format!("update outbox.{table} set stream = '{GUARD}'"))
            .expect("it may write all data");
    }
    writer
        .batch_execute("update outbox.scheduled_events set scheduled_at = now()")
        .expect("it may write all data");
    stack.pg.exec("select outbox.retry_failed()");
    stack.publish("last");
    stack.wait_events(1);
    wait_drained(&stack.pg, "default");
    wait_eq("failed events", 2, failed);
    let why: Vec<String> = stack
        .pg
        .client()
        .query("select last_error from outbox.failed_events order by event_type", &[])
        .expect("read")
        .iter()
        .map(|row| row.get(0))
        .collect();
    assert!(why[1].starts_with("stream \"outbox_relay:guard:"), "{why:?}");
    assert_eq!(stack.redis.call(&["EXISTS", GUARD]), redis::Value::Int(0));
}
