//! Postgres's own tools for a whole server: pg_upgrade moves its databases to a new one, pg_resetwal removes its WAL.
//! Pending events are delivered, nothing is repeated, and no server is fenced.

use std::path::Path;
use std::process::Command;

use kit::owners::{WATCHFUL, publish, take_over, wait_fenced, wait_owner};
use kit::{Mode, Postgres, Redis, Stack, env, ids, standing, wait_drained, wait_until};
use uuid::Uuid;

fn run(program: &str, args: &[&str], dir: &Path) {
    let installed = env::postgres_bin().join(program);
    let mut command: Command = match installed.exists() {
        true => env::server_command(installed),
        false => env::server_command(program),
    };
    let ran = command.args(args).current_dir(dir).output().expect("it runs");
    let said = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    assert!(
        ran.status.success(),
        "{program} {args:?} failed:\n{}\n{}",
        said(&ran.stdout),
        said(&ran.stderr)
    );
}

/// A server that has delivered some events and keeps others pending; returns the pending ones.
fn stopped_with_waiting() -> (Stack, Vec<Uuid>, Vec<Uuid>) {
    let mut stack = Stack::of(Postgres::with(WATCHFUL), Redis::start());
    let sent = publish(&stack.pg, "sent", 20);
    stack.redis.wait_entries("events", 20);
    wait_drained(&stack.pg, "default");
    stack.pg.exec("update outbox.backends set enabled = false");
    let waiting = publish(&stack.pg, "waiting", 10);
    stack.pg.stop(Mode::Fast);
    (stack, sent, waiting)
}

/// Checks that the server goes on where the other one stopped.
fn goes_on(pg: &Postgres, redis: &Redis, sent: &[Uuid], waiting: &[Uuid]) {
    pg.exec("update outbox.backends set enabled = true");
    wait_owner(pg, redis);
    let new = publish(pg, "new", 10);
    redis.wait_entries("events", 40);
    wait_drained(pg, "default");
    assert_eq!(ids(&redis.entries("events")), [sent, waiting, &new].concat());
    let found = standing(pg, "default");
    assert_eq!((found.pending, found.failed), (0, 0), "{found:?}");
}

#[test]
fn a_server_made_by_pg_upgrade_goes_on() {
    let (stack, sent, waiting) = stopped_with_waiting();
    let fresh = env::server_dir("pg");
    let data = fresh.path().join("fresh").display().to_string();
    let user = ["--username=postgres", "--auth=trust"];
    let locale = ["--encoding=UTF8", "--locale=C.UTF-8", "--no-sync"];
    run(
        "initdb",
        &[&["--pgdata", &data], &user[..], &locale].concat(),
        fresh.path(),
    );
    let mut new = Postgres::copy_of(fresh.path().join("fresh").as_path())
        .with(&[
            ("listen_addresses", ""),
            ("shared_preload_libraries", "outbox_relay"),
            ("fsync", "off"),
            ("dynamic_shared_memory_type", "mmap"),
            ("max_prepared_transactions", "10"),
        ])
        .with(WATCHFUL)
        .stopped();
    let bin = env::postgres_bin().display().to_string();
    let [old_data, new_data] = [stack.pg.data_dir(), new.data_dir()].map(|dir| dir.display().to_string());
    let arguments = [
        "-b", &bin, "-B", &bin, "-d", &old_data, "-D", &new_data, "-U", "postgres",
    ];
    run("pg_upgrade", &arguments, fresh.path());
    new.start_again();
    goes_on(&new, &stack.redis, &sent, &waiting);
    // Its functions are compared with what they were made with.
    crate::health::wait_well(&new, "functions");
    let log = new.log();
    assert!(!log.contains("another history"), "{log}");
}

#[test]
fn a_server_whose_wal_was_reset_goes_on() {
    let (mut stack, sent, waiting) = stopped_with_waiting();
    let data = stack.pg.data_dir().display().to_string();
    run("pg_resetwal", &["-f", &data], stack.pg.host());
    stack.pg.start_again();
    goes_on(&stack.pg, &stack.redis, &sent, &waiting);
}

/// Events that were sent, and whose WAL is lost.
fn loses_its_wal(stack: &mut Stack) -> Vec<Uuid> {
    let lost = publish(&stack.pg, "lost", 20);
    stack.redis.wait_entries("events", 20);
    wait_drained(&stack.pg, "default");
    stack.pg.kill9();
    run("rm", &["postmaster.pid"], stack.pg.data_dir());
    let data = stack.pg.data_dir().display().to_string();
    run("pg_resetwal", &["-f", &data], stack.pg.host());
    stack.pg.start_again();
    let rows: i64 = stack.pg.one("select count(*) from outbox.events");
    assert_eq!(rows, 0, "nothing was lost: this test tests nothing");
    lost
}

fn delivers_what_is_new(stack: &Stack, lost: Vec<Uuid>) {
    let new: Vec<Uuid> = (0..30)
        .flat_map(|n| publish(&stack.pg, &format!("new{n}-"), 1))
        .collect();
    stack.redis.wait_entries("events", 50);
    wait_drained(&stack.pg, "default");
    assert_eq!(ids(&stack.events()), [lost, new].concat());
}

/// Its last transactions are lost, and their ids will be used again: events of the lost ones must not hide new ones.
#[test]
fn a_server_that_lost_its_last_wal_delivers_new_events() {
    let mut stack = Stack::of(Postgres::with(WATCHFUL), Redis::start());
    wait_owner(&stack.pg, &stack.redis);
    stack.pg.exec("checkpoint");
    let lost = loses_its_wal(&mut stack);
    wait_until("a warning that history was lost", || {
        stack.pg.log().contains("goes on after another history")
    });
    delivers_what_is_new(&stack, lost);
}

/// If it has also lost its own name in the guard, take_over() must confirm that it may go on.
#[test]
fn a_server_that_lost_its_name_waits_for_take_over_and_delivers_new_events() {
    let mut stack = Stack::of(Postgres::with(WATCHFUL), Redis::start());
    wait_owner(&stack.pg, &stack.redis);
    // The last checkpoint is before the name of this run.
    stack.pg.stop(Mode::Fast);
    stack.pg.start_again();
    wait_owner(&stack.pg, &stack.redis);
    let lost = loses_its_wal(&mut stack);
    wait_fenced(&stack.pg, &stack.pg);
    take_over(&stack.pg);
    delivers_what_is_new(&stack, lost);
}
