//! A transaction of a million events is streamed, not collected in memory.

use std::time::Duration;

use kit::{Stack, eventually};

const EVENTS: usize = 1_000_000;

/// The private memory of a process in kB, without its share of Postgres's buffers.
fn private_kb(pid: i32) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("RssAnon:")).unwrap();
    line.trim().strip_suffix(" kB").unwrap().parse().unwrap()
}

/// Runs in Redis: whether the sources of a stream's entries count from 1, and up to which number. (Reading a million
/// entries would keep a client busy for a minute.)
const COUNT_IN_ORDER: &str = "
    local from, count = '-', 0
    while true do
        local piece = redis.call('XRANGE', KEYS[1], from, '+', 'COUNT', 10000)
        if #piece == 0 then return count end
        for _, entry in ipairs(piece) do
            local fields = entry[2]
            if fields[5] ~= 'source' or fields[6] ~= tostring(count + 1) then
                return redis.error_reply('ERR ' .. fields[6] .. ' comes after ' .. count)
            end
            count = count + 1
        end
        from = '(' .. piece[#piece][1]
    end";

#[test]
fn a_million_events_of_one_insert_arrive_in_order_in_bounded_memory() {
    let stack = Stack::with(&[("outbox_relay.redis_max_len", "0"), ("max_wal_size", "4GB")]);
    stack.publish("warm-up");
    stack.wait_events(1);
    stack.redis.call(&["DEL", "events"]);
    let worker = stack.pg.wait_worker("postgres");
    let before = private_kb(worker);
    stack.pg.exec(&format!(
        "insert into outbox.events (event_type, source, data) \
         select 'bulk', i::text, '{{\"n\": 1}}' from generate_series(1, {EVENTS}) i"
    ));
    let mut most = 0;
    let mut conn = stack.redis.conn();
    eventually("a million entries", Duration::from_secs(120), || {
        most = most.max(private_kb(worker));
        (kit::xlen(&mut conn, "events") >= EVENTS).then_some(())
    });
    assert_eq!(stack.pg.worker_pid("postgres"), Some(worker));
    // Redis reads all of them in one command.
    conn.set_read_timeout(Some(Duration::from_secs(120)))
        .expect("a timeout");
    let in_order: redis::Value = redis::cmd("EVAL")
        .arg(COUNT_IN_ORDER)
        .arg(1)
        .arg("events")
        .query(&mut conn)
        .expect("EVAL");
    assert_eq!(in_order, redis::Value::Int(i64::try_from(EVENTS).unwrap()));
    let grown_kb = most.saturating_sub(before);
    println!("the worker grew by {grown_kb} kB from {before} kB");
    assert!(
        grown_kb < 24 * 1_024,
        "the worker grew by {grown_kb} kB from {before} kB"
    );
}

/// Rows of other backends are skipped in the index; there are no rows of this backend, or only rows that were rolled
/// back, or the backend is created later.
#[test]
fn few_events_among_many_of_another_backend_arrive_in_order() {
    const ROWS: usize = 12_000;
    let stack = Stack::with(&[("outbox_relay.redis_max_len", "0")]);
    stack.pg.exec(
        "insert into outbox.backends (name, host, port, stream_name, enabled)
         select n, host, port, n, n <> 'later' from outbox.backends, unnest(array['few', 'later']) n where name = 'default'",
    );
    stack.publish("warm-up");
    stack.wait_events(1);
    let insert = |first: usize, last: usize| {
        format!(
            "insert into outbox.events (event_type, source, data, backend)
             select 'bulk', g::text, '1', case when g % 997 = 0 then 'few' when g % 1499 = 0 then 'later' else 'default' end
             from generate_series({first}, {last}) g;"
        )
    };
    stack.pg.exec(&format!(
        "begin; {} savepoint s; {} rollback to s; {} commit",
        insert(1, ROWS / 2),
        insert(1, ROWS / 4),
        insert(ROWS / 2 + 1, ROWS)
    ));
    stack.pg.exec(&insert(ROWS + 1, ROWS + 3_000));
    let is_few = |n: &usize| n.is_multiple_of(997);
    let is_later = |n: &usize| !is_few(n) && n.is_multiple_of(1_499);
    let all = || 1..=ROWS + 3_000;
    let of = |stream: &str, wanted: Vec<usize>| {
        let entries = stack.redis.wait_entries(stream, wanted.len());
        let sources: Vec<usize> = entries.iter().map(|e| e.field("source").parse().unwrap()).collect();
        assert_eq!(sources, wanted, "{stream}");
    };
    of("few", all().filter(is_few).collect());
    stack
        .pg
        .exec("update outbox.backends set enabled = true where name = 'later'");
    of("later", all().filter(is_later).collect());
    let usual = all().filter(|n| !is_few(n) && !is_later(n)).count();
    kit::wait_eq("events of the usual backend", usual + 1, || stack.redis.xlen("events"));
}

/// Rows of a transaction that was open when other events were read are found by its id. The index says whose they are,
/// so that the other backends pass them by without reading them.
#[test]
fn the_rows_of_another_backends_large_transaction_are_passed_by_the_index() {
    const COUNT: i64 = 30_000;
    let stack = Stack::start();
    stack.pg.exec(&format!(
        "insert into outbox.backends (name, host, port, stream_name) values ('other', '127.0.0.1', {}, 'other');
         update outbox.backends set enabled = false where name = 'default'",
        stack.redis.port()
    ));
    let publish = |count: usize| {
        stack
            .pg
            .exec("select outbox.publish_event('t', 's', backend => 'other')");
        stack.redis.wait_entries("other", count);
    };
    publish(1);
    let mut bulk = stack.pg.client();
    bulk.batch_execute(&format!(
        "begin; insert into outbox.events (event_type, source) select 'bulk', 's' from generate_series(1, {COUNT})"
    ))
    .expect("inserted");
    publish(2);
    let read = || -> i64 {
        std::thread::sleep(std::time::Duration::from_millis(1_500));
        stack
            .pg
            .one("select idx_tup_fetch from pg_stat_user_tables where relid = 'outbox.events'::regclass")
    };
    let before = read();
    bulk.batch_execute("commit").expect("committed");
    publish(3);
    let fetched = read() - before;
    println!("{fetched} rows were read");
    // One reader looks after the rows of all backends that nobody knows.
    assert!(fetched < COUNT * 3 / 2, "{fetched} rows were read");
}
