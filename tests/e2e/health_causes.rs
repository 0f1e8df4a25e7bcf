//! `outbox.health()` again: causes beside those of `health.rs`. Each is named within ten seconds, with a remedy.

use std::io::Write;
use std::process::{Command, Stdio};

use kit::{
    Authority, BlackHole, Postgres, QUICK, Redis, Stack, eventually, process, standing, types, wait_drained, wait_eq,
};
use nix::sys::signal::Signal;

use crate::health::{Check, NAMED_WITHIN, check, follow, health, quick, wait_ill, wait_well};

fn hint(check: &Check) -> &str {
    check.hint.as_deref().expect("a hint")
}

#[test]
fn a_worker_that_hangs_is_named() {
    let stack = quick();
    stack.publish("one");
    wait_drained(&stack.pg, "default");
    let worker = stack.pg.wait_worker("postgres");
    process::signal(worker, Signal::SIGSTOP);
    stack.publish("two");
    let ill = wait_ill(&stack.pg, "worker", "no sign of life");
    assert_eq!(ill.status, "fail");
    assert!(ill.detail.contains(&format!("Process {worker} ")), "{ill:?}");
    let states: (String, String, f64) = {
        let row = stack.pg.client().query_one(
            "select s.state, b.state, (select value from outbox.metrics where name = 'outbox_relay_worker_up') \
             from outbox.status s, outbox.backend_status b",
            &[],
        );
        let row = row.expect("one backend");
        (row.get(0), row.get(1), row.get(2))
    };
    assert_eq!(states, ("hanging".to_owned(), "stopped".to_owned(), 0.0));
    let cure = format!("kill -CONT {worker}");
    assert!(hint(&ill).contains(&cure), "{ill:?}");
    process::signal(worker, Signal::SIGCONT);
    wait_well(&stack.pg, "worker");
    stack.wait_events(2);
    wait_well(&stack.pg, "backend default");
}

/// The connection attempt takes as long as connect_timeout.
#[test]
fn a_backend_whose_redis_hangs_from_the_start_is_never_idle() {
    let stack = Stack::of(
        Postgres::with(QUICK).with(&[("outbox_relay.redis_connect_timeout", "20s")]),
        Redis::start(),
    );
    stack.publish("one");
    wait_drained(&stack.pg, "default");
    let hole = BlackHole::start();
    stack.pg.exec(&format!(
        "update outbox.backends set tls = true, port = {}",
        hole.port()
    ));
    stack.publish("two");
    wait_eq("the state", "sending".to_owned(), || {
        standing(&stack.pg, "default").state
    });
    let shown = check(&health(&stack.pg), "backend default");
    assert!(shown.detail.contains("1 events wait"), "{shown:?}");
}

#[test]
fn a_session_that_has_locked_a_table_is_named() {
    let stack = Stack::of(
        Postgres::with(QUICK).with(&[("max_prepared_transactions", "2")]),
        Redis::start(),
    );
    for (mode, named, words) in [
        ("access exclusive", "AccessExclusiveLock", "nobody can read or write it"),
        ("share", "ShareLock", "nobody else can write it"),
    ] {
        let mut forgotten = stack.pg.client();
        forgotten
            .batch_execute(&format!("begin; lock outbox.events in {mode} mode"))
            .expect("it locks");
        let ill = wait_ill(&stack.pg, "locks", named);
        assert_eq!(ill.status, "fail");
        assert!(
            ill.detail.contains(words) && ill.detail.contains("lock outbox.events in"),
            "{ill:?}"
        );
        // The other checks still give a result.
        assert_eq!(check(&health(&stack.pg), "worker").status, "ok");
        follow(&stack.pg, "postgres", &ill);
        wait_well(&stack.pg, "locks");
    }
    stack
        .pg
        .exec("begin; lock outbox.events in access exclusive mode; prepare transaction 'left'");
    let ill = wait_ill(&stack.pg, "locks", "The prepared transaction 'left'");
    let mut client = stack.pg.client();
    assert!(hint(&ill).contains("ROLLBACK PREPARED 'left';"), "{ill:?}");
    client.batch_execute("rollback prepared 'left'").expect("it ends");
    wait_well(&stack.pg, "locks");
    stack.publish("one");
    stack.wait_events(1);
}

#[test]
fn a_default_backend_that_is_not_there_is_named() {
    let stack = quick();
    stack.pg.set("outbox_relay.default_backend", "gone");
    let ill = wait_ill(&stack.pg, "default backend", "is \"gone\"");
    follow(&stack.pg, "postgres", &ill);
    wait_well(&stack.pg, "default backend");
    stack.pg.exec(
        "create role \"Shop\" login; alter role \"Shop\" set outbox_relay.default_backend = 'shop';
         alter role \"Shop\" in database postgres set outbox_relay.default_backend = 'shop';
         alter database postgres set outbox_relay.default_backend = 'all'",
    );
    let ill = wait_ill(
        &stack.pg,
        "default backend",
        "of role \"Shop\" in database postgres is \"shop\"",
    );
    follow(&stack.pg, "postgres", &ill);
    wait_well(&stack.pg, "default backend");
    // Resetting the setting would not help.
    stack.pg.exec("delete from outbox.backends");
    let ill = wait_ill(&stack.pg, "default backend", "is \"default\"");
    follow(&stack.pg, "postgres", &ill);
    wait_well(&stack.pg, "default backend");
    stack.publish("one");
}

#[test]
fn indexes_and_autovacuum_that_are_missing_are_named() {
    let stack = quick();
    for (sql, name, words) in [
        (
            "drop index outbox.inbox_consumed_at_idx",
            "indexes",
            "outbox.inbox has no INDEX ON (consumed_at)",
        ),
        (
            "alter table outbox.cursors drop constraint cursors_pkey",
            "indexes",
            "outbox.cursors has no PRIMARY KEY (backend_number, slot)",
        ),
        (
            "alter table outbox.events set (autovacuum_enabled = of)",
            "autovacuum",
            "autovacuum_enabled of outbox.events is false",
        ),
        ("alter system set autovacuum = off", "autovacuum", "autovacuum is off"),
    ] {
        stack.pg.exec(sql);
        stack.pg.reload();
        let ill = wait_ill(&stack.pg, name, words);
        follow(&stack.pg, "postgres", &ill);
        wait_well(&stack.pg, name);
    }
}

/// The error of Redis, and the words that the hint must have then.
#[test]
fn a_command_that_redis_refuses_is_named_with_its_remedy() {
    let stack = quick();
    stack.publish("one");
    wait_drained(&stack.pg, "default");
    let redis = |words: &[&str]| drop(stack.redis.call(words));
    let mut expected = 1;
    for (breaks, mends, words, cure) in [
        (
            &["REPLICAOF", "127.0.0.1", "1"][..],
            &["REPLICAOF", "NO", "ONE"][..],
            "READONLY",
            "Point the backend to the primary",
        ),
        (
            &["CONFIG", "SET", "maxmemory", "1"],
            &["CONFIG", "SET", "maxmemory", "0"],
            "OOM",
            "Raise Redis's maxmemory",
        ),
        (
            &["CONFIG", "SET", "min-replicas-to-write", "1"],
            &["CONFIG", "SET", "min-replicas-to-write", "0"],
            "NOREPLICAS",
            "lower min-replicas-to-write",
        ),
    ] {
        redis(breaks);
        stack.publish("more");
        let ill = wait_ill(&stack.pg, "backend default", words);
        assert!(hint(&ill).contains(cure), "{ill:?}");
        redis(mends);
        stack.pg.exec("select outbox.wake()");
        wait_well(&stack.pg, "backend default");
        expected += 1;
        stack.wait_events(expected);
    }
}

#[test]
fn a_refused_login_is_named_with_its_remedy() {
    let stack = quick();
    stack.publish("one");
    wait_drained(&stack.pg, "default");
    stack
        .pg
        .exec("update outbox.backends set username = 'nobody'; select outbox.set_backend_password('default', 'wrong')");
    let ill = wait_ill(&stack.pg, "backend default", "WRONGPASS");
    assert!(
        hint(&ill).contains("UPDATE outbox.backends SET username = ..."),
        "{ill:?}"
    );
    stack
        .pg
        .exec("update outbox.backends set username = null; select outbox.set_backend_password('default', null)");
    wait_well(&stack.pg, "backend default");
    let guarded =
        BlackHole::saying(b"-DENIED Redis is running in protected mode because protected mode is enabled\r\n");
    stack
        .pg
        .exec(&format!("update outbox.backends set port = {}", guarded.port()));
    let ill = wait_ill(&stack.pg, "backend default", "DENIED");
    assert!(hint(&ill).contains("Redis is in protected mode."), "{ill:?}");
}

#[test]
fn tls_settings_that_do_not_match_are_named_with_their_remedy() {
    let (authority, other) = (Authority::new(), Authority::new());
    let stack = Stack::of(
        Postgres::with(QUICK),
        Redis::tls(&authority.issue(&["127.0.0.1", "localhost"]), &[]),
    );
    stack.publish("one");
    wait_drained(&stack.pg, "default");
    let (plain, tls) = (stack.redis.port(), stack.redis.tls_port());
    for (columns, words, cure) in [
        (format!("tls = true, port = {plain}"), "TLS", "Check the port"),
        (
            format!("tls = true, port = {tls}, tls_ca_file = '{}'", other.ca_file()),
            "certificate",
            "tls_ca_file",
        ),
        (format!("tls = false, tls_ca_file = null, port = {tls}"), "", "port"),
    ] {
        stack.pg.exec(&format!("update outbox.backends set {columns}"));
        stack.publish("more");
        let ill = eventually(&format!("{columns} to be named"), NAMED_WITHIN, || {
            let found = check(&health(&stack.pg), "backend default");
            (found.status != "ok" && standing(&stack.pg, "default").state != "sending" && found.detail.contains(words))
                .then_some(found)
        });
        assert!(hint(&ill).contains(cure), "{ill:?}");
    }
    stack.pg.exec(&format!(
        "update outbox.backends set tls = true, tls_ca_file = '{}'",
        authority.ca_file()
    ));
    wait_well(&stack.pg, "backend default");
    wait_eq("all events", 4, || types(&stack.events()).len());
}

/// Its hint, executed in Redis, gives the user all that the backend needs.
#[test]
fn the_rights_in_the_hint_are_enough() {
    let stack = quick();
    stack
        .redis
        .call(&["ACL", "SETUSER", "relay", "on", ">secret", "resetkeys", "-@all"]);
    stack.pg.exec(
        "update outbox.backends set username = 'relay', stream_name = 'orders.{event_type}', trim = 'read', wait_replicas = 0;
         select outbox.set_backend_password('default', 'secret')",
    );
    stack.publish("paid");
    let ill = wait_ill(&stack.pg, "backend default", "NOPERM");
    let command = hint(&ill).strip_prefix("In Redis: ").expect("a command");
    let (command, _) = command.split_once(" (with ").expect("what to do besides");
    assert!(command.contains(" ~orders.* "), "{command}");
    stack.redis.call(&command.split(' ').collect::<Vec<_>>());
    stack.pg.exec("select outbox.wake()");
    stack.redis.wait_entries("orders.paid", 1);
    wait_well(&stack.pg, "backend default");
}

/// Types a command into redis-cli, which splits it into words.
fn in_redis_cli(stack: &Stack, command: &str) {
    let mut cli = Command::new("redis-cli")
        .args(["-p", &stack.redis.port().to_string()])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .expect("redis-cli");
    writeln!(cli.stdin.take().expect("a pipe"), "{command}").expect("typed");
    let said = cli.wait_with_output().expect("ended").stdout;
    assert_eq!(String::from_utf8_lossy(&said).trim(), "OK", "{command}");
}

/// A role that may update backends chooses the names in that command, and not what else it grants.
#[test]
fn no_name_adds_rights_to_the_hint() {
    let stack = quick();
    stack
        .redis
        .call(&["ACL", "SETUSER", "relay", "on", ">secret", "resetkeys", "-@all"]);
    stack
        .pg
        .exec("update outbox.backends set username = 'relay'; select outbox.set_backend_password('default', 'secret')");
    for stream in ["x +@all allkeys", "\" +@all \"", "x\n+@all", "a\\", "it's"] {
        let set = "update outbox.backends set stream_name = $1";
        stack.pg.client().execute(set, &[&stream]).expect("set");
        stack.publish("t");
        let ill = wait_ill(&stack.pg, "backend default", "NOPERM");
        let command = hint(&ill).strip_prefix("In Redis: ").expect("a command").to_owned();
        let (command, _) = command.split_once(" (with ").expect("what to do besides");
        let granted: Vec<&str> = command.split(char::is_whitespace).collect();
        assert!(
            !granted.iter().any(|word| ["+@all", "allkeys", "~*"].contains(word)),
            "{command}"
        );
        in_redis_cli(&stack, command);
        stack.pg.exec("select outbox.wake()");
        stack.redis.wait_entries(stream, 1);
        wait_well(&stack.pg, "backend default");
        stack.redis.call(&["ACL", "SETUSER", "relay", "resetkeys", "-@all"]);
    }
}

/// After a subscription has ended, nobody sends what it has brought.
#[test]
fn events_of_another_server_that_nobody_takes_over_are_named() {
    let old = Stack::of(Postgres::with(QUICK).with(&[("wal_level", "logical")]), Redis::start());
    old.pg.exec(
        "update outbox.backends set enabled = false; insert into outbox.backends (name, enabled) values ('more', false);
         create publication move for table outbox.events, outbox.scheduled_events, outbox.failed_events,
            outbox.refused_events, outbox.cursors",
    );
    let new = quick();
    let (host, port) = (old.pg.host().display(), old.pg.port());
    new.pg.exec(&format!(
        "create subscription move connection 'host={host} port={port} dbname=postgres user=postgres' publication move"
    ));
    old.publish("one");
    old.pg.exec(
        "select outbox.publish_event('two', 'kit', backend => 'more');
         select outbox.publish_event('later', 'kit', scheduled_at => now() + interval '1 day')",
    );
    wait_eq(
        "held events",
        "3 events of another server are held, which has not sent them as far as its subscription says.".to_owned(),
        || check(&health(&new.pg), "held events").detail,
    );
    wait_well(&new.pg, "held events");
    new.pg.exec("drop subscription move");
    let ill = wait_ill(
        &new.pg,
        "held events",
        "3 events of another server are held, and no subscription",
    );
    follow(&new.pg, "postgres", &ill);
    wait_well(&new.pg, "held events");
    new.wait_events(1);
    let scheduled: i64 = new
        .pg
        .one("select count(*) from outbox.scheduled_events where scheduled_at < now() + interval '2 days'");
    assert_eq!(scheduled, 1);
}
