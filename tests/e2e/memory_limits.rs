//! A session that gets no more memory fails with an error of its own. Where Rust gets none, it ends the process, and
//! that ends all sessions of the server. So nothing is copied there whose size others choose.

use crate::moving_in;
use kit::stack::STREAM;
use kit::{LIMIT, Postgres, Redis, Stack, eventually, ids, standing, wait_until};
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

/// Lets a process have so many more kilobytes, or any number. A server may do that for its own processes.
fn limit(admin: &mut Client, pid: i32, kilobytes: Option<u64>) {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).expect("the process lives");
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix("VmSize:"))
        .expect("Linux says");
    let size: u64 = line.trim().trim_end_matches(" kB").parse().expect("a number");
    let most = kilobytes.map_or("unlimited".to_owned(), |more| ((size + more) * 1024).to_string());
    admin
        .batch_execute(&format!(
            "copy (select 1) to program 'cat >/dev/null; prlimit --pid {pid} --as={most}:'"
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
    assert_survives(&stack, "publisher", statements);
}

/// The same of a role's statements on this stack.
fn assert_survives(stack: &Stack, role: &str, statements: impl IntoIterator<Item = (impl AsRef<str>, u64)>) {
    let mut bystander = stack.pg.client();
    for (sql, megabytes) in statements {
        let sql = sql.as_ref();
        let mut client = stack.pg.client_as(role, "postgres");
        // Our code is loaded.
        client
            .batch_execute("begin; select outbox.publish_event('t', 's'); rollback")
            .expect("published");
        let pid: i32 = client.query_one("select pg_backend_pid()", &[]).expect("a pid").get(0);
        limit(&mut bystander, pid, Some(megabytes * 1_000));
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

/// Further fields of which there are many take much more memory than their text.
const FIELDS: &str = "select outbox.publish_event('t', 's',
    publisher_config => (select jsonb_object_agg('k' || n, 1) from generate_series(1, 60000) n))";

/// Before: "memory allocation of 2621440 bytes failed", and the end of all sessions.
#[test]
fn a_session_without_memory_for_many_fields_ends_no_other() {
    assert_bystander_survives((3..14).map(|step| (FIELDS, 5 * step)));
}

/// pgrx copies each ERROR. Where the copy failed too, that was a PANIC.
#[test]
fn an_error_that_lacks_memory_ends_no_other_session() {
    let full = [20, 27, 34, 41].map(|megabytes| (FULL, megabytes));
    let array = (0..24).map(|step| (ARRAY, 4 + 13 * step));
    assert_bystander_survives(full.into_iter().chain(array));
}

/// Events that were sent or have failed, rows of tables that are moved in, and a file, each with texts of 12 MB.
const LARGE: &str = "
    create function large() returns jsonb language sql as $$ select to_jsonb(repeat('x', 12000000)) $$;
    create table old_rows (id uuid, aggregatetype text, aggregateid text, type text, payload jsonb);
    insert into old_rows select gen_random_uuid(), 'a', n::text, 't', large() from generate_series(1, 3) n;
    insert into outbox_events (data) select large() from generate_series(1, 3);
    create table orders (id serial primary key, data jsonb);
    insert into orders (data) select large() from generate_series(1, 3);
    select outbox.attach_table('orders');
    select outbox.publish_event('sent', 's', large()) from generate_series(1, 3);
    select outbox.publish_event('failed', 's', large(), stream => 'taken', max_retries => 0) from generate_series(1, 3)";

/// Acts of a superuser, who is an owner and a consumer too.
const ACTS: [&str; 21] = [
    "copy outbox.events (event_type, source, data) from '{file}'",
    "insert into outbox.events (event_type, source, data) select 't', 's', data from orders",
    "select outbox.publish_events((select jsonb_agg(jsonb_build_object('event_type', 't', 'source', 's', 'data', data)) from orders))",
    "insert into orders (data) select data from orders",
    "update orders set data = jsonb_build_array(data)",
    "delete from orders",
    "select * from outbox.import_debezium('old_rows', dry_run => false, ambiguous => 'send', backend => 'default')",
    "select * from outbox.import_django_broadcaster('outbox_events', dry_run => false)",
    "insert into outbox_events (data) select data from orders",
    "select outbox.consume_once(repeat('x', 200000000), gen_random_uuid())",
    "select count(*) from outbox.consume_once('c', (select array_agg(gen_random_uuid()) from generate_series(1, 3000000)))",
    "select outbox.retry_failed()",
    "call outbox.retry_all_failed()",
    "select outbox.replay('default', now() - interval '1 day')",
    "select outbox.preview(event_id) from outbox.events",
    "select outbox.erase(event_id) from outbox.events",
    "select * from outbox.health(); select * from outbox.status; select * from outbox.consumers; select * from outbox.metrics",
    "select * from outbox.top; select * from outbox.event_status; select * from outbox.events",
    "insert into outbox.routes (event_type, backend) select 't' || n, 'default' from generate_series(1, 100000) n",
    "insert into outbox.backends (name, host) select 'b' || n, 'h' from generate_series(1, 100000) n",
    "drop extension outbox_relay cascade",
];

#[test]
fn acts_that_get_no_memory_end_no_other_session() {
    let stack = Stack::with(&[("outbox_relay.max_event_size", "64MB")]);
    stack.redis.call(&["SET", "taken", "x"]);
    stack.pg.exec(moving_in::TABLE);
    stack.pg.exec(moving_in::MODEL);
    stack.pg.exec(LARGE);
    wait_until("what was published is sent or has failed", || {
        stack.redis.xlen(STREAM) == 3 && standing(&stack.pg, "default").failed == 3
    });
    let file = stack.pg.data_dir().join("events.copy");
    let file = file.to_str().expect("a path of the test's");
    stack
        .pg
        .exec(&format!("copy (select 't', 's', data from orders) to '{file}'"));
    let acts = ACTS
        .iter()
        .flat_map(|act| [2, 25, 50, 100, 160].map(|megabytes| (act.replace("{file}", file), megabytes)));
    // A procedure that commits cannot be called within a transaction.
    let undone = |act: String| match act.starts_with("call") {
        true => act,
        false => format!("begin; {act}; rollback"),
    };
    assert_survives(
        &stack,
        "postgres",
        acts.map(|(act, megabytes)| (undone(act), megabytes)),
    );
    assert!(
        !stack.pg.log().contains("FATAL:  out of memory"),
        "a session has ended, where an ERROR was possible"
    );
}

/// A backlog, of events with this many bytes each, that a worker sends while it gets so many more kilobytes.
struct Backlog {
    delivery: &'static str,
    count: usize,
    bytes: usize,
    kilobytes: u64,
    /// What `health()` says if it is not sent.
    trouble: &'static str,
}

const BACKLOGS: [Backlog; 6] = [
    // Before: "memory allocation of 1800842 bytes failed".
    backlog("exactly_once", 20, 900_000, 0, "out of memory"),
    backlog("exactly_once", 20, 900_000, 1_500, "out of memory"),
    backlog("exactly_once", 20, 900_000, 6_000, "out of memory"),
    backlog("exactly_once", 200, 50_000, 1_500, "out of memory"),
    // Before: "cannot allocate memory for thread-local data", in a thread that had just begun.
    backlog("at_least_once", 200, 50_000, 0, "no memory for a sender"),
    backlog("at_least_once", 20, 900_000, 1_500, "no memory for a sender"),
];

const fn backlog(delivery: &'static str, count: usize, bytes: usize, kilobytes: u64, trouble: &'static str) -> Backlog {
    Backlog {
        delivery,
        count,
        bytes,
        kilobytes,
        trouble,
    }
}

fn has_sender(worker: i32) -> bool {
    let threads = std::fs::read_dir(format!("/proc/{worker}/task")).expect("the worker lives");
    let names = threads.filter_map(|thread| std::fs::read_to_string(thread.ok()?.path().join("comm")).ok());
    names.into_iter().any(|name| name.starts_with("sender"))
}

/// It sends less at once, or waits and says so. All events arrive when it has memory, once and in order.
#[test]
fn a_worker_that_gets_no_memory_goes_on() {
    let stack = Stack::with(&[("outbox_relay.retry_max_delay", "500ms")]);
    let mut bystander = stack.pg.client();
    stack.pg.exec("update outbox.backends set max_len = 0");
    let worker = stack.pg.wait_worker("postgres");
    let mut published = vec![stack.publish("first")];
    for backlog in BACKLOGS {
        stack.wait_events(published.len());
        let set = |column: &str, value: &str| format!("update outbox.backends set {column} = {value}");
        stack
            .pg
            .exec(&set("delivery", &format!("'{}', enabled = false", backlog.delivery)));
        // With exactly_once, the guard shows that the owner of a paused backend is alive.
        wait_until("the sender to end", || {
            backlog.delivery == "exactly_once" || !has_sender(worker)
        });
        // Not compressible, so that a row is read in pieces.
        let data = format!(
            "(select string_agg(md5(random()::text || i || n), '') from generate_series(1, {} / 32) i)",
            backlog.bytes
        );
        let rows = bystander
            .query(
                &format!(
                    "select outbox.publish_event('t', 's', to_jsonb({data})) from generate_series(1, {}) n",
                    backlog.count
                ),
                &[],
            )
            .expect("published");
        published.extend(rows.iter().map(|row| row.get::<_, uuid::Uuid>(0)));
        limit(&mut bystander, worker, Some(backlog.kilobytes));
        bystander
            .batch_execute(&set("enabled", "true"))
            .expect("the server lives");
        let (what, total) = (
            format!(
                "{} of {} bytes, +{} kB, {}",
                backlog.count, backlog.bytes, backlog.kilobytes, backlog.delivery
            ),
            published.len(),
        );
        let all_arrived = || stack.redis.xlen(STREAM) == total;
        let said = eventually(&format!("{what}: {}", backlog.trouble), LIMIT, || {
            assert!(
                bystander.batch_execute("select 1").is_ok(),
                "the server has ended all sessions: {what}"
            );
            let trouble: String = stack
                .pg
                .one("select coalesce(string_agg(detail || hint, ' '), '') from outbox.health() where status = 'fail'");
            (trouble.contains(backlog.trouble) || all_arrived()).then_some(trouble)
        });
        println!("{what}: {said}");
        limit(&mut bystander, worker, None);
        wait_until(&format!("{what}: all events"), all_arrived);
    }
    assert_eq!(ids(&stack.events()), published, "each once, in order");
    assert_eq!(stack.pg.worker_pid("postgres"), Some(worker), "the same worker");
    assert_eq!(standing(&stack.pg, "default").failed, 0);
}

/// Only the main thread can end the process in order. Before, the thread ended it, and so all sessions.
#[test]
fn a_thread_that_gets_no_memory_ends_its_worker_alone() {
    let stack = Stack::of(Postgres::with(&[]).faults(), Redis::start());
    let mut bystander = stack.pg.client();
    let worker = stack.pg.wait_worker("postgres");
    let first = stack.publish("first");
    stack.wait_events(1);
    stack.pg.starve_at("after_write");
    let second = stack.publish("second");
    stack.pg.wait_log("FATAL:  out of memory");
    stack.pg.wait_new_worker(worker);
    assert!(
        bystander.batch_execute("select 1").is_ok(),
        "the server has ended all sessions"
    );
    let third = stack.publish("third");
    stack.wait_events(3);
    assert_eq!(ids(&stack.events()), [first, second, third], "each once, in order");
}
