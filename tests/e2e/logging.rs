//! The worker's log: a line on each change of state, no more, and never the content of events or credentials of Redis.

use kit::{
    BlackHole, Bystander, Garbage, Liar, Lie, Postgres, QUICK, Redis, Stack, standing, wait_drained, wait_trouble,
    wait_until,
};

fn count(log: &str, text: &str) -> usize {
    log.matches(text).count()
}

#[test]
fn an_outage_is_logged_once_and_so_is_its_end() {
    let mut stack = Stack::of(
        Postgres::with(QUICK).with(&[
            ("outbox_relay.retry_delay", "10ms"),
            ("outbox_relay.retry_backoff", "off"),
        ]),
        Redis::start(),
    );
    for round in 1..=2 {
        stack.publish("t");
        wait_until("connected", || {
            count(&stack.pg.log(), "backend \"default\" is connected") == round
        });
        stack.redis.shutdown();
        stack.publish("meanwhile");
        wait_trouble(&stack.pg, "default", "backoff", "refused");
        let attempt = || -> Option<chrono::DateTime<chrono::Utc>> {
            stack.pg.one("select next_attempt_at from outbox.backend_status")
        };
        // Saved a few times a second; many more attempts than that were made.
        for _ in 0..3 {
            let before = attempt();
            wait_until("another attempt", || attempt() != before);
        }
        let (log, address) = (stack.pg.log(), format!("127.0.0.1:{}", stack.redis.port()));
        let refused = count(
            &log,
            &format!("DETAIL:  Redis at {address}: Connection refused (os error 111).\n"),
        );
        let connected = count(
            &log,
            &format!("backend \"default\" is connected to Redis at {address}\n"),
        );
        assert_eq!((refused, connected), (round, round), "{log}");
        stack.redis.start_again();
        stack.wait_events(1);
    }
}

/// Each attempt may end with another error; all of them are one problem.
#[test]
fn alternating_problems_are_not_logged_repeatedly() {
    let stack = Stack::of(
        Postgres::with(QUICK).with(&[
            ("outbox_relay.retry_delay", "5ms"),
            ("outbox_relay.retry_backoff", "off"),
        ]),
        Redis::start(),
    );
    let garbage = Garbage::saying_in_turn(&[b"HTTP/1.1 400 Bad Request\r\n", b"SSH-2.0-OpenSSH_9.2\r\n"]);
    stack.point_at("default", "127.0.0.1", garbage.port());
    stack.publish("t");
    wait_until("many attempts", || garbage.accepted() > 60);
    let log = stack.pg.log();
    let mut details: Vec<&str> = log
        .lines()
        .filter_map(|l| l.split_once("DETAIL:  Redis at "))
        .map(|(_, d)| d)
        .collect();
    details.sort_unstable();
    let all = details.len();
    details.dedup();
    assert!((1..=8).contains(&all) && details.len() == all, "{log}");
}

#[test]
fn neither_payloads_nor_passwords_are_logged_or_shown() {
    const PAYLOAD: &str = "payload-3f1c";
    const PASSWORD: &str = "password-9a7e";
    let redis = Redis::with(&["--requirepass", PASSWORD]);
    let stack = Stack::of(
        Postgres::with(QUICK).with(&[
            ("outbox_relay.log_level", "debug"),
            ("log_min_messages", "debug2"),
            ("outbox_relay.max_retries", "2"),
        ]),
        redis,
    );
    let (garbage, hole) = (Garbage::start(), BlackHole::start());
    let no_streams = Redis::with(&["--rename-command", "XADD", ""]);
    stack.pg.exec(&format!(
        "insert into outbox.backends (name, host, port, max_len) values
            ('garbage', '127.0.0.1', {}, 0), ('hole', '127.0.0.1', {}, 0), ('old', '127.0.0.1', {}, 0)",
        garbage.port(),
        hole.port(),
        no_streams.port()
    ));
    for (backend, password) in [
        ("default", format!("wrong-{PASSWORD}")),
        ("hole", PASSWORD.into()),
        ("garbage", PASSWORD.into()),
    ] {
        stack.pg.exec(&format!(
            "select outbox.set_backend_password('{backend}', '{password}')"
        ));
    }
    let publish = |stream: &str| {
        stack.pg.exec(&format!(
            "select outbox.publish_event('e', 's', jsonb_build_object('text', '{PAYLOAD}'), subject => '{PAYLOAD}',
                backend => name, publisher_config => jsonb_build_object('extra', '{PAYLOAD}'), stream => nullif('{stream}', ''))
            from outbox.backends"
        ));
    };
    publish("");
    wait_trouble(&stack.pg, "default", "misconfigured", "WRONGPASS");
    wait_trouble(&stack.pg, "hole", "backoff", "timed out");
    wait_trouble(&stack.pg, "old", "misconfigured", "unknown command");
    wait_trouble(&stack.pg, "garbage", "backoff", "");
    stack
        .pg
        .exec(&format!("select outbox.set_backend_password('default', '{PASSWORD}')"));
    let entry = stack.wait_events(1).remove(0);
    assert_eq!(entry.get("extra"), Some(PAYLOAD), "the marker is in the entry");
    stack.redis.call(&["SET", "bad", "a string"]);
    publish("bad");
    wait_until("the event to fail", || standing(&stack.pg, "default").failed == 1);
    stack.pg.set("outbox_relay.log_level", "info");
    stack
        .pg
        .wait_log("parameter \"outbox_relay.log_level\" changed to \"info\"");

    let views: String = stack.pg.one(
        "select concat((select jsonb_agg(s) from outbox.status s), (select jsonb_agg(b) from outbox.backend_status b),
            (select jsonb_agg(f.last_error) from outbox.failed_events f), (select jsonb_agg(r) from outbox.refused_events r),
            (select jsonb_agg(a.query) from pg_stat_activity a where a.backend_type like 'outbox_relay%'))",
    );
    for (place, text) in [("the log", stack.pg.log()), ("the views", views)] {
        for marker in [PAYLOAD, PASSWORD] {
            let line = text.lines().find(|line| line.contains(marker));
            assert_eq!(line, None, "{place} shows {marker}");
        }
    }
}

#[test]
fn log_level_error_silences_information_and_warnings() {
    let mut stack = Stack::of(
        Postgres::with(QUICK).with(&[("outbox_relay.log_level", "error")]),
        Redis::start(),
    );
    stack.publish("t");
    stack.wait_events(1);
    stack.redis.shutdown();
    stack.publish("t");
    wait_trouble(&stack.pg, "default", "backoff", "refused");
    // Still an ERROR: somebody must correct a setting.
    stack.point_at("default", "no..such..host", 1);
    stack.pg.wait_log("backend \"default\" cannot be reached");
    let log = stack.pg.log();
    assert!(
        !log.contains("worker started") && !log.contains("is connected") && !log.contains("refused"),
        "{log}"
    );

    stack.pg.set("outbox_relay.log_level", "warning");
    stack.point_at("default", "127.0.0.1", stack.redis.port());
    stack.pg.wait_log("refused");
    stack.redis.start_again();
    stack.wait_events(1);
    assert!(!stack.pg.log().contains("is connected"));
    stack.pg.set("outbox_relay.log_level", "info");
    stack.redis.shutdown();
    stack.publish("t");
    wait_trouble(&stack.pg, "default", "backoff", "refused");
    stack.redis.start_again();
    stack
        .pg
        .wait_log("backend \"default\" is connected to Redis at 127.0.0.1");
}

#[test]
fn at_level_debug_each_step_is_logged_and_at_info_none() {
    const STEPS: [&str; 5] = [
        "connecting to Redis at 127.0.0.1:",
        "claiming the guard of backend \"default\"",
        "sent 1 events to backend \"default\"",
        "saved the cursor of backend \"default\": ",
        "loaded the settings of 1 backends",
    ];
    let stack = Stack::start();
    stack.publish("one");
    wait_drained(&stack.pg, "default");
    for step in STEPS {
        assert!(!stack.pg.log().contains(step), "{step}");
    }
    stack.pg.set("outbox_relay.log_level", "debug");
    // Another connection, which is claimed again.
    stack.pg.exec("update outbox.backends set db = 1");
    stack.publish("two");
    for step in STEPS {
        stack.pg.wait_log(step);
    }
    stack
        .pg
        .exec("select outbox.publish_event('later', 'kit', scheduled_at => clock_timestamp() + '50 ms')");
    stack.pg.wait_log("moved 1 scheduled events that are due");
}

/// A server that takes a batch on each connection and then drops it: each connection is a success, and each loss news.
#[test]
fn a_server_that_comes_and_goes_does_not_flood_the_log() {
    let stack = Stack::of(
        Postgres::with(QUICK).with(&[
            ("outbox_relay.retry_delay", "5ms"),
            ("outbox_relay.retry_backoff", "off"),
        ]),
        Redis::start(),
    );
    let liar = Liar::honest();
    let mut has_added = false;
    liar.lie(move |words| match words[0].to_ascii_uppercase().as_str() {
        "XADD" => {
            has_added = true;
            None
        }
        "EXEC" => std::mem::take(&mut has_added).then_some(Lie::Close),
        _ => None,
    });
    stack.point_at("default", "127.0.0.1", liar.port());
    let mark = stack.pg.log().len();
    wait_until("many connections", || {
        stack.publish("t");
        liar.accepted() > 60
    });
    let log = stack.pg.log().split_off(mark);
    let lines = count(&log, "LOG:  ") + count(&log, "WARNING:  ") + count(&log, "ERROR:  ");
    println!("{lines} lines for {} connections", liar.accepted());
    // Eight connections are replaced without a word. After that each loss counts, until 20 lines and one more were
    // logged about the backend. Some are about the server.
    assert!(lines < 30, "{lines}: {log}");
}

/// Lines of the worker, without their details and hints.
fn lines_of_worker(log: &str) -> usize {
    let levels = ["LOG:  ", "WARNING:  ", "ERROR:  "];
    let is_line =
        |line: &&str| line.contains("outbox_relay worker ") && levels.iter().any(|level| line.contains(level));
    log.lines().filter(is_line).count()
}

/// Whoever can make things fail, as fast as possible and in ever other words.
#[test]
fn nobody_fills_the_log() {
    const SECONDS: usize = 8;
    let stack = Stack::of(
        Postgres::with(QUICK).with(&[
            ("outbox_relay.retry_delay", "5ms"),
            ("outbox_relay.retry_backoff", "off"),
            ("outbox_relay.max_retries", "2"),
        ]),
        Redis::start(),
    );
    let (locked, garbage) = (
        Redis::with(&["--requirepass", "secret"]),
        Garbage::saying_in_turn(&[
            b"HTTP/1.1 400 Bad Request\r\n",
            b"-LOADING\r\n",
            b"SSH-2.0-OpenSSH_9.2\r\n",
        ]),
    );
    stack.redis.call(&["SET", "refused-1", "no stream"]);
    stack.publish("first");
    stack.wait_events(1);
    // A trigger that fails each time with other words, where scheduled events are moved.
    stack.pg.exec(&format!(
        "create role owner login; grant usage on schema outbox to owner;
         grant insert, update, delete, select on outbox.backends to owner;
         create function fails() returns trigger language plpgsql as
             $$ begin if new.source = 'fails' then raise exception 'no %', clock_timestamp(); end if; return new; end $$;
         select outbox.publish_event('t', 'fails', scheduled_at => now() + interval '1 second');
         create trigger fails before insert on outbox.events for each row execute function fails();
         insert into outbox.backends (name, host, port, password_file)
             select 'wrong ' || n, '127.0.0.1', {}, null from generate_series(1, 200) n;
         insert into outbox.backends (name, host, port) select 'garbage ' || n, '127.0.0.1', {} from generate_series(1, 20) n;
         select outbox.publish_event('t', 's', stream => 'refused-' || n % 2) from generate_series(1, 2000) n",
        locked.port(),
        garbage.port()
    ));
    let bystander = Bystander::start(&stack);
    let start = std::time::Instant::now();
    let mark = lines_of_worker(&stack.pg.log());
    let rounds = std::thread::scope(|scope| {
        let comes_and_goes = |name: usize| {
            let mut client = stack.pg.client_as("owner", "postgres");
            let mut rounds = 0;
            while start.elapsed().as_secs() < SECONDS as u64 {
                for sql in [
                    format!(
                        "insert into outbox.backends (name, host, port) select '{name} ' || n, '127.0.0.1', 1 from generate_series(1, 100) n"
                    ),
                    "select pg_sleep(0.1)".to_owned(),
                    format!("delete from outbox.backends where name like '{name} %'"),
                ] {
                    client.batch_execute(&sql).expect("the role may do that");
                }
                rounds += 1;
            }
            rounds
        };
        let threads = [1, 2].map(|name| scope.spawn(move || comes_and_goes(name)));
        threads.map(|thread| thread.join().expect("a role")).iter().sum::<i32>()
    });
    let log = stack.pg.log();
    let (lines, seconds) = (lines_of_worker(&log) - mark, start.elapsed().as_secs() as usize + 1);
    println!("{lines} lines in {seconds} s, {rounds} rounds of 100 backends");
    // One line in addition for each that tells how many were left out.
    assert!(lines <= 200 + 2 * 10 * seconds, "{lines} lines in {seconds} s");
    assert!(count(&log, "outbox_relay left out ") > 0, "more was to be said");
    bystander
        .stop(&stack)
        .assert_undisturbed("all kinds of failures at once");
    stack.publish("last");
    wait_until("the last event", || {
        stack
            .events()
            .iter()
            .any(|entry| entry.get("event_type") == Some("last"))
    });
}

/// A role that may insert backends chooses their names and hosts.
#[test]
fn a_backend_cannot_write_lines_or_escapes_into_the_log() {
    let stack = Stack::of(Postgres::with(QUICK), Redis::start());
    stack.pg.exec(
        "create role inserter; grant usage on schema outbox to inserter; grant select, insert on outbox.backends to inserter;
         set role inserter;
         insert into outbox.backends (name, host, port) values (E'a\\033[31mb\\nLOG:  forged', E'h\\033[0m\\nLOG:  forged', 1)",
    );
    stack.pg.wait_log("backend \"a [31mb LOG:  forged\" cannot be reached");
    stack.pg.wait_log("Redis at [h [0m LOG:  forged]:1");
    let log = stack.pg.log();
    let forged = log
        .lines()
        .find(|line| line.contains('\u{1b}') || line.starts_with("\tLOG:"));
    assert_eq!(forged, None, "{log}");
}
