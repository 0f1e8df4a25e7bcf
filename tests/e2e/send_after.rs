//! `outbox_relay.send_after = standby_flush`: nothing is sent before a synchronous standby has it on disk, whatever the
//! publishers wait for.

use std::thread::{JoinHandle, spawn};
use std::time::Duration;

use ::postgres::NoTls;
use kit::owners::{WATCHFUL, wait_owner};
use kit::process::signal;
use kit::{Mode, Postgres, Redis, Stack, holds_for, ids, publish_many, wait_drained, wait_eq, wait_until};
use nix::sys::signal::Signal;
use uuid::Uuid;

/// Longer than anything takes that does not wait.
const WHILE: Duration = Duration::from_millis(500);

/// A primary that waits for its synchronous standby, with one event delivered.
fn with_standby() -> (Stack, Postgres) {
    let stack = Stack::of(
        Postgres::with(WATCHFUL).with(&[("outbox_relay.send_after", "standby_flush")]),
        Redis::start(),
    );
    let standby = stack.pg.standby().start();
    stack.pg.set("synchronous_standby_names", "*");
    wait_sync(&stack.pg);
    publish_many(&mut stack.pg.client(), "default", "", "first", 1);
    stack.wait_events(1);
    wait_drained(&stack.pg, "default");
    (stack, standby)
}

#[track_caller]
fn wait_sync(primary: &Postgres) {
    wait_eq("synchronous standbys", 1, || {
        primary.one::<i64>("select count(*) from pg_stat_replication where sync_state = 'sync'")
    });
}

/// Stops the process that writes the WAL from the primary; dropping the result lets it continue.
#[track_caller]
fn freeze(standby: &Postgres) -> i32 {
    let pid: i32 = standby.one("select pid from pg_stat_wal_receiver");
    signal(pid, Signal::SIGSTOP);
    pid
}

fn thaw(pid: i32) {
    signal(pid, Signal::SIGCONT);
}

/// Publishes in a session whose commits do not wait.
#[track_caller]
fn publish_locally(pg: &Postgres, synchronous_commit: &str, prefix: &str) -> Vec<Uuid> {
    let mut client = pg.client();
    client
        .batch_execute(&format!("set synchronous_commit = {synchronous_commit}"))
        .expect("it can be set");
    publish_many(&mut client, "default", "", prefix, 2)
}

/// A publisher whose commit waits.
fn publish_waiting(pg: &Postgres, prefix: &'static str) -> JoinHandle<Vec<Uuid>> {
    let mut client = pg.client();
    spawn(move || publish_many(&mut client, "default", "", prefix, 2))
}

const WAITING: &str = "select count(*) from pg_stat_activity where wait_event = 'SyncRep'";

#[track_caller]
fn nothing_is_sent(stack: &Stack, there: usize) {
    holds_for(WHILE, "nothing is sent", || stack.events().len() == there);
}

#[track_caller]
fn sent(stack: &Stack, expected: &[Uuid]) {
    stack.wait_events(1 + expected.len());
    wait_drained(&stack.pg, "default");
    assert_eq!(ids(&stack.events())[1..], *expected);
}

#[test]
fn a_commit_that_waits_for_a_standby_is_not_sent_before_the_standby_has_it() {
    let (stack, standby) = with_standby();
    let receiver = freeze(&standby);
    let publisher = publish_waiting(&stack.pg, "waits");
    wait_eq("waiting publishers", 1, || stack.pg.one::<i64>(WAITING));
    nothing_is_sent(&stack, 1);
    thaw(receiver);
    sent(&stack, &publisher.join().expect("it was committed"));
}

/// The event is committed and visible, and may still be lost together with this server.
#[test]
fn a_cancelled_wait_sends_nothing_early_and_then_once() {
    let (stack, standby) = with_standby();
    let receiver = freeze(&standby);
    let publisher = publish_waiting(&stack.pg, "cancelled");
    wait_eq("waiting publishers", 1, || stack.pg.one::<i64>(WAITING));
    stack
        .pg
        .exec("select pg_cancel_backend(pid) from pg_stat_activity where wait_event = 'SyncRep'");
    let published = publisher.join().expect("it was committed all the same");
    let visible = "select count(*) from outbox.events where event_type like 'cancelled%'";
    assert_eq!(stack.pg.one::<i64>(visible), 2);
    nothing_is_sent(&stack, 1);
    assert_eq!(kit::standing(&stack.pg, "default").pending, 2);
    thaw(receiver);
    sent(&stack, &published);
}

#[test]
fn publishers_who_do_not_wait_for_the_standby_are_not_sent_early_either() {
    for synchronous_commit in ["off", "local"] {
        let (stack, standby) = with_standby();
        let receiver = freeze(&standby);
        let mut published = publish_locally(&stack.pg, synchronous_commit, "one");
        nothing_is_sent(&stack, 1);
        published.extend(publish_locally(&stack.pg, synchronous_commit, "two"));
        nothing_is_sent(&stack, 1);
        thaw(receiver);
        sent(&stack, &published);
    }
}

#[test]
fn the_setting_is_changed_by_a_reload_while_the_standby_hangs() {
    let (stack, standby) = with_standby();
    let receiver = freeze(&standby);
    let mut published = publish_locally(&stack.pg, "local", "waits");
    nothing_is_sent(&stack, 1);
    let set = |value: &str| {
        let mut client = stack.pg.client();
        let statement = format!("set synchronous_commit = local; alter system set outbox_relay.send_after = {value}");
        for statement in statement.split(';') {
            client.batch_execute(statement).expect("it can be set");
        }
        stack.pg.reload();
    };
    set("local_flush");
    sent(&stack, &published);
    published.extend(publish_locally(&stack.pg, "local", "at_once"));
    sent(&stack, &published);
    set("standby_flush");
    let shown = || stack.pg.one::<String>("show outbox_relay.send_after");
    wait_eq("the setting", "standby_flush".to_string(), shown);
    // The worker learns of it no later than sessions that begin after it has.
    let worker = stack.pg.wait_worker("postgres");
    stack.pg.exec(&format!("select pg_terminate_backend({worker})"));
    stack.pg.wait_new_worker(worker);
    published.extend(publish_locally(&stack.pg, "local", "waits_again"));
    nothing_is_sent(&stack, 5);
    thaw(receiver);
    sent(&stack, &published);
}

/// If no synchronous standby is configured, none is waited for: neither an existing standby, nor one that was
/// synchronous until a moment ago.
#[test]
fn without_synchronous_standbys_it_sends_at_once() {
    let (stack, standby) = with_standby();
    let receiver = freeze(&standby);
    let mut published = publish_locally(&stack.pg, "local", "waits");
    nothing_is_sent(&stack, 1);
    stack.pg.set("synchronous_standby_names", "");
    sent(&stack, &published);
    published.extend(publish_many(&mut stack.pg.client(), "default", "", "at_once", 2));
    sent(&stack, &published);
    thaw(receiver);
}

/// The standby is down for a while, and the primary crashes meanwhile: neither causes events to be sent that are
/// committed only here.
/// leave.
#[test]
fn a_restart_while_the_standby_is_down_sends_nothing_early() {
    let (mut stack, mut standby) = with_standby();
    standby.stop(Mode::Fast);
    let mut published = publish_locally(&stack.pg, "local", "before");
    nothing_is_sent(&stack, 1);
    for end in [Postgres::crash, |pg: &mut Postgres| {
        pg.stop(Mode::Fast);
    }] {
        end(&mut stack.pg);
        stack.pg.start_again();
        stack.pg.wait_worker("postgres");
        published.extend(publish_locally(&stack.pg, "local", "after"));
        nothing_is_sent(&stack, 1);
    }
    standby.start_again();
    sent(&stack, &published);
    wait_owner(&stack.pg, &stack.redis);
}

/// An asynchronous standby does not count for one that is named in synchronous_standby_names.
#[test]
fn only_a_standby_in_synchronous_standby_names_counts() {
    let (stack, standby) = with_standby();
    stack.pg.set("synchronous_standby_names", "somebody");
    wait_eq("synchronous standbys", 0, || {
        stack
            .pg
            .one::<i64>("select count(*) from pg_stat_replication where sync_state = 'sync'")
    });
    let published = publish_locally(&stack.pg, "local", "waits");
    nothing_is_sent(&stack, 1);
    // The kit's standbys have this name.
    stack
        .pg
        .client()
        .batch_execute("alter system set synchronous_standby_names = 'walreceiver, somebody'")
        .expect("it can be set");
    stack.pg.reload();
    sent(&stack, &published);
    drop(standby);
}

/// User and system time of a process so far.
fn cpu_ticks(pid: i32) -> u64 {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).expect("it runs");
    let (_, fields) = stat.rsplit_once(") ").expect("a name in parentheses");
    // utime and stime are fields 14 and 15 of the line; two fields were removed before.
    fields
        .split(' ')
        .skip(11)
        .take(2)
        .map(|field| field.parse::<u64>().expect("a number"))
        .sum()
}

#[test]
fn a_worker_that_waits_for_a_standby_does_not_spin() {
    let (stack, standby) = with_standby();
    let receiver = freeze(&standby);
    let published = publish_locally(&stack.pg, "local", "waits");
    let worker = stack.pg.wait_worker("postgres");
    // By then, the growing pauses between its checks have reached the longest.
    holds_for(WHILE, "nothing is sent", || stack.events().len() == 1);
    let before = cpu_ticks(worker);
    let span = Duration::from_secs(2);
    holds_for(span, "the worker lives", || {
        stack.pg.worker_pid("postgres") == Some(worker)
    });
    // A tick is a hundredth of a second: 5 percent of one core, including the checks of this test.
    let spent = cpu_ticks(worker) - before;
    assert!(spent <= 10, "it worked for {spent} of 200 ticks");
    thaw(receiver);
    sent(&stack, &published);
    let before = cpu_ticks(worker);
    std::thread::sleep(Duration::from_secs(1));
    let spent = cpu_ticks(worker) - before;
    assert!(spent <= 5, "when idle it worked for {spent} of 100 ticks");
    wait_until("it to be idle", || kit::standing(&stack.pg, "default").state == "idle");
}

/// A synchronous standby that is promoted has everything that was ever sent.
#[test]
fn sent_events_are_in_the_history_of_the_standby() {
    let (mut stack, standby) = with_standby();
    let receiver = freeze(&standby);
    let lost = publish_locally(&stack.pg, "local", "lost");
    nothing_is_sent(&stack, 1);
    stack.pg.crash();
    thaw(receiver);
    standby.promote();
    let mut published = Vec::new();
    stack.pg = standby;
    // It has no standby of its own, and is not configured to wait for one.
    stack.pg.set("synchronous_standby_names", "");
    published.extend(publish_many(&mut stack.pg.client(), "default", "", "new", 2));
    wait_drained(&stack.pg, "default");
    let rows: i64 = stack.pg.one("select count(*) from outbox.events");
    let sent: Vec<Uuid> = ids(&stack.wait_events(rows as usize));
    assert_eq!(sent.len() as i64, rows, "each row once");
    assert_eq!(sent[sent.len() - 2..], published);
    // Perhaps they had been received before the standby froze; then they are delivered, once.
    assert!(rows == 3 || sent[1..3] == lost, "{sent:?}");
    let _ = stack
        .pg
        .config("postgres", "postgres")
        .connect(NoTls)
        .expect("it lives");
}
