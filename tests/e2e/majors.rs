//! pg_upgrade from one major of Postgres to the next, where `OUTBOX_TEST_MAJORS` names the programs of several
//! (`scripts/postgres-versions` does): events of every kind go along.

use std::path::Path;

use kit::owners::{WATCHFUL, wait_owner};
use kit::{Mode, Postgres, Redis, env, ids, publish_many, standing, wait_drained, wait_eq};
use uuid::Uuid;

const SETTINGS: &[(&str, &str)] = &[
    ("listen_addresses", ""),
    ("shared_preload_libraries", "outbox_relay"),
    ("fsync", "off"),
    ("dynamic_shared_memory_type", "mmap"),
    ("log_min_messages", "info"),
    // A refused event is retried until it is accepted, without limit.
    ("outbox_relay.max_retries", "1000"),
];

fn run(program: &Path, args: &[&str], dir: &Path) {
    let mut command = env::server_command(program);
    let ran = command.args(args).current_dir(dir).output().expect("it runs");
    let said = String::from_utf8_lossy(&ran.stdout).into_owned() + &String::from_utf8_lossy(&ran.stderr);
    // pg_upgrade names a log with the details.
    let named = said.split('"').find(|word| word.ends_with(".log"));
    let log = named.and_then(|path| std::fs::read_to_string(path).ok());
    let log = log.map(|log| kit::process::tail(&log, 20));
    assert!(ran.status.success(), "{program:?} {args:?} failed:\n{said}\n{log:?}");
}

/// A server of these programs on an empty data directory, not started.
fn empty(bin: &Path) -> Postgres {
    let dir = env::server_dir("pg");
    let data = dir.path().join("fresh").display().to_string();
    let mut arguments = vec!["--pgdata", &data, "--username=postgres", "--auth=trust"];
    arguments.extend(["--encoding=UTF8", "--locale=C.UTF-8", "--no-sync"]);
    // From 18 on pages have checksums, and pg_upgrade requires the same of both servers.
    if env::major_of(bin) >= 18 {
        arguments.push("--no-data-checksums");
    }
    run(&bin.join("initdb"), &arguments, dir.path());
    Postgres::copy_of(&dir.path().join("fresh"))
        .bin(bin)
        .with(SETTINGS)
        .with(WATCHFUL)
        .stopped()
}

#[track_caller]
fn publish(pg: &Postgres, backend: &str, stream: &str, count: i32) -> Vec<Uuid> {
    publish_many(&mut pg.client(), backend, stream, "event", count)
}

/// How many events are scheduled, refused and waiting, and failed.
fn kept(pg: &Postgres) -> (i64, i64, i64) {
    (
        pg.one("select count(*) from outbox.scheduled_events"),
        pg.one("select count(*) from outbox.refused_events where accepted_in is null"),
        pg.one("select count(*) from outbox.failed_events"),
    )
}

#[test]
fn events_of_every_kind_go_through_pg_upgrade_from_major_to_major() {
    let bins = env::majors();
    let [first, later @ ..] = bins.as_slice() else {
        env::not_run("OUTBOX_TEST_MAJORS names no programs of several majors: see scripts/postgres-versions");
        return;
    };
    let redis = Redis::start();
    let mut pg = empty(first);
    pg.start_again();
    let port = redis.port();
    pg.exec(&format!(
        "create extension outbox_relay;
        update outbox.backends set host = '127.0.0.1', port = {port};
        insert into outbox.backends (name, host, port, stream_name) values ('held', '127.0.0.1', {port}, 'held')"
    ));
    // Redis refuses events for these keys as long as they hold no streams.
    for stream in ["mended", "failing"] {
        redis.call(&["SET", stream, "no stream"]);
    }
    let scheduled: Uuid =
        pg.one("select outbox.publish_event('scheduled', 's', scheduled_at => now() + interval '1 day')");
    let failed: Uuid = pg.one("select outbox.publish_event('failed', 's', stream => 'failing', max_retries => 1)");
    let refused = publish(&pg, "default", "mended", 3);
    let mut sent = publish(&pg, "default", "", 20);
    redis.wait_entries("events", 20);
    wait_eq("what is kept", (1, 3, 1), || kept(&pg));
    pg.exec("update outbox.backends set enabled = false where name = 'held'");
    let mut held = publish(&pg, "held", "", 10);

    for bin in later {
        pg.stop(Mode::Fast);
        let mut new = empty(bin);
        let [old_data, new_data] = [pg.data_dir(), new.data_dir()].map(|dir| dir.display().to_string());
        let old_bin = pg.bin().display().to_string();
        let new_bin = bin.display().to_string();
        let work = env::server_dir("up");
        let arguments = [
            "-b", &old_bin, "-B", &new_bin, "-d", &old_data, "-D", &new_data, "-U", "postgres",
        ];
        run(&bin.join("pg_upgrade"), &arguments, work.path());
        new.start_again();
        pg = new;
        wait_owner(&pg, &redis);
        assert_eq!(kept(&pg), (1, 3, 1), "after the upgrade to {bin:?}");
        assert_eq!(
            standing(&pg, "held").pending,
            held.len() as i64,
            "after the upgrade to {bin:?}"
        );
        sent.extend(publish(&pg, "default", "", 5));
        held.extend(publish(&pg, "held", "", 5));
        redis.wait_entries("events", sent.len());
        assert_eq!(ids(&redis.entries("events")), sent, "after the upgrade to {bin:?}");
        assert!(!pg.log().contains("another history"), "{}", pg.log());
    }

    for stream in ["mended", "failing"] {
        redis.call(&["DEL", stream]);
    }
    assert_eq!(ids(&redis.wait_entries("mended", 3)), refused);
    assert_eq!(pg.one::<i64>("select outbox.retry_failed()"), 1);
    assert_eq!(ids(&redis.wait_entries("failing", 1)), [failed]);
    pg.exec("update outbox.scheduled_events set scheduled_at = now()");
    // After the commit: before it, the worker would find nothing.
    pg.exec("select outbox.wake()");
    sent.push(scheduled);
    assert_eq!(ids(&redis.wait_entries("events", sent.len())), sent);
    pg.exec("update outbox.backends set enabled = true where name = 'held'");
    assert_eq!(ids(&redis.wait_entries("held", held.len())), held);
    for backend in ["default", "held"] {
        wait_drained(&pg, backend);
    }
    assert_eq!(kept(&pg), (0, 0, 0));
    let lengths = ["events", "mended", "failing", "held"].map(|stream| redis.xlen(stream));
    assert_eq!(lengths, [sent.len(), 3, 1, held.len()]);
}
