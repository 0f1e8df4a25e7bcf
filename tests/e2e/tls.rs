//! TLS to a Redis that requires it: which server the relay accepts, how it identifies itself, and the errors.

use kit::{
    Authority, Certificate, Postgres, Proxy, QUICK, Redis, Stack, UNTRIMMED, Way, ids, publish_many, standing, tell,
    types, wait_drained, wait_trouble, wait_until,
};

/// A stack whose Redis speaks TLS with this certificate.
fn stack(certificate: &Certificate, args: &[&str]) -> Stack {
    Stack::of(Postgres::with(QUICK), Redis::tls(certificate, args))
}

/// Points the backend at the TLS port, with these columns.
fn secure(stack: &Stack, host: &str, columns: &str) {
    let port = stack.redis.tls_port();
    stack.pg.exec(&format!(
        "update outbox.backends set host = '{host}', port = {port}, tls = true, tls_ca_file = null, tls_cert_file = null, \
         tls_key_file = null, tls_insecure = false; update outbox.backends set {columns}"
    ));
}

fn ca(authority: &Authority) -> String {
    format!("tls_ca_file = '{}'", authority.ca_file())
}

fn client(authority: &Authority, certificate: &Certificate) -> String {
    let Certificate { cert_file, key_file } = certificate;
    format!(
        "{}, tls_cert_file = '{cert_file}', tls_key_file = '{key_file}'",
        ca(authority)
    )
}

/// Publishes an event, and waits until it arrives.
#[track_caller]
fn assert_works(stack: &Stack) {
    let before = stack.redis.xlen("events");
    stack.publish("t");
    stack.wait_events(before + 1);
    wait_drained(&stack.pg, "default");
}

/// Publishes an event, which does not arrive because of this error.
#[track_caller]
fn assert_refused(stack: &Stack, error: &str) {
    let before = stack.redis.xlen("events");
    let waiting = standing(&stack.pg, "default").pending;
    stack.publish("t");
    let said = wait_trouble(&stack.pg, "default", "misconfigured", error);
    wait_until("the event to wait", || {
        standing(&stack.pg, "default").pending == waiting + 1
    });
    assert_eq!((said.failed, stack.redis.xlen("events")), (0, before));
}

#[test]
fn a_server_is_known_by_its_authority_and_its_name() {
    let authority = Authority::new();
    let stack = stack(
        &authority.issue(&["localhost", "127.0.0.1", "::1"]),
        &["--bind", "127.0.0.1", "::1"],
    );
    let ca = ca(&authority);
    for host in ["localhost", "LocalHost", "127.0.0.1", "::1"] {
        secure(&stack, host, &ca);
        assert_works(&stack);
    }
    let clients = format!("{:?}", stack.redis.call(&["CLIENT", "LIST"]));
    assert!(clients.contains("name=outbox_relay:postgres:default"), "{clients}");

    let stranger = Authority::new();
    secure(&stack, "localhost", &format!("tls_ca_file = '{}'", stranger.ca_file()));
    assert_refused(
        &stack,
        "TLS: the server's certificate is not signed by a trusted authority",
    );
    // It is also unknown to the system's authorities.
    secure(&stack, "localhost", "tls_ca_file = null");
    assert_refused(&stack, "TLS");
    stack
        .pg
        .wait_log("HINT:  Check the port, the server's certificate and the names in it");
    secure(&stack, "localhost", &ca);
    wait_drained(&stack.pg, "default");
    assert_works(&stack);
}

#[test]
fn a_server_of_another_name_is_refused() {
    let authority = Authority::new();
    let stack = stack(
        &authority.issue(&["redis.example.com", "localhost.example.com", "127.0.0.2"]),
        &[],
    );
    for host in ["localhost", "127.0.0.1"] {
        secure(&stack, host, &ca(&authority));
        assert_refused(&stack, "TLS: the server's certificate is for another host: ");
    }
    assert_eq!(stack.redis.xlen("events"), 0);
}

#[test]
fn an_expired_certificate_is_refused() {
    let authority = Authority::new();
    let stack = stack(&authority.issue_until(2020, &["localhost"]), &[]);
    secure(&stack, "localhost", &ca(&authority));
    assert_refused(&stack, "TLS: the server's certificate has expired");
    wait_until("some attempts", || {
        format!("{:?}", stack.redis.call(&["INFO", "stats"])).contains("total_error_replies")
    });
    // The same error each time, so one line.
    assert_eq!(stack.pg.log().matches("has expired").count(), 1);
}

/// OpenSSL's variable for the system's root certificates is used, as by other programs.
#[test]
fn without_a_file_the_systems_authorities_are_trusted() {
    let authority = Authority::new();
    let redis = Redis::tls(&authority.issue(&["localhost"]), &[]);
    let postgres = Postgres::with(QUICK).env("SSL_CERT_FILE", &authority.ca_file());
    let stack = Stack::of(postgres, redis);
    secure(&stack, "localhost", "tls_ca_file = null");
    assert_works(&stack);
}

#[test]
fn a_server_may_want_a_clients_certificate() {
    let (authority, stranger) = (Authority::new(), Authority::new());
    let ca_file = authority.ca_file();
    let stack = stack(
        &authority.issue(&["localhost"]),
        &["--tls-ca-cert-file", &ca_file, "--tls-auth-clients", "yes"],
    );
    secure(&stack, "localhost", &ca(&authority));
    assert_refused(&stack, "TLS: the server requires a client certificate");
    secure(&stack, "localhost", &client(&authority, &stranger.issue(&["relay"])));
    assert_refused(
        &stack,
        "TLS: the server refuses the connection or the client certificate: ",
    );
    secure(
        &stack,
        "localhost",
        &client(&authority, &authority.issue_until(2020, &["relay"])),
    );
    assert_refused(
        &stack,
        "TLS: the server refuses the connection or the client certificate: ",
    );
    let relay = authority.issue(&["relay"]);
    secure(&stack, "localhost", &client(&authority, &relay));
    wait_drained(&stack.pg, "default");
    assert_works(&stack);
    // Also with TLS 1.2, which asks during the handshake.
    stack.redis.call(&["CONFIG", "SET", "tls-protocols", "TLSv1.2"]);
    secure(&stack, "localhost", &ca(&authority));
    assert_refused(&stack, "TLS: the server ");
    secure(&stack, "localhost", &client(&authority, &relay));
    wait_drained(&stack.pg, "default");
    assert_works(&stack);
}

#[test]
fn files_are_read_at_each_connect_and_their_faults_are_named() {
    let authority = Authority::new();
    let stack = stack(&authority.issue(&["localhost"]), &[]);
    let (good, other) = (authority.issue(&["relay"]), authority.issue(&["relay"]));
    let bytes = |path: &str| std::fs::read(path).expect("a file");
    let cert_file = authority.file("relay.pem", &bytes(&good.cert_file), 0o644);
    let key_file = authority.file("relay.key", &bytes(&good.key_file), 0o600);
    let ca_file = authority.file("other-ca.pem", &bytes(&authority.ca_file()), 0o644);
    let columns = format!("tls_ca_file = '{ca_file}', tls_cert_file = '{cert_file}', tls_key_file = '{key_file}'");
    secure(&stack, "localhost", &columns);
    assert_works(&stack);

    let pem =
        |inside: &str| format!("-----BEGIN {inside}-----\nc2VjcmV0IHdvcmRz\n-----END {inside}-----\n").into_bytes();
    let mut faults = vec![
        (
            "other-ca.pem",
            b"no PEM, but secret words".to_vec(),
            0o644,
            "has no certificates in PEM format",
        ),
        (
            "other-ca.pem",
            pem("CERTIFICATE"),
            0o644,
            "has no certificate that can be used",
        ),
        (
            "other-ca.pem",
            bytes(&key_file),
            0o600,
            "has no certificates in PEM format",
        ),
        ("relay.pem", Vec::new(), 0o644, "has no certificates in PEM format"),
        ("relay.pem", pem("CERTIFICATE"), 0o644, "cannot be used"),
        (
            "relay.key",
            b"secret words".to_vec(),
            0o600,
            "has no unencrypted private key in PEM format",
        ),
        ("relay.key", pem("PRIVATE KEY"), 0o600, "cannot be used"),
        (
            "relay.key",
            pem("ENCRYPTED PRIVATE KEY"),
            0o600,
            "has no unencrypted private key in PEM format",
        ),
        (
            "relay.key",
            bytes(&other.key_file),
            0o600,
            "does not belong to the certificate",
        ),
        ("relay.key", bytes(&key_file), 0o644, "has group or world access"),
        ("relay.key", bytes(&key_file), 0o640, "has group or world access"),
    ];
    // A group may read a file of root's.
    if nix::unistd::geteuid().is_root() {
        faults.push(("relay.key", bytes(&key_file), 0o000, "could not read TLS key file"));
    }
    let mut published = 1;
    for (name, wrong, mode, error) in faults {
        let path = authority.file(name, b"", 0o600);
        let right = match name {
            "other-ca.pem" => bytes(&authority.ca_file()),
            "relay.pem" => bytes(&good.cert_file),
            _ => bytes(&good.key_file),
        };
        authority.file(name, &wrong, mode);
        stack.redis.call(&["CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes"]);
        stack.publish("t");
        let said = wait_trouble(&stack.pg, "default", "misconfigured", error);
        let message = said.last_error.unwrap_or_default();
        assert!(
            message.contains(&path) || message.contains("relay.key"),
            "{name}: {message}"
        );
        authority.file(name, &right, 0o600);
        published += 1;
        stack.wait_events(published);
        wait_drained(&stack.pg, "default");
    }
    std::fs::remove_file(&ca_file).expect("remove");
    stack.redis.call(&["CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes"]);
    stack.publish("t");
    let gone = format!("could not read TLS CA file \"{ca_file}\": No such file");
    wait_trouble(&stack.pg, "default", "misconfigured", &gone);
    // Nothing of any file was sent.
    let key = String::from_utf8(bytes(&good.key_file)).expect("PEM is ASCII");
    let line = key.lines().nth(1).expect("a line of the key");
    let said: String = stack.pg.one("select string_agg(c::text, ' ') from outbox.cursors c");
    for text in [stack.pg.log(), said, stack.pg.pg_dump("postgres")] {
        assert!(!text.contains("secret") && !text.contains("c2VjcmV0") && !text.contains(line));
    }
}

#[test]
fn any_server_is_taken_with_a_warning() {
    let authority = Authority::new();
    let stack = stack(&authority.issue_until(2020, &["elsewhere"]), &[]);
    secure(&stack, "127.0.0.1", "tls_insecure = true");
    assert_works(&stack);
    let warned = || {
        stack
            .pg
            .log()
            .matches("WARNING:  backend \"default\" is connected")
            .count()
    };
    stack
        .pg
        .wait_log("DETAIL:  With tls_insecure, the server's certificate is not verified.");
    assert_eq!(warned(), 1);
    // A connection that is lost and made again at once is not logged.
    for _ in 0..3 {
        stack.redis.call(&["CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes"]);
        assert_works(&stack);
    }
    assert!(warned() <= 4, "{}", warned());
    // A name that no certificate can have, but which has an address.
    secure(&stack, "127.1", "tls_insecure = true");
    assert_works(&stack);
    secure(&stack, "127.1", "tls_insecure = false");
    assert_refused(&stack, "TLS");
}

#[test]
fn swapped_tls_and_plain_ports_are_named() {
    let authority = Authority::new();
    let stack = stack(&authority.issue(&["localhost"]), &[]);
    secure(&stack, "localhost", &ca(&authority));
    stack.point_at("default", "localhost", stack.redis.port());
    stack.publish("t");
    wait_until("words about TLS", || {
        let standing = standing(&stack.pg, "default");
        standing.last_error.is_some_and(|error| error.starts_with("TLS"))
    });
    stack.pg.exec(&format!(
        "update outbox.backends set tls = false, tls_ca_file = null, port = {}",
        stack.redis.tls_port()
    ));
    wait_until("other words", || {
        let standing = standing(&stack.pg, "default");
        standing.last_error.is_some_and(|error| !error.starts_with("TLS"))
    });
    println!("{:?}", standing(&stack.pg, "default"));
    assert_eq!(stack.redis.xlen("events"), 0);
    secure(&stack, "localhost", &ca(&authority));
    wait_drained(&stack.pg, "default");
}

/// A server that accepts connections, and sends nothing or something else than TLS: connect_timeout limits the
/// handshake.
#[test]
fn a_handshake_that_never_ends_times_out() {
    let stack = Stack::with(QUICK);
    let (silent, garbage) = (kit::BlackHole::start(), kit::Garbage::start());
    stack.pg.exec("update outbox.backends set tls = true");
    stack.point_at("default", "127.0.0.1", silent.port());
    stack.publish("t");
    wait_trouble(&stack.pg, "default", "backoff", "TLS handshake: timed out");
    stack.point_at("default", "127.0.0.1", garbage.port());
    wait_trouble(
        &stack.pg,
        "default",
        "misconfigured",
        "TLS: the server does not speak TLS on this port",
    );
}

#[test]
fn settings_are_changed_at_run_time() {
    let authority = Authority::new();
    let stack = stack(&authority.issue(&["localhost"]), &[]);
    let mut expected = Vec::new();
    for round in 0..6 {
        if round % 2 == 0 {
            secure(&stack, "localhost", &ca(&authority));
        } else {
            stack
                .pg
                .exec("update outbox.backends set tls = false, tls_ca_file = null");
            stack.point("default", &stack.redis);
        }
        expected.extend(publish_many(&mut stack.pg.client(), "default", "", "t", 100));
    }
    wait_drained(&stack.pg, "default");
    assert_eq!(ids(&stack.events()), expected);
}

#[test]
fn large_batches_and_long_backlogs_arrive_over_tls() {
    let authority = Authority::new();
    let stack = Stack::of(
        Postgres::with(&[UNTRIMMED]),
        Redis::tls(&authority.issue(&["localhost"]), &[]),
    );
    for delivery in ["exactly_once", "at_least_once"] {
        stack.redis.call(&["FLUSHALL"]);
        secure(
            &stack,
            "localhost",
            &format!("{}, delivery = '{delivery}'", ca(&authority)),
        );
        // Each larger than a record of TLS, and a batch larger than any buffer on the way.
        stack.pg.exec(
            "select outbox.publish_event('large', 'kit', to_jsonb(repeat('x', 700000))) from generate_series(1, 60)",
        );
        let mut expected = stack.wait_events(60).len();
        expected += publish_many(&mut stack.pg.client(), "default", "", "small", 50_000).len();
        wait_drained(&stack.pg, "default");
        assert_eq!(stack.redis.xlen("events"), expected, "{delivery}");
    }
}

/// The network breaks at any byte; an encrypted record arrives completely or not at all.
#[test]
fn exactly_once_through_cuts() {
    let authority = Authority::new();
    let redis = Redis::tls(&authority.issue(&["localhost"]), &[]);
    let settings = &[
        UNTRIMMED,
        ("outbox_relay.poll_interval", "1h"),
        ("outbox_relay.retry_delay", "1ms"),
    ];
    let stack = Stack::of(Postgres::with(QUICK).with(settings), redis);
    let proxy = Proxy::to(stack.redis.tls_port());
    secure(&stack, "localhost", &ca(&authority));
    stack.point_at("default", "localhost", proxy.port());
    wait_until("the relay to come by the proxy", || proxy.connections() == 1);
    let (mut session, mut redis) = (stack.pg.client(), stack.redis.conn());
    let mut published = Vec::new();
    // Within a batch or its replies, and within the login of a new connection.
    for (way, end, step) in [(Way::ToServer, 2_800, 31), (Way::ToClient, 2_800, 31)] {
        for bytes in (0..end).step_by(step) {
            proxy.cut_after(way, bytes);
            if bytes % 2 == 0 {
                proxy.cut();
            }
            published.extend(publish_many(&mut session, "default", "", "t", 2));
            wait_until("events in the stream", || {
                kit::xlen(&mut redis, "events") >= published.len()
            });
        }
    }
    assert!(proxy.cuts() > 150, "{} cuts", proxy.cuts());
    proxy.pass();
    wait_drained(&stack.pg, "default");
    assert_eq!(ids(&stack.events()), published);
}

/// A password that is sent over TLS is kept secret like any other.
#[test]
fn logging_in_over_tls() {
    let authority = Authority::new();
    let stack = Stack::of(
        Postgres::with(QUICK),
        Redis::tls(&authority.issue(&["localhost"]), &["--requirepass", "secret-word"]),
    );
    stack
        .redis
        .call(&["ACL", "SETUSER", "relay", "on", ">other-secret", "~*", "+@all"]);
    secure(&stack, "localhost", &format!("{}, username = 'relay'", ca(&authority)));
    stack
        .pg
        .exec("select outbox.set_backend_password('default', 'wrong-secret')");
    assert_refused(&stack, "WRONGPASS");
    stack
        .pg
        .exec("select outbox.set_backend_password('default', 'other-secret')");
    wait_drained(&stack.pg, "default");
    assert_eq!(types(&stack.events()), ["t"]);
    let clients = format!("{:?}", tell(&mut stack.redis.conn(), &["CLIENT", "LIST"]));
    assert!(clients.contains("user=relay"), "{clients}");
    assert!(!stack.pg.log().contains("-secret"), "a password is in the log");
}
