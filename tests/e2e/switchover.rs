//! A planned change of the primary, there and back, and an unplanned one with a synchronous standby: each event once,
//! and in order.

use std::path::PathBuf;
use std::time::Duration;

use kit::owners::{PATIENCE, WATCHFUL, guard, publish, wait_caught_up, wait_owner};
use kit::{LIMIT, Ledger, Load, Mode, Postgres, Redis, Stack, env, ids, wait_drained, wait_eq, wait_until};
use uuid::Uuid;

/// What pg_rewind needs beside [`WATCHFUL`].
const REWINDABLE: &[(&str, &str)] = &[("wal_log_hints", "on"), ("wal_keep_size", "256MB")];

fn stack(settings: &[(&str, &str)]) -> Stack {
    Stack::of(Postgres::with(WATCHFUL).with(REWINDABLE).with(settings), Redis::start())
}

/// The place of the guard for the new primary, and how long its claim took after the promotion.
#[track_caller]
fn promote(standby: &Postgres, redis: &Redis) -> Duration {
    standby.promote();
    wait_owner(standby, redis)
}

/// Both servers in one, for the ledger: the server on which it continues.
fn moved(stack: &mut Stack, pg: Postgres) -> Postgres {
    std::mem::replace(&mut stack.pg, pg)
}

/// Makes the stopped former primary a standby of the new one: its unreplicated transactions are removed.
fn rewind(former: &mut Postgres, primary: &Postgres) {
    // A part that is not flushed to the control file yet says that it has the old timeline.
    primary.exec("checkpoint");
    let program: PathBuf = env::postgres_bin().join("pg_rewind");
    let source = format!(
        "host={} port=5432 user=postgres dbname=postgres",
        primary.host().display()
    );
    let output = env::server_command(program)
        .args([
            "--write-recovery-conf",
            "--no-sync",
            "--source-server",
            &source,
            "--target-pgdata",
        ])
        .arg(former.data_dir())
        .output()
        .expect("cannot run pg_rewind");
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "pg_rewind failed: {said}");
    // It has copied the other's settings too.
    let socket_dir = former.host().display().to_string();
    former.configure(&[("unix_socket_directories", &socket_dir)]);
    former.start_again();
    assert!(former.one::<bool>("select pg_is_in_recovery()"));
}

/// Events that were published while the worker was held, so that only a cursor and a guard prove what was sent.
fn delivered(pg: &Postgres, redis: &Redis, prefix: &str) -> Vec<Uuid> {
    let there = redis.xlen(kit::stack::STREAM);
    let sent = publish(pg, prefix, 20);
    redis.wait_entries(kit::stack::STREAM, there + 20);
    sent
}

#[test]
fn a_switchover_there_and_back_is_exactly_once_and_at_once() {
    let mut stack = stack(&[]);
    let standby = stack.pg.standby().start();
    let mut expected = delivered(&stack.pg, &stack.redis, "a");
    // The last ones are committed, but not sent: the next server sends them.
    stack.pg.exec("update outbox.backends set enabled = false");
    expected.extend(publish(&stack.pg, "last", 20));
    stack.pg.stop(Mode::Fast);
    let left = guard(&standby, &stack.redis).expect("a guard");
    assert_eq!(left.field("released"), "1", "whoever is paused leaves in order, too");
    standby.promote();
    standby.exec("update outbox.backends set enabled = true");
    let took = wait_owner(&standby, &stack.redis);
    assert!(took < PATIENCE, "there: it took {took:?}");
    let mut former = moved(&mut stack, standby);
    expected.extend(delivered(&stack.pg, &stack.redis, "b"));
    wait_drained(&stack.pg, "default");
    assert_eq!(ids(&stack.events()), expected);

    // And back, to the directory of before.
    rewind(&mut former, &stack.pg);
    expected.extend(delivered(&stack.pg, &stack.redis, "c"));
    wait_caught_up(&stack.pg, &former);
    stack.pg.stop(Mode::Fast);
    let took = promote(&former, &stack.redis);
    assert!(took < PATIENCE, "back: it took {took:?}");
    drop(moved(&mut stack, former));
    expected.extend(delivered(&stack.pg, &stack.redis, "d"));
    wait_drained(&stack.pg, "default");
    assert_eq!(ids(&stack.events()), expected);
    assert_eq!(guard(&stack.pg, &stack.redis).expect("a guard").field("timeline"), "3");
    assert!(
        !stack.pg.log().contains("goes on after another history"),
        "nothing was lost"
    );
}

/// The shutdown ends the publishers' sessions, and they continue at the new primary; base backups lead back.
#[test]
fn switchovers_under_load_are_exactly_once() {
    let mut stack = stack(&[]);
    let ledger = Ledger::create(&stack.pg);
    for _ in 0..2 {
        let standby = stack.pg.standby().start();
        let load = Load::start(&stack.pg, 4, "");
        load.wait_more(100);
        stack.pg.stop(Mode::Fast);
        load.stop();
        standby.promote();
        drop(moved(&mut stack, standby));
        let load = Load::start(&stack.pg, 4, "");
        load.wait_more(50);
        load.stop();
    }
    ledger.settle(&stack, LIMIT).assert_exactly_once();
}

/// The primary dies under load. The WAL that its standby had flushed is the history that survives, and nothing else was
/// sent.
#[test]
fn the_death_of_a_primary_with_a_synchronous_standby_is_exactly_once() {
    let mut stack = stack(&[("outbox_relay.send_after", "standby_flush")]);
    let ledger = Ledger::create(&stack.pg);
    let standby = stack.pg.standby().start();
    stack.pg.set("synchronous_standby_names", "*");
    wait_eq("synchronous standbys", 1, || {
        let count = "select count(*) from pg_stat_replication where sync_state = 'sync'";
        stack.pg.one::<i64>(count)
    });
    let load = Load::start(&stack.pg, 4, "");
    load.wait_more(200);
    stack.pg.crash();
    let told = load.stop();
    standby.promote();
    drop(moved(&mut stack, standby));
    let verdict = ledger.settle(&stack, LIMIT);
    verdict.assert_exactly_once();
    assert!(verdict.committed as u64 >= 2 * told, "{} of {told}", verdict.committed);
}

/// The same when events are sent as soon as they are committed here: events that the standby had not flushed may be in
/// the stream, but nothing is lost, repeated or out of order.
#[test]
fn the_death_of_a_primary_that_sends_at_once_repeats_nothing() {
    let mut stack = stack(&[]);
    let ledger = Ledger::create(&stack.pg);
    let standby = stack.pg.standby().start();
    let load = Load::start(&stack.pg, 4, "");
    load.wait_more(200);
    stack.pg.crash();
    load.stop();
    standby.promote();
    drop(moved(&mut stack, standby));
    let mut verdict = ledger.settle(&stack, LIMIT);
    // A few events that the standby never received.
    assert!(verdict.phantoms.len() < 200, "{} phantoms", verdict.phantoms.len());
    verdict.phantoms.clear();
    verdict.assert_exactly_once();
    wait_until("the promoted one to be well", || {
        kit::standing(&stack.pg, "default").state == "idle"
    });
}
