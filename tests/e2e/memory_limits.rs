//! A session that gets no more memory fails with an error of its own. Where Rust gets none, it ends the process, and
//! that ends all sessions of the server. So nothing is copied there whose size others choose.

use kit::Stack;
use postgres::Client;

/// Statements of a publisher, who may also write backends and routes, with texts of some hundred megabytes.
const STATEMENTS: [&str; 18] = [
    "select outbox.publish_event('t', 's', backend => repeat('x', 200000000))",
    "select outbox.publish_event('t', 's', stream => repeat('x', 200000000))",
    "select outbox.publish_event('t', 's', event_id => repeat('x', 200000000)::text)",
    "select outbox.publish_event('t', 's', max_retries => repeat('1', 200000000)::text)",
    "select outbox.publish_event('t', 1, scheduled_at => repeat('x', 200000000)::text)",
    "select outbox.publish_event('t', 's', repeat('x', 200000000)::text)",
    "select outbox.publish_event('t', 's', ('\"' || repeat('\\u0041', 30000000) || '\"')::text)",
    "select outbox.publish_event('t', 's', data_bytes => convert_to(repeat('x', 200000000), 'UTF8'))",
    "insert into outbox.events (event_type, source, data) values ('t', 's', ('\"' || repeat('\\u0041', 30000000) || '\"')::json)",
    "insert into outbox.events (event_type, source, publisher_config) values ('t', 's', ('{\"k\": \"' || repeat('\\u0041', 30000000) || '\"}')::json)",
    "insert into outbox.events (event_type, source, backend) values ('t', 's', repeat('x', 200000000))",
    "select outbox.publish_events(jsonb_build_array(jsonb_build_object('event_type', repeat(E'\\n', 100000000))))",
    "select outbox.publish_events(jsonb_build_array(jsonb_build_object('data_base64', repeat('A', 200000000))))",
    "select outbox.publish_events(jsonb_build_array(jsonb_build_object(repeat('k', 200000000), 1)))",
    "update outbox.backends set stream_name = repeat('x', 200000000)",
    "insert into outbox.routes (backend, stream) values ('default', repeat('x', 200000000))",
    "select set_config('outbox_relay.default_backend', repeat('x', 60000000), false); select outbox.publish_event('t', 's')",
    "set outbox_relay.traceparent = '00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01';
     insert into outbox.events (event_type, source, publisher_config) values ('t', 's', ('{\"k\": \"' || repeat('x', 200000000) || '\"}')::json)",
];

/// Lets the process of a session have so many more megabytes. A server may do that for its own processes.
fn limit(admin: &mut Client, client: &mut Client, megabytes: u64) {
    let pid: i32 = client.query_one("select pg_backend_pid()", &[]).expect("a pid").get(0);
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).expect("the process lives");
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix("VmSize:"))
        .expect("Linux says");
    let size: u64 = line.trim().trim_end_matches(" kB").parse().expect("a number");
    let most = size * 1024 + megabytes * 1_000_000;
    admin
        .batch_execute(&format!(
            "copy (select 1) to program 'cat >/dev/null; prlimit --pid {pid} --as={most}:{most}'"
        ))
        .expect("util-linux");
}

/// Runs statements of a publisher, each in a session that gets so many more megabytes. None ends another session.
fn assert_bystander_survives(statements: impl IntoIterator<Item = (&'static str, u64)>) {
    let stack = Stack::start();
    stack.pg.exec(
        "create role publisher login; select outbox.grant_publisher('publisher');
         grant select, insert, update on outbox.backends, outbox.routes to publisher",
    );
    let mut bystander = stack.pg.client();
    for (sql, megabytes) in statements {
        let mut client = stack.pg.client_as("publisher", "postgres");
        client
            .batch_execute("select outbox.publish_event('t', 's')")
            .expect("published");
        limit(&mut bystander, &mut client, megabytes);
        let outcome = client.batch_execute(sql);
        let code = outcome
            .as_ref()
            .err()
            .and_then(|error| error.code())
            .map(|code| code.code().to_owned());
        println!("{megabytes} MB: {code:?}: {}", &sql[..sql.len().min(120)]);
        let is_there = bystander.batch_execute("select 1");
        assert!(
            is_there.is_ok(),
            "the server has ended all sessions: {megabytes} MB, {sql}"
        );
    }
    assert!(
        !stack.pg.log().contains("was terminated by signal"),
        "a process has crashed"
    );
}

#[test]
fn a_session_that_gets_no_memory_ends_no_other() {
    assert_bystander_survives(
        STATEMENTS
            .iter()
            .flat_map(|sql| [250, 450, 700].map(|megabytes| (*sql, megabytes))),
    );
}

/// Fills the memory of the process to the last kilobyte, and then publishes.
const FULL: &str = "do $$ declare kept text[] := '{}'; size integer := 64000000; begin
     loop
         begin
             kept[coalesce(array_length(kept, 1), 0) + 1] := repeat('x', size);
         exception when out_of_memory then
             exit when size < 500;
             size := size / 2;
         end;
     end loop;
     for i in 1 .. 20 loop
         begin perform outbox.publish_event('t', 's', to_jsonb(repeat('y', 1000 * i))); exception when out_of_memory then null; end;
         begin perform outbox.publish_events('[1]'); exception when out_of_memory or invalid_parameter_value then null; end;
         begin insert into outbox.events (event_type, source, data) values ('t', 's', '{}'); exception when out_of_memory then null; end;
         begin perform outbox.published_here(); exception when out_of_memory then null; end;
     end loop;
 end $$";

/// An array whose elements fill memory bit by bit, so that hardly any is left for the error.
const ARRAY: &str = "select outbox.publish_events((select jsonb_agg(1) from generate_series(1, 2000000)))";

/// pgrx copies each ERROR. Where the copy failed too, that was a PANIC.
#[test]
fn an_error_that_lacks_memory_ends_no_other_session() {
    let full = [20, 27, 34, 41].map(|megabytes| (FULL, megabytes));
    let array = (0..24).map(|step| (ARRAY, 4 + 13 * step));
    assert_bystander_survives(full.into_iter().chain(array));
}
