//! Servers that never finish: whatever step of a connection hangs, the backend soon shows an error, and is not idle
//! with pending events.

use std::os::fd::AsFd;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::time::{Duration, Instant};

use kit::liar;
use kit::{
    BlackHole, Bystander, Liar, Lie, Postgres, QUICK, Redis, Stack, standing, wait_eq, wait_trouble, wait_until,
};
use nix::sys::socket::{Backlog, listen};

fn stack() -> Stack {
    Stack::of(Postgres::with(QUICK), Redis::start())
}

/// A byte each tenth of a second, and a reply has three: no single byte is late, but the reply is.
#[test]
fn a_reply_that_drips_is_given_up_at_each_step() {
    let stack = stack();
    let steps = [
        "AUTH",
        "SELECT",
        "CLIENT",
        "PING",
        "WATCH",
        "HGETALL",
        "MULTI",
        "HSET",
        "EXEC",
        "HMGET",
        "XADD",
        "XREVRANGE",
        "XINFO",
        "SENTINEL",
        "HELLO",
        "CLUSTER",
    ];
    let liars: Vec<(&str, Liar)> = steps
        .into_iter()
        .map(|step| {
            let reply = match step {
                "HGETALL" | "HMGET" | "EXEC" | "XREVRANGE" | "XINFO" | "SENTINEL" | "HELLO" | "CLUSTER" => {
                    "*2\r\n$900\r\n"
                }
                _ => "+",
            };
            let drips = Lie::drip(format!("{reply}{}", "x".repeat(100)), Duration::from_millis(100));
            let liar = Liar::start(liar::when_asked(step, drips.expect("a lie")));
            (step, liar)
        })
        .collect();
    let bystander = Bystander::start(&stack);
    for (step, liar) in &liars {
        let at = match *step {
            "SENTINEL" | "HELLO" => format!(
                "mode = 'sentinel', sentinel_master = 'm', nodes = '{{127.0.0.1:{}}}'",
                liar.port()
            ),
            "CLUSTER" => format!("mode = 'cluster', nodes = '{{127.0.0.1:{}}}'", liar.port()),
            _ => format!("host = '127.0.0.1', port = {}", liar.port()),
        };
        let db = i32::from(*step == "SELECT");
        let name = step.to_lowercase();
        stack.pg.exec(&format!(
            "insert into outbox.backends (name, enabled, db) values ('{name}', false, {db});
            update outbox.backends set {at} where name = '{name}';
            select outbox.publish_event('t', 'kit', backend => '{name}');"
        ));
        if *step == "AUTH" {
            stack.pg.exec("select outbox.set_backend_password('auth', 'secret')");
        }
    }
    let start = Instant::now();
    stack
        .pg
        .exec("update outbox.backends set enabled = true where not enabled");
    for (step, liar) in &liars {
        let found = wait_trouble(&stack.pg, &step.to_lowercase(), "backoff", "timed out");
        assert_eq!((found.pending, found.published), (1, 0), "{step}");
        assert!(liar.asked(step) > 0, "{step}");
    }
    println!("{} steps: in backoff within {:?}", liars.len(), start.elapsed());
    assert!(start.elapsed() < Duration::from_secs(8), "{:?}", start.elapsed());
    bystander.stop(&stack).assert_harmless("16 replies that drip");
    stack.publish("the backend that works");
    stack.wait_events(1);
    for (step, liar) in &liars {
        liar.lie(|_| None);
        wait_until(step, || liar.entries("events") > 0);
    }
}

/// Each answer is in time, and there is no end of them: a search that takes minutes.
#[test]
fn a_backend_that_connects_slowly_says_so() {
    let stack = stack();
    let (mut has_sent, mut is_known) = (false, false);
    let liar = Liar::start(move |words| match words[0].as_str() {
        "EXEC" if has_sent && !is_known => {
            is_known = true;
            Some(Lie::Refuse)
        }
        "XADD" => {
            has_sent = true;
            None
        }
        "HGETALL" if is_known => Lie::say("*0\r\n"),
        "XREVRANGE" => {
            let count: usize = words.last().and_then(|n| n.parse().ok()).unwrap_or(1);
            let entry = "*2\r\n$3\r\n1-0\r\n*2\r\n$1\r\na\r\n$1\r\nb\r\n";
            let bytes = format!("*{count}\r\n{}", entry.repeat(count)).into_bytes();
            let after = Duration::from_millis(100);
            Some(Lie::Late { bytes, after })
        }
        _ => None,
    });
    stack.point_at("default", "127.0.0.1", liar.port());
    stack.publish("t");
    let found = wait_trouble(&stack.pg, "default", "backoff", "was not ready within");
    assert_eq!((found.pending, found.published), (1, 0), "{found:?}");
    stack
        .pg
        .wait_log("it answers, but was not ready within twice its timeouts");
    let accepted = liar.accepted();
    liar.lie(|_| None);
    wait_eq("the event", 1, || liar.entries("events"));
    assert_eq!(liar.accepted(), accepted, "it was not cut off");
    wait_eq("the state", "idle".to_owned(), || standing(&stack.pg, "default").state);
}

/// The same steps as on a TCP port, but without a timeout of the operating system.
#[test]
fn a_hanging_unix_socket_is_given_up_at_each_step() {
    let stack = stack();
    let directory = stack.redis.socket().parent().expect("a directory").to_owned();
    // Its queue of connections is full.
    let path = directory.join("full.sock");
    let listener = UnixListener::bind(&path).expect("cannot listen");
    open_to_all(&path);
    listen(&listener.as_fd(), Backlog::new(0).expect("a valid backlog")).expect("cannot shorten the queue");
    let bystander = Bystander::start(&stack);
    // The only place that is left in the queue.
    let queued = UnixStream::connect(&path).expect("the queue's only place");
    stack.pg.exec(&format!(
        "update outbox.backends set unix_socket = '{}' where name = 'default'",
        path.display()
    ));
    stack.publish("full");
    let found = wait_trouble(&stack.pg, "default", "backoff", "timed out");
    assert_eq!((found.pending, found.published), (1, 0));
    drop((listener, queued));
    // It stops reading in the middle of a write.
    let mut liar = Liar::start(|words| (words[0] == "XADD").then_some(Lie::Hang));
    let path = directory.join("deaf.sock");
    liar.listen_at(path.clone());
    open_to_all(&path);
    stack.pg.exec(&format!(
        "update outbox.backends set unix_socket = '{}' where name = 'default'",
        path.display()
    ));
    stack.pg.exec("select outbox.publish_event('t', 'kit', jsonb_build_object('x', repeat('x', 100000))) from generate_series(1, 50)");
    let found = wait_trouble(&stack.pg, "default", "backoff", "timed out");
    assert_eq!((found.pending, found.published), (51, 0), "{found:?}");
    assert!(liar.asked("XADD") > 0);
    // And each answer arrives byte by byte.
    liar.lie(|words| {
        (words[0] == "HGETALL")
            .then(|| Lie::drip("*2\r\n$900\r\nxxxxxxxxxxxxxxxxxxxxxxxxxx", Duration::from_millis(100)))?
    });
    let mark = stack.pg.log().len();
    stack
        .pg
        .exec("update outbox.backends set db = 1 where name = 'default'");
    stack.pg.wait_log_after(mark, "timed out");
    liar.lie(|_| None);
    wait_eq("all events", 51, || liar.entries("events"));
    bystander.stop(&stack).assert_harmless("unix sockets that hang");
}

fn open_to_all(path: &std::path::Path) {
    std::fs::set_permissions(path, PermissionsExt::from_mode(0o777)).expect("chmod");
}

/// Only the handshake: TLS has a deadline for all of it.
#[test]
fn a_handshake_that_gets_nowhere_is_given_up() {
    let stack = stack();
    let (hole, bystander) = (BlackHole::start(), Bystander::start(&stack));
    stack.pg.exec(&format!(
        "update outbox.backends set tls = true, tls_insecure = true, host = '127.0.0.1', port = {} where name = 'default'",
        hole.port()
    ));
    stack.publish("t");
    let found = wait_trouble(&stack.pg, "default", "backoff", "TLS handshake: timed out");
    assert_eq!((found.pending, found.published), (1, 0));
    bystander.stop(&stack).assert_harmless("a TLS handshake that hangs");
}

/// Redis answers a WAIT only after its timeout. A server that answers at once that there are too few replicas is asked
/// again, but with pauses.
#[test]
fn a_server_that_answers_wait_at_once_is_asked_with_pauses() {
    let stack = stack();
    for delivery in ["exactly_once", "at_least_once"] {
        let mut count = 0;
        // Each time another number, so that there is progress.
        let liar = Liar::start(move |words| {
            count = 1 - count;
            (words[0] == "WAIT").then(|| Lie::Say(format!(":{count}\r\n").into_bytes()))
        });
        stack.pg.exec(&format!(
            "update outbox.backends set host = '127.0.0.1', port = {}, delivery = '{delivery}', wait_replicas = 2",
            liar.port()
        ));
        stack.publish(delivery);
        wait_trouble(&stack.pg, "default", "backoff", "NOREPLICAS");
        let before = liar.asked("WAIT");
        let start = Instant::now();
        std::thread::sleep(Duration::from_secs(1));
        let (asked, took) = (liar.asked("WAIT") - before, start.elapsed().as_secs_f64());
        println!("{delivery}: asked {asked} times in {took:.1} s");
        assert!((asked as f64) < 60.0 * took, "{delivery}: {asked} times in {took} s");
        liar.lie(|words| (words[0] == "WAIT").then(|| Lie::Say(b":2\r\n".to_vec())));
        wait_until("the event", || standing(&stack.pg, "default").pending == 0);
    }
}
