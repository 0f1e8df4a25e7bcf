//! Passwords are shown nowhere, whatever a server answers, and texts of a server do no harm to their readers.

use kit::{BlackHole, Postgres, QUICK, Redis, Stack, env, standing, wait_until};

const SECRET: &str = "Xq7-zK9.wQ2y";

/// All settings that make the server log more.
const LOUD: &[(&str, &str)] = &[
    ("log_statement", "all"),
    ("log_min_duration_statement", "0"),
    ("log_duration", "on"),
    ("log_error_verbosity", "verbose"),
    ("log_min_messages", "debug1"),
    ("log_parameter_max_length", "-1"),
    ("log_parameter_max_length_on_error", "-1"),
    ("debug_print_plan", "on"),
    ("debug_print_rewritten", "on"),
    (
        "shared_preload_libraries",
        "outbox_relay,auto_explain,pg_stat_statements",
    ),
    ("auto_explain.log_min_duration", "0"),
    ("auto_explain.log_nested_statements", "on"),
    ("auto_explain.log_analyze", "on"),
    ("auto_explain.log_verbose", "on"),
    ("pg_stat_statements.track", "all"),
];

fn stack() -> Stack {
    Stack::of(Postgres::with(QUICK), Redis::start())
}

/// A backend at a server that gives this answer, with a pending event; returns its last error, once it has one.
fn trouble(stack: &Stack, backend: &str, more: &str, says: &[u8]) -> (BlackHole, String) {
    let hole = BlackHole::saying(says);
    stack.pg.exec(&format!(
        "insert into outbox.backends (name, host, port) values ('{backend}', '127.0.0.1', {});
        select outbox.set_backend_password('{backend}', '{SECRET}'); {more};
        select outbox.publish_event('t', 'kit', backend => '{backend}', max_retries => 1);",
        hole.port()
    ));
    wait_until(&format!("an error of {backend}"), || {
        standing(&stack.pg, backend).last_error.is_some()
    });
    let error = standing(&stack.pg, backend).last_error.expect("one");
    (hole, error)
}

/// No part of the secret that is long enough to be recognised.
#[track_caller]
fn assert_hidden(text: &str, of: &str) {
    for length in 4..=SECRET.len() {
        for start in 0..=SECRET.len() - length {
            let piece = &SECRET[start..start + length];
            assert!(!text.contains(piece), "{piece:?} of {of}: {text}");
        }
    }
}

#[test]
fn a_server_that_repeats_the_password_shows_it_nowhere() {
    let stack = stack();
    let login = b"+OK\r\n+OK\r\n+PONG\r\n".to_vec();
    let said: Vec<(&str, &str, Vec<u8>)> = vec![
        (
            "auth",
            "",
            format!("-ERR unknown command 'AUTH' {SECRET} {SECRET}\r\n").into(),
        ),
        ("code", "", format!("-{SECRET} is wrong\r\n").into()),
        (
            "args",
            "",
            format!("-ERR unknown command `AUTH`, with args beginning with: `{SECRET}`\r\n").into(),
        ),
        (
            "late",
            "",
            [login.clone(), format!("-ERR you said {SECRET}\r\n").repeat(9).into()].concat(),
        ),
        (
            "abort",
            "",
            [
                login.clone(),
                format!("+OK\r\n*-1\r\n-EXECABORT Transaction discarded because of: ERR {SECRET}\r\n").into(),
            ]
            .concat(),
        ),
        ("cut", "", format!("-WRONGPASS {}{SECRET}\r\n", "x".repeat(184)).into()),
        (
            "file",
            "update outbox.backends set password_file = '/nowhere/x' where name = 'file'",
            format!("-ERR {SECRET}\r\n").into(),
        ),
        (
            "event",
            "update outbox.backends set delivery = 'at_least_once' where name = 'event'",
            [
                login,
                format!("-STRANGE {SECRET} was your password\r\n").repeat(9).into(),
            ]
            .concat(),
        ),
    ];
    let mut holes = Vec::new();
    for (backend, more, says) in said {
        let (hole, error) = trouble(&stack, backend, more, &says);
        assert_hidden(&error, backend);
        holes.push(hole);
    }
    wait_until("the failed event", || {
        stack.pg.one::<i64>("select count(*) from outbox.failed_events") == 1
    });
    let failed: String = stack.pg.one("select last_error from outbox.failed_events");
    assert!(failed.starts_with("STRANGE (the rest is omitted"), "{failed}");
    assert_hidden(&stack.pg.log(), "the log");
    assert_hidden(&stack.pg.pg_dump("postgres"), "the dump");
    for sql in [
        "select string_agg(a::text, '') from pg_stat_activity a where backend_type <> 'client backend'",
        "select string_agg(s::text, '') from outbox.backend_status s",
        "select string_agg(s::text, '') from outbox.event_status s",
        "select string_agg(s::text, '') from outbox.status s",
        "select string_agg(b::text, '') from outbox.backends b",
        "select string_agg(c::text, '') from outbox.cursors c",
    ] {
        assert_hidden(&stack.pg.one::<String>(sql), sql);
    }
}

#[test]
fn server_texts_are_cut_and_cleaned() {
    let stack = stack();
    let unseen: &[char] = &[
        '\u{1b}', '\u{7}', '\u{9b}', '\u{202e}', '\u{2066}', '\u{200b}', '\u{feff}', '\t',
    ];
    let said: Vec<(&str, Vec<u8>)> = vec![
        ("ansi", b"-ERR \x1b[2J\x1b]0;title\x07 \x1b[31mred\r\n".to_vec()),
        (
            "bidi",
            "-ERR \u{202e}drowssap\u{2066} \u{200b}\u{feff}\u{9b}1m\t\r\n".into(),
        ),
        ("bytes", b"-ERR \xff\xfe\x80 not text \xc3\x28\r\n".to_vec()),
        (
            "long",
            [b"-ERR ".to_vec(), vec![b'x'; 1_000_000], b"\r\n".to_vec()].concat(),
        ),
        (
            "medium",
            [b"-ERR ".to_vec(), vec![b'y'; 60_000], b"\r\n".to_vec()].concat(),
        ),
        ("lines", b"-ERR one\rLOG:  forged\x0bline\x0c\x00end\r\n".to_vec()),
    ];
    let mut holes = Vec::new();
    for (backend, says) in said {
        let (hole, error) = trouble(&stack, backend, "", &says);
        assert!(
            error.chars().count() <= 203,
            "{backend}: {} characters",
            error.chars().count()
        );
        assert!(
            !error.contains(|c: char| c.is_control() || unseen.contains(&c)),
            "{backend}: {error:?}"
        );
        holes.push(hole);
    }
    let log = stack.pg.log();
    assert!(!log.contains(unseen), "the log has characters that are not seen");
    assert!(!log.lines().any(|line| line.starts_with("LOG:  forged")));
    let longest = log.lines().filter(|l| l.contains("backend \"")).map(str::len).max();
    assert!(longest.is_some_and(|length| length < 1_000), "{longest:?}");
}

/// A role that may read all data cannot read a password: neither in its table, nor in the statistics of ANALYZE.
#[test]
fn statistics_hold_no_password() {
    let stack = Stack::start();
    stack
        .pg
        .exec("create role reader login in role pg_read_all_data, pg_read_all_stats, pg_monitor");
    for n in 0..20 {
        stack.pg.exec(&format!(
            "insert into outbox.backends (name, enabled) values ('b{n}', false); select outbox.set_backend_password('b{n}', '{SECRET}{}')",
            n % 7
        ));
    }
    stack.pg.exec("analyze outbox.backend_passwords; analyze");
    // Sessions that are idle after such a statement, idle after it has failed, and waiting in it.
    let set = |backend: &str| format!("select outbox.set_backend_password('{backend}', '{SECRET}')");
    let mut idle = stack.pg.client();
    idle.batch_execute(&set("b1")).expect("set");
    let mut failed = stack.pg.client();
    failed.batch_execute(&set("nowhere")).expect_err("no such backend");
    let mut locker = stack.pg.client();
    locker
        .batch_execute("begin; lock table outbox.backend_passwords in share mode")
        .expect("lock");
    let (mut waiting, sql) = (stack.pg.client(), set("b2"));
    let waiting = std::thread::spawn(move || waiting.batch_execute(&sql));
    wait_until("the session to wait", || {
        stack
            .pg
            .one::<bool>("select exists (select from pg_stat_activity where wait_event_type = 'Lock')")
    });
    let mut reader = stack.pg.client_as("reader", "postgres");
    for sql in [
        "select coalesce(string_agg(p::text, ''), '') from outbox.backend_passwords p",
        "select coalesce(string_agg(s::text, ''), '') from pg_statistic s",
        "select coalesce(string_agg(s::text, ''), '') from pg_stats s",
        "select coalesce(string_agg(s::text, ''), '') from pg_stat_activity s where pid <> pg_backend_pid()",
    ] {
        let seen: String = reader.query_one(sql, &[]).expect("no right is missing").get(0);
        assert!(!seen.contains("Xq7"), "{sql}");
    }
    locker.batch_execute("rollback").expect("rolled back");
    waiting.join().expect("no panic").expect("set");
}

/// When a statement that sets a password fails, or is explained, the server's own log entries do not contain the
/// password.
#[test]
fn the_documented_statements_show_no_password() {
    if env::lacks(&["auto_explain"]) {
        return;
    }
    let mut settings = vec![
        ("log_error_verbosity", "verbose"),
        ("log_min_duration_statement", "-1"),
        ("session_preload_libraries", "auto_explain"),
        ("auto_explain.log_min_duration", "0"),
        ("auto_explain.log_nested_statements", "on"),
        ("auto_explain.log_analyze", "on"),
        ("auto_explain.log_verbose", "on"),
        ("lock_timeout", "100ms"),
    ];
    // From 16 on it also logs the bound parameters, unless a setting forbids it: see docs/backends.md.
    if env::postgres_major() >= 16 {
        settings.push(("auto_explain.log_parameter_max_length", "0"));
    }
    let stack = Stack::with(&settings);
    let mut client = stack.pg.client();
    client
        .batch_execute("do $$ begin perform 'this is explained'; end $$")
        .expect("done");
    let set = "select outbox.set_backend_password($1, $2)";
    client.execute(set, &[&"default", &SECRET]).expect("set");
    // The text of a statement within a function is a part of the CONTEXT of all that is logged below it.
    let block = format!("do $$ begin perform outbox.set_backend_password('default', '{SECRET}'); end $$");
    client.batch_execute(&block).expect("set");
    client
        .execute(set, &[&"nowhere", &SECRET])
        .expect_err("no such backend");
    let mut other = stack.pg.client();
    other
        .batch_execute("begin; lock table outbox.backend_passwords in share mode")
        .expect("lock");
    client.execute(set, &[&"default", &SECRET]).expect_err("it is locked");
    other.batch_execute("rollback").expect("rollback");
    stack.pg.wait_log("Query Text: SELECT 'this is explained'");
    assert_hidden(&stack.pg.log(), "the log");
}

/// The script avoids everything that a server can be told to log, and its statistics.
#[test]
fn the_script_shows_no_password() {
    if env::lacks(&["auto_explain", "pg_stat_statements"]) {
        return;
    }
    let mut settings = LOUD.to_vec();
    settings.extend(QUICK);
    let stack = Stack::of(Postgres::with(&settings), Redis::with(&["--requirepass", SECRET]));
    stack.pg.exec(
        "create extension pg_stat_statements; create role keeper login; grant usage on schema outbox to keeper;
        grant execute on function outbox.set_backend_password to keeper; grant select on outbox.backends to keeper",
    );
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/../contrib/set_backend_password.sql");
    let run = |backend: &str, password: &str| {
        let backend = format!("backend={backend}");
        stack
            .pg
            .run("psql", &["-U", "keeper", "-v", &backend, "-f", script], password)
    };
    let ran = run("default", &format!("{SECRET}\nanother line\n"));
    assert!(ran.ok, "{}", ran.stderr);
    stack.publish("t");
    assert_eq!(stack.wait_events(1).len(), 1);
    for (backend, password) in [("default", ""), ("nowhere", SECRET)] {
        assert!(!run(backend, password).ok, "{backend}");
    }
    assert_hidden(&stack.pg.log(), "the log");
    stack.pg.wait_log("set_backend_password");
    for sql in [
        "select string_agg(s::text, '') from pg_stat_statements s",
        "select string_agg(a::text, '') from pg_stat_activity a where pid <> pg_backend_pid()",
    ] {
        assert_hidden(&stack.pg.one::<String>(sql), sql);
    }
}
