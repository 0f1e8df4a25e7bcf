//! A session that gets no more memory fails with an error of its own. Where Rust gets none, it ends the process, and
//! that ends all sessions of the server. So nothing is copied there whose size others choose.

use kit::Stack;
use postgres::Client;

/// Statements of a publisher with texts of some hundred megabytes.
const STATEMENTS: [&str; 15] = [
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

#[test]
fn a_session_that_gets_no_memory_ends_no_other() {
    let stack = Stack::start();
    stack
        .pg
        .exec("create role publisher login; select outbox.grant_publisher('publisher')");
    let mut bystander = stack.pg.client();
    for sql in STATEMENTS {
        for megabytes in [250, 450, 700] {
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
    }
    assert!(
        !stack.pg.log().contains("was terminated by signal"),
        "a process has crashed"
    );
}
