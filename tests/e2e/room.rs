//! Roles that write many or large backends or routes, which the worker and all publishers keep in memory.

use std::time::Duration;

use kit::process::memory_kb;
use kit::{Bystander, Refused, Stack, wait_until};
use postgres::Client;

/// A role that may write backends and routes.
fn stack() -> Stack {
    let stack = Stack::start();
    stack.pg.exec(
        "create role writer login; grant usage on schema outbox to writer;
         grant select, insert, update, delete on outbox.backends, outbox.routes to writer",
    );
    stack
}

fn backends(from: usize, to: usize) -> String {
    format!(
        "insert into outbox.backends (name, host, port) select 'b' || n, '127.0.0.1', 1 from generate_series({from}, {to}) n"
    )
}

#[track_caller]
fn run(client: &mut Client, sql: &str) {
    client
        .batch_execute(sql)
        .unwrap_or_else(|error| panic!("{sql}: {error:?}"));
}

#[test]
fn more_backends_or_routes_than_fit_are_refused() {
    let stack = stack();
    let mut writer = stack.pg.client_as("writer", "postgres");
    let refused = Refused::of(writer.batch_execute(&backends(1, 100_000)));
    assert_eq!(
        (refused.code.as_str(), refused.message.as_str()),
        ("54000", "there would be too many backends")
    );
    let detail = refused.detail.clone().unwrap_or_default();
    assert!(
        detail.starts_with("outbox.backends would have 100001 rows, with "),
        "{refused:?}"
    );
    assert!(
        detail.ends_with(" bytes of text; at most 5000 and 4194304 are allowed."),
        "{refused:?}"
    );
    run(&mut writer, &backends(1, 4_999));
    for sql in [
        backends(5_000, 5_000),
        "update outbox.backends set static_fields = jsonb_build_object('k', repeat('x', 1000))".to_owned(),
        "update outbox.backends set stream_name = '{event_type}', own_stream = repeat('x', 1000)".to_owned(),
        "insert into outbox.backends (name, static_fields) values ('one', '{}') on conflict do nothing".to_owned(),
        "insert into outbox.backends (name) values ('b1') on conflict (name) do update set static_fields = jsonb_build_object('k', repeat('x', 60000));
         insert into outbox.routes (backend) values ('b1');
         insert into outbox.backends (name) values ('more')".to_owned(),
    ] {
        assert_eq!(Refused::of(writer.batch_execute(&sql)).code, "54000", "{sql}");
    }
    run(
        &mut writer,
        "update outbox.backends set enabled = false where name like 'b%'",
    );
    run(&mut writer, "delete from outbox.backends where name = 'b4999'");
    run(&mut writer, "insert into outbox.backends (name) values ('another')");
    for sql in [
        "insert into outbox.routes (event_type, backend) select 't' || n, 'default' from generate_series(1, 5001) n",
        // Asterisks do not count for the length of a pattern.
        "insert into outbox.routes (event_type, backend) select n || repeat('*', 200000), 'default' from generate_series(1, 25) n",
        "insert into outbox.routes (stream, backend) select n || repeat('x', 1000), 'default' from generate_series(1, 4500) n",
    ] {
        let refused = Refused::of(writer.batch_execute(sql));
        assert_eq!(
            (refused.code.as_str(), refused.message.as_str()),
            ("54000", "there would be too many routes"),
            "{sql}"
        );
    }
    run(
        &mut writer,
        "insert into outbox.routes (event_type, backend) select 't' || n, 'default' from generate_series(1, 5000) n",
    );
}

/// Each finds room, if it does not see what the other does.
#[test]
fn transactions_at_the_same_time_share_the_room() {
    let stack = stack();
    for level in ["read committed", "repeatable read", "serializable"] {
        let [mut first, mut second] = [0, 1].map(|_| stack.pg.client_as("writer", "postgres"));
        for client in [&mut first, &mut second] {
            run(
                client,
                &format!("begin isolation level {level}; select from outbox.backends"),
            );
        }
        run(&mut first, &backends(1, 3_000));
        let pid: i32 = second.query_one("select pg_backend_pid()", &[]).expect("a pid").get(0);
        let waiting = std::thread::spawn(move || Refused::of(second.batch_execute(&backends(3_001, 6_000))));
        let is_waiting =
            format!("select wait_event_type is not distinct from 'Lock' from pg_stat_activity where pid = {pid}");
        wait_until("the second to wait", || stack.pg.one::<bool>(&is_waiting));
        run(&mut first, "commit");
        let refused = waiting.join().expect("refused");
        let codes = match level {
            // Postgres itself may notice that they depend on each other.
            "serializable" => &["54000", "40001"][..],
            _ => &["54000"],
        };
        assert!(codes.contains(&refused.code.as_str()), "{level}: {refused:?}");
        stack.pg.exec("delete from outbox.backends where name <> 'default'");
    }
}

/// Of few backends, an open transaction keeps nobody from adding others.
#[test]
fn a_few_backends_wait_for_nobody() {
    let stack = stack();
    let [mut first, mut second] = [0, 1].map(|_| stack.pg.client_as("writer", "postgres"));
    run(&mut first, "begin");
    run(&mut first, &backends(1, 50));
    run(&mut second, "set lock_timeout = '5s'");
    run(&mut second, &backends(51, 90));
    run(&mut first, "commit");
}

/// As many as there may be, none of which can be reached.
#[test]
fn as_many_backends_as_there_may_be_hold_up_nobody() {
    let stack = stack();
    stack.publish("first");
    stack.wait_events(1);
    let worker = stack.pg.wait_worker("postgres");
    let bystander = Bystander::start(&stack);
    let mut writer = stack.pg.client_as("writer", "postgres");
    run(
        &mut writer,
        "insert into outbox.backends (name, host, port, static_fields)
         select 'b' || n, '127.0.0.1', 1, jsonb_build_object('k', repeat('x', 750)) from generate_series(1, 4990) n",
    );
    std::thread::sleep(Duration::from_secs(5));
    let noticed = bystander.stop(&stack);
    noticed.assert_undisturbed("5,000 backends with 4 MB of texts");
    assert!(noticed.grown_kb() < 96 * 1_024, "{noticed:?}");
    println!("the worker has {} KiB", memory_kb(worker));
}
