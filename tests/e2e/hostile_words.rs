//! Texts of servers that could harm their readers: in a log, a view, a table or a terminal.

use kit::liar;
use kit::{Bystander, Liar, Lie, Postgres, QUICK, Redis, Stack, standing, types, wait_drained, wait_eq, wait_until};

/// Texts that are no host names: control characters, changes of direction, a quote, too long, and characters that a
/// terminal or a text in Postgres cannot hold.
fn bad_hosts() -> Vec<Vec<u8>> {
    vec![
        b"a\r\nFATAL:  root said so".to_vec(),
        b"\x1b[2J\x1b]0;title\x07".to_vec(),
        b"a\0b".to_vec(),
        b"\xff\xfe".to_vec(),
        "\u{202e}tsoh".as_bytes().to_vec(),
        b"a b".to_vec(),
        b"/etc/passwd".to_vec(),
        b"'; drop table x; --".to_vec(),
        vec![b'a'; 254],
        vec![b'a'; 10_000],
        vec![b'a'; 2_000_000],
    ]
}

fn bulk(bytes: &[u8]) -> Vec<u8> {
    [format!("${}\r\n", bytes.len()).as_bytes(), bytes, b"\r\n"].concat()
}

/// Neither the log nor a view or table contains such characters. `secrets`: texts that must not be there either.
#[track_caller]
fn assert_clean(pg: &Postgres, what: &str) {
    let is_clean = |text: &str| !text.contains(|c: char| (c.is_control() && c != '\n' && c != '\t') || c == '\u{202e}');
    let log = pg.log();
    let line = log.lines().find(|line| !is_clean(line) || line.len() > 2_000);
    assert_eq!(
        line.map(|line| line.chars().take(300).collect::<String>()),
        None,
        "{what}"
    );
    assert!(!log.lines().any(|line| line.starts_with("FATAL:  root")), "{what}");
    for sql in [
        "select coalesce(string_agg(s::text, ' '), '') from outbox.backend_status s",
        "select coalesce(string_agg(c::text, ' '), '') from outbox.cursors c",
        "select coalesce(string_agg(f::text, ' '), '') from outbox.failed_events f",
    ] {
        let text: String = pg.one(sql);
        assert!(is_clean(&text) && text.len() < 10_000, "{what}: {sql}: {text:?}");
        // As a client of another encoding does.
        pg.exec(&format!("select convert_to(t, 'UTF8') from ({sql}) x (t)"));
    }
}

#[track_caller]
fn wait_refused(pg: &Postgres, what: &str) {
    wait_until(what, || {
        let found = standing(pg, "default");
        let error = found.last_error.unwrap_or_default();
        matches!(found.state.as_str(), "misconfigured" | "backoff")
            && (error.contains("an invalid host") || error.contains("longer than any reply of Redis"))
    });
}

#[test]
fn an_invalid_host_name_from_a_sentinel_is_refused() {
    let stack = Stack::of(Postgres::with(QUICK), Redis::start());
    stack.publish("before");
    stack.redis.wait_entries("events", 1);
    let liar = Liar::honest();
    stack.pg.exec(&format!(
        "update outbox.backends set mode = 'sentinel', host = null, port = null, sentinel_master = 'm', nodes = '{{127.0.0.1:{}}}'",
        liar.port()
    ));
    let bystander = Bystander::start(&stack);
    stack
        .pg
        .wait_log(&format!("is connected to Redis at 127.0.0.1:{}", liar.port()));
    for (n, host) in bad_hosts().into_iter().enumerate() {
        let what = String::from_utf8_lossy(&host[..host.len().min(30)]).into_owned();
        let lie = [b"*2\r\n".to_vec(), bulk(&host), bulk(b"6379")].concat();
        liar.lie(move |words| (words[0] == "SENTINEL").then(|| Lie::Say(lie.clone())));
        stack
            .pg
            .exec("update outbox.backends set port = port where name = 'default'");
        stack.pg.exec("select outbox.wake()");
        stack.publish(&format!("t{n}"));
        // A connected worker has no reason to ask, unless its destination changes.
        stack
            .pg
            .exec("update outbox.backends set enabled = false where name = 'default'");
        stack
            .pg
            .exec("update outbox.backends set enabled = true, db = 1 - coalesce(db, 0) where name = 'default'");
        wait_refused(&stack.pg, &what);
        assert_clean(&stack.pg, &what);
    }
    let address: Option<String> = stack
        .pg
        .one("select address from outbox.cursors where backend_number = 1");
    assert!(address.is_none_or(|address| address.starts_with("127.0.0.1:")));
    // The right answer, which is this server's own address.
    liar.lie(|_| None);
    wait_eq("all events", bad_hosts().len(), || liar.entries("events"));
    bystander.stop(&stack).assert_harmless("a sentinel's invalid names");
}

#[test]
fn an_invalid_host_name_from_a_cluster_node_is_refused() {
    let stack = Stack::of(Postgres::with(QUICK), Redis::start());
    let liar = Liar::honest();
    stack.pg.exec(&format!(
        "update outbox.backends set mode = 'cluster', host = null, port = null, nodes = '{{127.0.0.1:{}}}'",
        liar.port()
    ));
    let bystander = Bystander::start(&stack);
    for (n, host) in bad_hosts().into_iter().enumerate() {
        let what = String::from_utf8_lossy(&host[..host.len().min(30)]).into_owned();
        let node = [b"*2\r\n".to_vec(), bulk(&host), b":6379\r\n".to_vec()].concat();
        let lie = [b"*1\r\n*3\r\n:0\r\n:16383\r\n".to_vec(), node].concat();
        let moved = [
            b"-MOVED 7 ".to_vec(),
            host.iter().copied().filter(|b| *b != b'\n').take(9_000).collect(),
            b":6379\r\n".to_vec(),
        ]
        .concat();
        liar.lie(move |words| match words[0].as_str() {
            "CLUSTER" => Some(Lie::Say(lie.clone())),
            // To a connected worker.
            "XADD" => Some(Lie::Deny(moved.clone())),
            _ => None,
        });
        stack.publish(&format!("t{n}"));
        wait_refused(&stack.pg, &what);
        assert_clean(&stack.pg, &what);
        liar.lie(|_| None);
        wait_eq(&what, n + 1, || liar.entries("events"));
        wait_drained(&stack.pg, "default");
    }
    bystander.stop(&stack).assert_harmless("a cluster node's invalid names");
}

/// The first of each kind of answer: errors, statuses and ids.
#[test]
fn server_texts_are_shown_cleaned_and_cut_or_not_at_all() {
    let (stack, liar) = liar::trusted();
    let bystander = Bystander::start(&stack);
    let words: [&[u8]; 5] = [
        b"-ERR \x1b[2J\x07\0 \xe2\x80\xae evil\r\n",
        b"-WRONGTYPE\0\x1b]0;x\x07\r\n",
        b"-NOPERM \x1b[31m to access the '\x1b' key\r\n",
        b"+\x1b[2J\0\r\n",
        b"$9\r\n\x1b[2J\0\x1b[3J\r\n",
    ];
    let mut sent = 1;
    for command in ["PING", "WATCH", "HGETALL", "HMGET", "XADD", "EXEC"] {
        for said in words {
            let what = format!("{command} {}", String::from_utf8_lossy(said));
            liar.lie(move |words| (words[0] == command).then(|| Lie::Say(said.to_vec())));
            stack
                .pg
                .exec("update outbox.backends set db = 1 - coalesce(db, 0) where name = 'default'");
            stack.publish("t");
            wait_until(&what, || {
                let found = standing(&stack.pg, "default");
                found.state != "idle" || found.failed > 0 || found.published > sent
            });
            assert_clean(&stack.pg, &what);
            liar.lie(|_| None);
            wait_drained(&stack.pg, "default");
            stack.pg.exec("select outbox.retry_failed()");
            wait_drained(&stack.pg, "default");
            sent = standing(&stack.pg, "default").published;
        }
    }
    // An entry id of 2 MB is invalid.
    let id = bulk(&vec![b'1'; 2_000_000]);
    let lie = [b"*2\r\n".to_vec(), id, b":0\r\n".to_vec()].concat();
    liar.lie(move |words| (words[0] == "EXEC").then(|| Lie::Say(lie.clone())));
    let before = standing(&stack.pg, "default").published;
    stack.publish("last");
    let found = kit::wait_trouble(&stack.pg, "default", "backoff", "longer than any reply of Redis");
    assert_eq!((found.pending, found.published), (1, before));
    assert_clean(&stack.pg, "an id of 2 MB");
    bystander
        .stop(&stack)
        .assert_harmless("invalid and invisible characters");
    stack.point("default", &stack.redis);
    assert!(types(&stack.wait_events(1)).contains(&"last"));
}
