//! `outbox.test_backend()`: the worker logs in once more, beside its work, and reports the step that fails.

use kit::sentinel::MASTER;
use kit::{
    Authority, BlackHole, Cluster, Garbage, Liar, Lie, Postgres, QUICK, Redis, Refused, Stack, Watched, publish_many,
    wait_drained, wait_eq,
};
use std::time::{Duration, Instant};

/// The answer without the latency.
#[derive(Debug, PartialEq, Eq)]
struct Answer {
    ok: bool,
    version: Option<String>,
    role: Option<String>,
    address: Option<String>,
    error: Option<String>,
}

fn test(pg: &Postgres, backend: &str) -> Answer {
    let sql = format!("select *, extract(epoch from latency)::float8 as seconds from outbox.test_backend('{backend}')");
    let row = pg.client().query_one(&sql, &[]).expect("an answer");
    let answer = Answer {
        ok: row.get("ok"),
        version: row.get("version"),
        role: row.get("role"),
        address: row.get("address"),
        error: row.get("error"),
    };
    if answer.ok {
        let seconds: f64 = row.get("seconds");
        assert!((0.0..5.0).contains(&seconds), "{seconds}");
        assert!(answer.error.is_none());
    }
    answer
}

#[track_caller]
fn assert_fails(pg: &Postgres, step: &str) {
    let answer = test(pg, "default");
    let error = answer.error.clone().unwrap_or_default();
    assert!(!answer.ok && error.starts_with(step), "{answer:?} instead of {step}");
    assert!(!error.contains("hidden-word"), "{error}");
}

fn quick() -> Stack {
    Stack::of(
        Postgres::with(QUICK).with(&[
            ("outbox_relay.redis_connect_timeout", "500ms"),
            ("outbox_relay.redis_socket_timeout", "500ms"),
        ]),
        Redis::start(),
    )
}

#[test]
fn a_working_backend_passes_in_each_state_and_nothing_is_written() {
    let stack = quick();
    publish_many(&mut stack.pg.client(), "default", "", "event", 3);
    wait_drained(&stack.pg, "default");
    let well = test(&stack.pg, "default");
    assert!(well.ok, "{well:?}");
    assert_eq!(well.role.as_deref(), Some("master"));
    assert_eq!(well.address, Some(format!("127.0.0.1:{}", stack.redis.port())));
    assert!(
        well.version.as_deref().is_some_and(|version| version.contains('.')),
        "{well:?}"
    );
    stack.pg.wait_log("backend \"default\" was tested: it works");
    for set in [
        "enabled = false",
        "enabled = true, delivery = 'at_least_once'",
        "delivery = 'exactly_once'",
    ] {
        stack.pg.exec(&format!("update outbox.backends set {set}"));
        wait_eq("that it is well", true, || test(&stack.pg, "default").ok);
    }
    // Fenced: another server owns the guard.
    stack.redis.call(&[
        "HSET",
        &stack.guard_key(),
        "incarnation",
        "00000000-0000-0000-0000-000000000000",
        "token",
        "x",
    ]);
    assert!(test(&stack.pg, "default").ok);
    assert_eq!((stack.events().len(), stack.redis.xlen("events")), (3, 3));
    assert_eq!(
        stack.redis.guard(&stack.guard_key()).expect("a guard").number("total"),
        3
    );
    // The worker does not know a backend that is not committed.
    let mut client = stack.pg.client();
    client
        .batch_execute("begin; insert into outbox.backends (name) values ('new')")
        .expect("inserted");
    let row = client
        .query_one("select ok, error from outbox.test_backend('new')", &[])
        .expect("an answer");
    let (ok, error): (bool, String) = (row.get(0), row.get(1));
    assert!(!ok && error.contains("commit first"), "{error}");
    client.batch_execute("rollback").expect("rolled back");
    let refused = |sql: &str| Refused::of(stack.pg.client().batch_execute(sql)).code;
    assert_eq!(refused("select outbox.test_backend('none')"), "42704");
    stack
        .pg
        .exec("create role app login in role pg_monitor; select outbox.grant_publisher('app')");
    let refused = stack
        .pg
        .client_as("app", "postgres")
        .batch_execute("select outbox.test_backend('default')");
    assert_eq!(Refused::of(refused).code, "42501");
}

#[test]
fn the_step_that_fails_is_named_and_no_password_is_shown() {
    let mut stack = quick();
    let set = |set: &str| stack.pg.exec(&format!("update outbox.backends set {set}"));
    set("host = 'nowhere.invalid'");
    assert_fails(&stack.pg, "resolve: ");
    set("host = '127.0.0.1', port = 1");
    assert_fails(&stack.pg, "connect: ");
    set(&format!("port = {}, tls = true", stack.redis.port()));
    assert_fails(&stack.pg, "TLS: ");
    set("tls = false");
    stack
        .pg
        .exec("select outbox.set_backend_password('default', 'hidden-word')");
    assert_fails(&stack.pg, "AUTH: ");
    stack.pg.exec("select outbox.set_backend_password('default', null)");
    set("db = 99");
    assert_fails(&stack.pg, "SELECT: ");
    set("db = null");
    let silent = BlackHole::start();
    set(&format!("port = {}", silent.port()));
    let start = Instant::now();
    assert_fails(&stack.pg, "PING: timed out");
    assert!(start.elapsed() < Duration::from_secs(5), "{:?}", start.elapsed());
    let garbage = Garbage::start();
    set(&format!("port = {}", garbage.port()));
    assert_fails(&stack.pg, "PING: ");
    let replica = Redis::replica_of(&stack.redis);
    set(&format!("port = {}", replica.port()));
    assert_fails(&stack.pg, "ROLE: ");
    // A user that may log in, and little else.
    for (rules, error) in [
        ("+@connection", "rights: WATCH: NOPERM"),
        ("+watch +multi +discard +unwatch ~*", "rights: HGETALL: NOPERM"),
        ("+hgetall +hmget +xrevrange +xinfo +hset", "rights: XADD: NOPERM"),
    ] {
        let rules: Vec<&str> = rules.split(' ').collect();
        let words = [&["ACL", "SETUSER", "relay", "on", ">hidden-word"], rules.as_slice()].concat();
        stack.redis.call(&words);
        set(&format!("port = {}, username = 'relay'", stack.redis.port()));
        stack
            .pg
            .exec("select outbox.set_backend_password('default', 'hidden-word')");
        assert_fails(&stack.pg, error);
    }
    stack.redis.call(&["ACL", "SETUSER", "relay", "+xadd"]);
    assert!(test(&stack.pg, "default").ok);
    stack.redis.call(&["ACL", "SETUSER", "relay", "resetkeys", "~events"]);
    assert_fails(&stack.pg, "rights: WATCH: NOPERM");
    // Backends with invalid values.
    stack.pg.exec("select outbox.set_backend_password('default', null)");
    set("username = null");
    stack
        .pg
        .exec("alter table outbox.backends drop constraint backends_max_len_check");
    set("max_len = -1");
    assert_fails(&stack.pg, "configuration: max_len is -1");
    set("max_len = null");
    // If there is no worker, the error says why.
    stack.pg.set("outbox_relay.enabled", "off");
    stack.pg.reload();
    wait_eq("that the worker has left", None, || stack.pg.worker_pid("postgres"));
    assert_fails(&stack.pg, "there is no worker: ");
    stack.redis.kill9();
}

/// If the worker ends during a test, the test is repeated when it is back; a session that is cancelled leaves nothing
/// behind.
#[test]
fn a_test_outlives_the_worker_but_not_its_session() {
    let stack = quick();
    let silent = BlackHole::start();
    stack.pg.exec(&format!(
        "insert into outbox.backends (name, host, port, connect_timeout, socket_timeout, enabled)
            values ('silent', '127.0.0.1', {}, '3 s', '3 s', false)",
        silent.port()
    ));
    let mut asking = stack.pg.client();
    let asked = std::thread::spawn(move || {
        let row = asking.query_one("select error from outbox.test_backend('silent')", &[]);
        row.expect("an answer").get::<_, String>(0)
    });
    wait_eq("that it is being tested", true, || silent.accepted() > 0);
    let old = stack.pg.wait_worker("postgres");
    stack.pg.exec(&format!("select pg_terminate_backend({old})"));
    stack.pg.wait_new_worker(old);
    assert_eq!(asked.join().expect("no panic"), "PING: timed out");
    // More tests than there is room for, one after the other.
    for _ in 0..20 {
        let mut client = stack.pg.client();
        client.batch_execute("set statement_timeout = '50ms'").expect("set");
        match client.query_one("select error from outbox.test_backend('silent')", &[]) {
            // The tests before it are still running.
            Ok(row) => assert!(row.get::<_, String>(0).contains("try again")),
            Err(error) => assert_eq!(error.code().map(|code| code.code()), Some("57014")),
        }
    }
    wait_eq("that there is room", true, || test(&stack.pg, "default").ok);
}

#[test]
fn a_node_is_found_by_sentinels_and_in_a_cluster() {
    let watched = Watched::start();
    let stack = Stack::of(Postgres::with(QUICK), Redis::start());
    stack.pg.exec(&format!(
        "insert into outbox.backends (name, mode, nodes, sentinel_master) values ('watched', 'sentinel', '{}', '{MASTER}')",
        watched.nodes()
    ));
    let answer = test(&stack.pg, "watched");
    assert_eq!(
        (answer.ok, answer.address.clone()),
        (true, Some(format!("127.0.0.1:{}", watched.primary.port()))),
        "{answer:?}"
    );
    stack
        .pg
        .exec("update outbox.backends set sentinel_master = 'other' where name = 'watched'");
    let answer = test(&stack.pg, "watched");
    assert!(
        answer
            .error
            .is_some_and(|error| error.starts_with("finding the node: ") && error.contains("does not know the master"))
    );

    let cluster = Cluster::start(0);
    stack.pg.exec(&format!(
        "insert into outbox.backends (name, mode, nodes, stream_name) values ('many', 'cluster', '{}', 'events')",
        cluster.addresses()
    ));
    let answer = test(&stack.pg, "many");
    assert!(answer.ok && answer.address.is_some(), "{answer:?}");
}

#[test]
fn a_test_uses_the_senders_tls_settings() {
    let authority = Authority::new();
    let redis = Redis::tls(&authority.issue(&["localhost"]), &[]);
    let stack = Stack::of(Postgres::with(QUICK), Redis::start());
    stack.pg.exec(&format!(
        "insert into outbox.backends (name, host, port, tls, tls_ca_file) values ('tls', 'localhost', {}, true, '{}')",
        redis.tls_port(),
        authority.ca_file()
    ));
    let answer = test(&stack.pg, "tls");
    assert!(answer.ok, "{answer:?}");
    stack
        .pg
        .exec("update outbox.backends set tls_ca_file = null where name = 'tls'");
    let answer = test(&stack.pg, "tls");
    assert!(
        answer.error.as_deref().is_some_and(|error| error.starts_with("TLS: ")),
        "{answer:?}"
    );
}

/// What a server says of itself must leave room for what is wrong with it, and a name writes nothing into the log.
#[test]
fn a_servers_long_words_hide_no_error() {
    let stack = quick();
    let liar = Liar::start(|words| match words[0].as_str() {
        "HELLO" => {
            let long = "\u{1f40e}".repeat(200);
            let bulk = |text: &str| format!("${}\r\n{text}\r\n", text.len());
            let [server, version, role] = ["server", "version", "role"].map(bulk);
            Lie::say(format!("*6\r\n{server}{0}{version}{0}{role}{0}", bulk(&long)))
        }
        _ => None,
    });
    stack.pg.exec(&format!(
        "insert into outbox.backends (name, host, port) values ('liar', '127.0.0.1', {0}), (E'evil\\033[2J', '127.0.0.1', {0})",
        liar.port()
    ));
    let answer = test(&stack.pg, "liar");
    let error = answer.error.clone().unwrap_or_default();
    assert!(!answer.ok && error.starts_with("ROLE: READONLY"), "{answer:?}");
    assert_eq!(answer.version.map(|version| version.chars().count()), Some(60));
    stack
        .pg
        .exec("select outbox.test_backend(name) from outbox.backends where name like 'evil%'");
    stack
        .pg
        .wait_log("backend \"evil [2J\" was tested: ROLE: READONLY it is a replica");
    assert!(!stack.pg.log().contains('\u{1b}'), "{}", stack.pg.log());
}
