//! Servers that answer more than they were asked for: none of it is believed, it takes no memory, and other backends go
//! on.

use std::time::{Duration, Instant};

use kit::liar;
use kit::{Bystander, Dice, Liar, Lie, Postgres, QUICK, Redis, Stack, standing, wait_drained, wait_until};

/// The commands whose answers the relay reads.
const ASKED: [&str; 14] = [
    "AUTH",
    "SELECT",
    "CLIENT",
    "PING",
    "WATCH",
    "HGETALL",
    "HMGET",
    "MULTI",
    "XADD",
    "EXEC",
    "XREVRANGE",
    "XINFO",
    "SENTINEL",
    "CLUSTER",
];

fn endless() -> Vec<(&'static str, Lie)> {
    let flood = |begin: &str, more: &str| Lie::flood(begin, more).expect("a lie");
    let field = format!("$300000\r\n{}\r\n", "x".repeat(300_000));
    let nested = "*2\r\n$3\r\n1-0\r\n";
    vec![
        ("80,000,000 empty strings", flood("*80000000\r\n", "$0\r\n\r\n")),
        ("a string of 250 MB", flood("$250000000\r\n", "x")),
        ("arrays within each other", flood("", "*1\r\n")),
        ("wide arrays within each other", flood("", "*1000000\r\n")),
        ("digits without end", flood("$", "1")),
        ("a number without end", flood(":", "1")),
        ("a status without end", flood("+", "x")),
        ("an error without end", flood("-ERR ", "x")),
        ("a push type", flood("", ">1000\r\n$1\r\na\r\n")),
        ("an attribute", flood("", "|1\r\n$1\r\na\r\n$1\r\nb\r\n")),
        ("a map", flood("%80000000\r\n", "$0\r\n\r\n")),
        ("the largest size", flood("$9223372036854775807\r\n", "x")),
        ("the largest array", flood("*9223372036854775807\r\n", ":1\r\n")),
        ("a negative array", flood("*-2\r\n", ":1\r\n")),
        ("a negative size", flood("$-2147483648\r\n", "x")),
        ("large fields", flood("*30\r\n", &field)),
        ("replies that nobody asked for", flood("", "+OK\r\n")),
        (
            "an entry with fields by the million",
            flood(&format!("*1\r\n{nested}*80000000\r\n"), "$0\r\n\r\n"),
        ),
        (
            "entries without end",
            flood("*99999999\r\n", &format!("{nested}*0\r\n")),
        ),
        (
            "an error for each",
            flood("*101\r\n", &format!("-ERR {}\r\n", "e".repeat(16_000))),
        ),
    ]
}

/// Twenty servers at once, each of which floods another command with each kind in turn: the worker needs at most 32 MiB
/// more than when idle, and a healthy backend is not affected.
#[test]
fn no_flood_takes_memory_or_the_time_of_others() {
    let stack = Stack::of(
        Postgres::with(QUICK).with(&[("outbox_relay.redis_socket_timeout", "2s")]),
        Redis::start(),
    );
    // A fast machine publishes more than the stream would keep.
    stack.pg.exec("update outbox.backends set max_len = 0");
    stack.publish("first");
    stack.wait_events(1);
    wait_drained(&stack.pg, "default");
    let worker = stack.pg.wait_worker("postgres");
    let bystander = Bystander::start(&stack);
    let kinds = endless();
    for round in 0..3 {
        let liars: Vec<(Liar, &str)> = (0..20)
            .map(|n| {
                // Each command is flooded with each kind, in as many rounds as there are kinds; here with some kinds,
                // and HGETALL with all.
                let command = if round == 0 {
                    "HGETALL"
                } else {
                    ASKED[(n + 5 * round) % ASKED.len()]
                };
                (
                    Liar::start(liar::when_asked(
                        command,
                        kinds[(n * round.max(1) + round) % 20].1.clone(),
                    )),
                    command,
                )
            })
            .collect();
        for (n, (liar, command)) in liars.iter().enumerate() {
            let (host, nodes, mode) = match *command {
                "SENTINEL" => ("null", format!("'{{127.0.0.1:{}}}'", liar.port()), "'sentinel', 'm'"),
                "CLUSTER" => ("null", format!("'{{127.0.0.1:{}}}'", liar.port()), "'cluster', null"),
                _ => ("'127.0.0.1'", "null".to_owned(), "'standalone', null"),
            };
            let port = if host == "null" {
                "null".to_owned()
            } else {
                liar.port().to_string()
            };
            let db = if *command == "SELECT" { 1 } else { 0 };
            stack.pg.exec(&format!(
                "insert into outbox.backends (name, host, port, nodes, mode, sentinel_master, db)
                values ('liar{round}_{n}', {host}, {port}, {nodes}, {mode}, {db})"
            ));
            if *command == "AUTH" {
                stack.pg.exec(&format!(
                    "select outbox.set_backend_password('liar{round}_{n}', 'secret')"
                ));
            }
            stack.pg.exec(&format!(
                "select outbox.publish_event('t', 'kit', backend => 'liar{round}_{n}') from generate_series(1, 50)"
            ));
        }
        // Each connects, is flooded and waits in turn, as long as this lasts.
        std::thread::sleep(Duration::from_secs(4));
        for (n, (liar, command)) in liars.iter().enumerate() {
            assert!(liar.asked(command) > 0, "{command} was never asked");
            let found = standing(&stack.pg, &format!("liar{round}_{n}"));
            assert!(
                matches!(found.state.as_str(), "backoff" | "misconfigured") && found.last_error.is_some(),
                "{command}: {found:?}"
            );
            assert_eq!(
                (found.pending, found.published, found.failed),
                (50, 0, 0),
                "{command}: {found:?}"
            );
        }
        stack.pg.exec(
            "delete from outbox.refused_events;
            delete from outbox.events e using outbox.backends b where b.number = e.backend_number and b.name like 'liar%';
            delete from outbox.backends where name like 'liar%'",
        );
    }
    assert_eq!(stack.pg.wait_worker("postgres"), worker, "it has not died");
    bystander.stop(&stack).assert_harmless("20 servers that flood at once");
}

/// A random answer to any command.
fn any_lie(dice: &mut Dice, kinds: &[(&'static str, Lie)]) -> Lie {
    let says = [
        "+OK\r\n",
        "+QUEUED\r\n",
        "$-1\r\n",
        "*-1\r\n",
        "*0\r\n",
        ":7\r\n",
        "$3\r\n1-0\r\n",
        "*1\r\n$1\r\nt\r\n",
        "*2\r\n$3\r\n1-0\r\n:7\r\n",
        "-ERR no\r\n",
        "-OOM command not allowed\r\n",
        "-MOVED 7 \x1b[2J:1\r\n",
        "-WRONGTYPE no\r\n",
        "-NOAUTH no\r\n",
        "-EXECABORT no\r\n",
        ">1\r\n+a\r\n",
        "HTTP/1.1 400\r\n",
        "*4\r\n$5\r\ntoken\r\n$1\r\nt\r\n$6\r\nnumber\r\n$19\r\n9223372036854775807\r\n",
        "+OK\r\n+OK\r\n+OK\r\n",
    ];
    match dice.below(10) {
        0 => Lie::Close,
        1 => Lie::Refuse,
        2 => dice.pick(kinds).1.clone(),
        3 => Lie::Deny(dice.pick(&says).as_bytes().to_vec()),
        4 => Lie::Late {
            bytes: dice.pick(&says).as_bytes().to_vec(),
            after: dice.millis(1, 400),
        },
        _ => Lie::Say(dice.pick(&says).as_bytes().to_vec()),
    }
}

/// Five servers that give random answers, and sometimes the right one. `OUTBOX_LIAR_SEED=n` repeats a run,
/// `OUTBOX_LIAR_SECONDS=n` sets its length.
#[test]
fn the_worker_survives_all_answers_and_events_wait() {
    let given = |name: &str| std::env::var(name).ok().and_then(|text| text.parse::<u64>().ok());
    let seed = given("OUTBOX_LIAR_SEED").unwrap_or_else(|| u64::from(std::process::id()));
    println!("OUTBOX_LIAR_SEED={seed}");
    let stack = Stack::of(Postgres::with(QUICK), Redis::start());
    stack.publish("first");
    stack.wait_events(1);
    let worker = stack.pg.wait_worker("postgres");
    let bystander = Bystander::start(&stack);
    let liars: Vec<Liar> = (0..5).map(|_| Liar::honest()).collect();
    for (n, liar) in liars.iter().enumerate() {
        let delivery = ["exactly_once", "at_least_once"][usize::from(n == 4)];
        stack.pg.exec(&format!(
            "insert into outbox.backends (name, host, port, delivery) values ('liar{n}', '127.0.0.1', {}, '{delivery}')",
            liar.port()
        ));
        let mut dice = Dice::of(seed, n as u64);
        let kinds = endless();
        let chances = dice.between(3, 30);
        liar.lie(move |_| dice.one_in(chances).then(|| any_lie(&mut dice, &kinds)));
    }
    let mut published = 0;
    let until = Instant::now() + Duration::from_secs(given("OUTBOX_LIAR_SECONDS").unwrap_or(6));
    while Instant::now() < until {
        stack
            .pg
            .exec("select outbox.publish_event('t', 'kit', backend => name, max_retries => 1000) from outbox.backends where name <> 'bystander'");
        published += 1;
        wait_until("the event of the backend that is well", || {
            stack.redis.xlen("events") > published
        });
        std::thread::sleep(Duration::from_millis(20));
    }
    // From now on the right answers. (Events that were answered wrongly are lost or repeated there; but nothing waits
    // for ever.)
    for (n, liar) in liars.iter().enumerate() {
        liar.lie(|_| None);
        wait_drained(&stack.pg, &format!("liar{n}"));
    }
    assert_eq!(stack.pg.wait_worker("postgres"), worker, "it has not died");
    println!("{published} rounds");
    bystander.stop(&stack).assert_harmless("5 servers with random answers");
    assert_eq!(standing(&stack.pg, "default").published, published as i64 + 1);
}

/// A cluster's backend has 64 lanes, each of which asks where its hash slot is and for its guard. An answer is as long
/// as it may be, and does not end.
#[test]
fn long_answers_to_all_lanes_of_a_cluster_take_little_memory() {
    let stack = Stack::of(
        Postgres::with(QUICK).with(&[("outbox_relay.redis_socket_timeout", "2s")]),
        Redis::start(),
    );
    let range = |last: u16, port: u16| format!("*3\r\n:0\r\n:{last}\r\n*2\r\n$9\r\n127.0.0.1\r\n:{port}\r\n");
    let ranges = format!("*20000\r\n{}", range(0, 7).repeat(19_999));
    let guard = format!("*32\r\n$5\r\ntoken\r\n$260000\r\n{}", "x".repeat(259_000));
    for (command, answer) in [("CLUSTER", ranges), ("HGETALL", guard)] {
        let name = command.to_lowercase();
        let liar = Liar::honest();
        let all = format!("*1\r\n{}", range(16_383, liar.port()));
        liar.lie(move |words| match words[0].as_str() {
            asked if asked == command => Lie::say(&answer),
            "CLUSTER" => Lie::say(&all),
            _ => None,
        });
        stack.pg.exec(&format!(
            "insert into outbox.backends (name, mode, nodes) values ('{name}', 'cluster', '{{127.0.0.1:{}}}')",
            liar.port()
        ));
        let bystander = Bystander::start(&stack);
        stack.pg.exec(&format!(
            "select outbox.publish_event('t', 'kit', backend => '{name}', stream => 's' || n) from generate_series(1, 64) n"
        ));
        wait_until("all lanes to ask twice", || liar.asked(command) >= 128);
        stack.pg.exec(&format!(
            "update outbox.backends set enabled = false where name = '{name}'"
        ));
        bystander
            .stop(&stack)
            .assert_harmless(&format!("long answers to {command} of 64 lanes"));
    }
}
