//! Servers that change with each connection or answer: they fill neither the log nor the time of the worker, and hide
//! nothing of other backends.

use std::time::{Duration, Instant};

use kit::{Bystander, Liar, Lie, Postgres, QUICK, Redis, Stack, wait_drained, wait_until};

/// At most this many lines about a backend are logged within a minute, and one that says so.
const MOST_LINES: usize = 21;

/// Attempts follow each other quickly.
fn hasty() -> Stack {
    Stack::of(
        Postgres::with(QUICK).with(&[
            ("outbox_relay.retry_delay", "5ms"),
            ("outbox_relay.retry_backoff", "off"),
        ]),
        Redis::start(),
    )
}

/// The lines about a backend that the worker logged after `mark`, without details and hints.
fn lines_about(stack: &Stack, mark: usize, backend: &str) -> Vec<String> {
    let log = stack.pg.log().split_off(mark);
    let levels = ["LOG:  ", "WARNING:  ", "ERROR:  "];
    let name = format!("backend \"{backend}\" ");
    let is_one = |line: &&str| line.contains(&name) && levels.iter().any(|level| line.contains(level));
    log.lines().filter(is_one).map(str::to_owned).collect()
}

/// Publishes to a backend while its server accepts this many connections, and looks at what was logged.
#[track_caller]
fn assert_few_lines(stack: &Stack, liar: &Liar, backend: &str, connections: usize) {
    let (mark, before) = (stack.pg.log().len(), liar.accepted());
    wait_until("many connections", || {
        stack.pg.exec(&format!(
            "select outbox.publish_event('t', 'kit', backend => '{backend}')"
        ));
        liar.accepted() >= before + connections
    });
    let lines = lines_about(stack, mark, backend);
    println!("{} lines for {connections} connections", lines.len());
    assert!(lines.len() <= MOST_LINES, "{} lines: {}", lines.len(), lines.join("\n"));
    assert!(
        lines
            .iter()
            .any(|line| line.contains("changes too often to log each change"))
    );
}

/// Acknowledges a batch, and closes the connection at the next command.
fn takes_one() -> impl FnMut(&str) -> Option<Lie> + Send + 'static {
    let (mut has_added, mut is_done) = (false, false);
    move |command| match command {
        "XADD" => {
            has_added = true;
            None
        }
        "EXEC" => {
            is_done = std::mem::take(&mut has_added);
            None
        }
        "WATCH" if std::mem::take(&mut is_done) => Some(Lie::Refuse),
        _ => None,
    }
}

fn bulk(text: &str) -> String {
    format!("${}\r\n{text}\r\n", text.len())
}

/// As HGETALL returns it.
fn reply(guard: &[(String, String)]) -> String {
    let fields: String = guard.iter().map(|(field, value)| bulk(field) + &bulk(value)).collect();
    format!("*{}\r\n{fields}", 2 * guard.len())
}

/// A connection that takes a batch, and one that is refused, in turn: each is a change.
#[test]
fn a_server_that_works_now_and_then_does_not_flood_the_log() {
    let stack = hasty();
    let liar = Liar::honest();
    let (mut closes, mut refuses) = (takes_one(), false);
    liar.lie(move |words| {
        let lie = closes(&words[0]);
        refuses |= lie.is_some();
        match words[0].as_str() {
            "PING" if std::mem::take(&mut refuses) => Lie::say("-LOADING Redis is loading\r\n"),
            _ => lie,
        }
    });
    stack.point_at("default", "127.0.0.1", liar.port());
    assert_few_lines(&stack, &liar, "default", 150);
}

/// On each connection Redis has lost all batches but the first one.
#[test]
fn a_guard_that_goes_back_each_time_does_not_flood_the_log() {
    let (stack, liar) = kit::liar::trusted();
    stack.pg.set("outbox_relay.retry_delay", "5ms");
    stack.pg.set("outbox_relay.retry_backoff", "off");
    let first = reply(&liar.hash(&stack.guard_key()));
    stack.publish("second");
    wait_drained(&stack.pg, "default");
    let mut closes = takes_one();
    liar.lie(move |words| match words[0].as_str() {
        "HGETALL" => Lie::say(&first),
        command => closes(command),
    });
    assert_few_lines(&stack, &liar, "default", 80);
}

/// Each name is another address, and each connection works.
#[test]
fn a_sentinel_that_names_another_host_each_time_does_not_flood_the_log() {
    let stack = hasty();
    let liar = Liar::honest();
    let (mut closes, mut count, port) = (takes_one(), 0u32, liar.port().to_string());
    liar.lie(move |words| match words[0].as_str() {
        "SENTINEL" => {
            count += 1;
            let letters = "localhost".chars().enumerate();
            let name: String = letters
                .map(|(n, c)| if count >> n & 1 == 1 { c.to_ascii_uppercase() } else { c })
                .collect();
            Lie::say(format!("*2\r\n{}{}", bulk(&name), bulk(&port)))
        }
        command => closes(command),
    });
    stack.pg.exec(&format!(
        "insert into outbox.backends (name, mode, sentinel_master, nodes) values ('liar', 'sentinel', 'm', '{{127.0.0.1:{}}}')",
        liar.port()
    ));
    assert_few_lines(&stack, &liar, "liar", 200);
}

/// Twenty servers with guards that were forged in ever other ways, with errors in ever new words, or that work now and
/// then, while somebody requests attempts and reloads all the time.
#[test]
fn forged_guards_new_words_and_wake_ups_do_not_fill_the_log() {
    const SERVERS: usize = 20;
    const SECONDS: u64 = 6;
    let stack = hasty();
    let liars: Vec<Liar> = (0..SERVERS).map(|_| Liar::honest()).collect();
    for (n, liar) in liars.iter().enumerate() {
        let (mut closes, mut count) = (takes_one(), 0);
        liar.lie(move |words| {
            count += 1;
            let garbled = |name: &str| (name.to_owned(), format!("{count}"));
            match (n % 4, words[0].as_str()) {
                (0, "HGETALL") => Lie::say(reply(&[garbled("place"), garbled(&format!("field{count}"))])),
                (1, "HGETALL") => Lie::say(format!("-WRONGTYPE {count} times\r\n")),
                (2, "PING") => Lie::say(format!("-WORD{count} is new {count}\r\n")),
                (3, "PING") if count % 3 == 0 => Lie::say(format!("-LOADING for {count} s\r\n")),
                (3, command) => closes(command),
                _ => None,
            }
        });
        stack.pg.exec(&format!(
            "insert into outbox.backends (name, host, port) values ('liar{n}', '127.0.0.1', {})",
            liar.port()
        ));
    }
    let mark = stack.pg.log().len();
    let (mut client, start) = (stack.pg.client(), Instant::now());
    while start.elapsed() < Duration::from_secs(SECONDS) {
        client
            .batch_execute(
                "select outbox.publish_event('t', 'kit', backend => name) from outbox.backends;
                select outbox.wake(); select pg_reload_conf()",
            )
            .expect("a superuser may");
        std::thread::sleep(Duration::from_millis(5));
    }
    let connections: usize = liars.iter().map(Liar::accepted).sum();
    let lines: Vec<usize> = (0..SERVERS)
        .map(|n| lines_about(&stack, mark, &format!("liar{n}")).len())
        .collect();
    let all: usize = lines.iter().sum();
    println!("{all} lines for {connections} connections in {SECONDS} s");
    assert!(lines.iter().all(|lines| *lines <= MOST_LINES), "{lines:?}");
    // What happens to others is still logged.
    stack.point_at("default", "127.0.0.1", 1);
    stack.pg.wait_log("backend \"default\" cannot be reached");
}

/// Each claim is durable, so each connection costs the worker's thread, which serves all backends, a flush of the WAL.
#[test]
fn servers_that_close_each_connection_hold_up_nobody() {
    const SECONDS: u64 = 6;
    let stack = Stack::start();
    let liars: Vec<Liar> = (0..10).map(|_| Liar::honest()).collect();
    for (n, liar) in liars.iter().enumerate() {
        let mut closes = takes_one();
        liar.lie(move |words| closes(&words[0]));
        stack.pg.exec(&format!(
            "insert into outbox.backends (name, host, port) values ('liar{n}', '127.0.0.1', {})",
            liar.port()
        ));
    }
    let bystander = Bystander::start(&stack);
    let (mut client, start) = (stack.pg.client(), Instant::now());
    while start.elapsed() < Duration::from_secs(SECONDS) {
        client
            .batch_execute(
                "select outbox.publish_event('t', 'kit', backend => name) from outbox.backends where name like 'liar%'",
            )
            .expect("published");
        std::thread::sleep(Duration::from_millis(2));
    }
    let connections: usize = liars.iter().map(Liar::accepted).sum();
    println!("{connections} connections in {SECONDS} s");
    bystander.stop(&stack).assert_undisturbed("servers that close");
    // For each server eight at once, and then at most one or two a second.
    assert!(connections <= 10 * (10 + 3 * SECONDS as usize), "{connections}");
}

/// Each answer names other nodes, and no node keeps a connection.
#[test]
fn a_cluster_whose_nodes_change_with_each_answer_holds_up_nobody() {
    const SECONDS: u64 = 8;
    let stack = hasty();
    let liar = Liar::honest();
    let (mut closes, mut count, port) = (takes_one(), 0u32, liar.port());
    liar.lie(move |words| match words[0].as_str() {
        "CLUSTER" => {
            count += 1;
            let letters = "localhost".chars().enumerate();
            let name: String = letters
                .map(|(n, c)| if count >> n & 1 == 1 { c.to_ascii_uppercase() } else { c })
                .collect();
            let gone = (0..90).map(|n| {
                format!(
                    "*3\r\n:{n}\r\n:{n}\r\n*2\r\n{}:{}\r\n",
                    bulk(&format!("no{count}.invalid")),
                    n + 1
                )
            });
            let rest = format!("*3\r\n:90\r\n:16383\r\n*2\r\n{}:{port}\r\n", bulk(&name));
            Lie::say(format!("*91\r\n{}{rest}", gone.collect::<String>()))
        }
        command => closes(command),
    });
    stack.pg.exec(&format!(
        "insert into outbox.backends (name, mode, nodes, allowed_streams) values ('liar', 'cluster', '{{127.0.0.1:{port}}}', '{{*}}')"
    ));
    let bystander = Bystander::start(&stack);
    let mark = stack.pg.log().len();
    let (mut client, start) = (stack.pg.client(), Instant::now());
    while start.elapsed() < Duration::from_secs(SECONDS) {
        client
            .batch_execute("select outbox.publish_event('t', 'kit', backend => 'liar', stream => 's' || n) from generate_series(1, 20) n")
            .expect("published");
        std::thread::sleep(Duration::from_millis(20));
    }
    let lines = lines_about(&stack, mark, "liar").len();
    println!("{lines} lines for {} connections in {SECONDS} s", liar.accepted());
    bystander.stop(&stack).assert_harmless("a cluster that changes");
    // Of the lanes, and of their finder.
    assert!(lines <= 2 * MOST_LINES, "{lines}");
}
