//! Servers that speak TLS wrongly, or without end, before or instead of Redis: it takes neither memory nor the time of
//! others.

use std::time::Duration;

use kit::{BlackHole, Bystander, Postgres, QUICK, Redis, Stack, standing, wait_until};

/// A record of TLS 1.2: its type, and its content.
fn record(kind: u8, content: &[u8]) -> Vec<u8> {
    let length = u16::try_from(content.len()).expect("a record").to_be_bytes();
    [&[kind, 3, 3][..], &length, content].concat()
}

const CHANGE_CIPHER_SPEC: u8 = 20;
const ALERT: u8 = 21;
const HANDSHAKE: u8 = 22;
const DATA: u8 = 23;

fn endless() -> Vec<(&'static str, Vec<u8>, Vec<u8>)> {
    // A certificate message of 16 MB.
    let certificates = record(HANDSHAKE, &[11, 0xff, 0xff, 0xff]);
    vec![
        (
            "a message of 16 MB",
            certificates.clone(),
            record(HANDSHAKE, &[0; 16_000]),
        ),
        ("the same in pieces of a byte", certificates, record(HANDSHAKE, &[0])),
        ("empty records", Vec::new(), record(HANDSHAKE, &[])),
        ("warnings", Vec::new(), record(ALERT, &[1, 90])),
        ("hellos to restart", Vec::new(), record(HANDSHAKE, &[0, 0, 0, 0])),
        ("changes of ciphers", Vec::new(), record(CHANGE_CIPHER_SPEC, &[1])),
        ("data before a handshake", Vec::new(), record(DATA, &[0; 16_000])),
        (
            "records that are too long",
            Vec::new(),
            vec![HANDSHAKE, 3, 3, 0xff, 0xff],
        ),
        ("zeros", Vec::new(), vec![0; 1_000]),
        ("replies of a Redis", Vec::new(), b"+OK\r\n".to_vec()),
    ]
}

#[test]
fn no_flood_before_or_in_a_handshake_harms_others() {
    let stack = Stack::of(Postgres::with(QUICK), Redis::start());
    let bystander = Bystander::start(&stack);
    let kinds = endless();
    let servers: Vec<BlackHole> = kinds
        .iter()
        .map(|(_, begin, more)| BlackHole::endless(begin, more))
        .collect();
    for (n, server) in servers.iter().enumerate() {
        stack.pg.exec(&format!(
            "insert into outbox.backends (name, host, port, tls, tls_insecure) values ('b{n}', '127.0.0.1', {}, true, true);
             select outbox.publish_event('t', 'kit', backend => 'b{n}') from generate_series(1, 5)",
            server.port()
        ));
    }
    for (n, (what, ..)) in kinds.iter().enumerate() {
        let name = format!("b{n}");
        wait_until(what, || standing(&stack.pg, &name).last_error.is_some());
        let found = standing(&stack.pg, &name);
        println!("{what}: {} {:?}", found.state, found.last_error);
        assert!(
            matches!(found.state.as_str(), "backoff" | "misconfigured"),
            "{what}: {found:?}"
        );
        assert_eq!(
            (found.pending, found.published, found.failed),
            (5, 0, 0),
            "{what}: {found:?}"
        );
    }
    std::thread::sleep(Duration::from_secs(2));
    bystander.stop(&stack).assert_harmless("servers that flood before TLS");
}
