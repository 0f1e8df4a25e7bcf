//! A whole server is copied (by a base backup or a recovery) and started beside the original, which is paused, stopped,
//! killed, or has lost its guard: the copy sends nothing, however long the original is away, and the original goes on
//! when it comes back.

use kit::owners::{
    PATIENCE, WATCHFUL, delivered, guard, owns, publish, take_over, wait_caught_up, wait_fenced, wait_owner,
};
use kit::{Mode, Postgres, Redis, Stack, holds_for, ids, standing, wait_drained, wait_eq, wait_until};
use std::time::Duration;
use uuid::Uuid;

/// An owner whose first events are delivered, and a copy that is not started yet.
fn with_clone() -> (Stack, Postgres, Vec<Uuid>) {
    let stack = Stack::with(WATCHFUL);
    let sent = delivered(&stack, "sent");
    let clone = stack.pg.base_backup().stopped();
    (stack, clone, sent)
}

fn set_enabled(pg: &Postgres, enabled: bool) {
    pg.exec(&format!("update outbox.backends set enabled = {enabled}"));
}

/// Publishes on the clone, and checks that nothing arrives for a while.
fn sends_nothing(clone: &Postgres, stack: &Stack) {
    let there = stack.events().len();
    publish(clone, "never", 3);
    let since = std::time::Instant::now();
    holds_for(6 * PATIENCE, "the clone sends nothing", || {
        stack.events().len() == there
    });
    assert!(since.elapsed() >= 6 * PATIENCE);
}

fn beat(pg: &Postgres, redis: &Redis) -> u64 {
    guard(pg, redis).expect("a guard").number("beat")
}

#[test]
fn a_clone_of_a_paused_server_sends_nothing() {
    let (stack, mut clone, sent) = with_clone();
    set_enabled(&stack.pg, false);
    let waiting = publish(&stack.pg, "waits", 3);
    clone.start_again();
    wait_fenced(&clone, &stack.pg);
    sends_nothing(&clone, &stack);
    set_enabled(&stack.pg, true);
    stack.wait_events(6);
    let more = delivered(&stack, "more");
    assert_eq!(ids(&stack.events()), [sent, waiting, more].concat());
    wait_fenced(&clone, &stack.pg);
    assert_eq!(standing(&clone, "default").pending, 3);
}

#[test]
fn a_clone_of_a_server_that_was_stopped_or_killed_sends_nothing() {
    for (name, loses_guard) in [("stopped", false), ("killed", false), ("flushed", true)] {
        let (mut stack, mut clone, mut expected) = with_clone();
        set_enabled(&stack.pg, false);
        expected.extend(publish(&stack.pg, "waits", 3));
        set_enabled(&stack.pg, true);
        stack.wait_events(6);
        let key = stack.guard_key();
        match name {
            "killed" => stack.pg.crash(),
            _ => drop(stack.pg.stop(Mode::Fast)),
        }
        let released = stack.redis.guard(&key).expect("a guard").field("released").to_string();
        assert_eq!(released, if name == "killed" { "0" } else { "1" });
        if loses_guard {
            stack.redis.call(&["DEL", &key]);
        }
        clone.start_again();
        let state = if loses_guard { "copy" } else { "fenced" };
        wait_eq("the clone's state", state.to_string(), || {
            standing(&clone, "default").state
        });
        sends_nothing(&clone, &stack);
        clone.restart();
        sends_nothing(&clone, &stack);
        assert_eq!(stack.redis.guard(&key).is_none(), loses_guard, "{name}");
        let log = clone.log();
        assert!(log.contains("outbox.take_over("), "{log}");

        stack.pg.start_again();
        wait_owner(&stack.pg, &stack.redis);
        expected.extend(delivered(&stack, "more"));
        assert_eq!(ids(&stack.events()), expected, "{name}");
        wait_fenced(&clone, &stack.pg);
    }
}

/// If Redis was lost, too, nobody knows who owned it: the clone recognises itself as a copy by its own data.
#[test]
fn a_clone_takes_over_each_backend_only_when_told_to() {
    let (mut stack, mut clone, sent) = with_clone();
    stack.pg.stop(Mode::Fast);
    clone.start_again();
    wait_fenced(&clone, &stack.pg);
    let port = stack.redis.port();
    let own = publish(&clone, "own", 3);
    take_over(&clone);
    stack.wait_events(6);
    wait_drained(&clone, "default");
    clone.exec(&format!(
        "insert into outbox.backends (name, host, port, stream_name) values ('new', '127.0.0.1', {port}, 'new')"
    ));
    kit::publish_many(&mut clone.client(), "new", "", "new", 1);
    stack.redis.wait_entries("new", 1);
    // From now on a restart is only a restart, also without the guard.
    clone.stop(Mode::Fast);
    stack.redis.call(&["DEL", &guard_key(&mut clone)]);
    let last = publish(&clone, "last", 3);
    stack.wait_events(9);
    assert_eq!(ids(&stack.events()), [sent, own, last].concat());
    stack.pg.start_again();
    wait_fenced(&stack.pg, &clone);
}

/// Starts a stopped server to query it.
fn guard_key(pg: &mut Postgres) -> String {
    pg.start_again();
    pg.one("select outbox.guard_key('default')")
}

/// There is no guard that could name the owner of the stream.
#[test]
fn a_clone_sends_nothing_of_backends_without_a_guard_either() {
    let stack = Stack::with(WATCHFUL);
    stack.pg.exec("update outbox.backends set delivery = 'at_least_once'");
    let sent = delivered(&stack, "sent");
    let clone = stack.pg.base_backup().start();
    wait_eq("the clone's state", "copy".to_string(), || {
        standing(&clone, "default").state
    });
    clone.wait_log("DETAIL:  This server is a copy of ");
    sends_nothing(&clone, &stack);
    let more = delivered(&stack, "more");
    assert_eq!(ids(&stack.events()), [sent, more].concat());
    take_over(&clone);
    stack.wait_events(9);
    wait_drained(&clone, "default");
    assert_eq!(standing(&clone, "default").state, "idle");
}

/// For sites where a failover starts a copy.
#[test]
fn a_setting_lets_copies_take_over() {
    let (mut stack, mut clone, sent) = with_clone();
    stack.pg.crash();
    clone.configure(&[("outbox_relay.take_over", "any")]);
    clone.start_again();
    wait_owner(&clone, &stack.redis);
    let own = publish(&clone, "own", 3);
    stack.wait_events(6);
    assert_eq!(ids(&stack.events()), [sent, own].concat());
}

// --- a paused backend's owner is alive

#[test]
fn a_paused_backend_keeps_its_guard_also_over_a_restart() {
    let mut stack = Stack::with(WATCHFUL);
    let mut promoted = stack.pg.standby().start();
    let sent = delivered(&stack, "sent");
    set_enabled(&stack.pg, false);
    let waiting = publish(&stack.pg, "waits", 3);
    wait_caught_up(&stack.pg, &promoted);
    promoted.promote();
    set_enabled(&promoted, true);
    wait_fenced(&promoted, &stack.pg);
    for restart in [false, true] {
        if restart {
            // For the promoted server, a shutdown of the owner means that it may take over.
            promoted.stop(Mode::Fast);
            stack.pg.restart();
        }
        let before = beat(&stack.pg, &stack.redis);
        wait_until("further refreshes", || {
            owns(&stack.pg, &stack.redis) && beat(&stack.pg, &stack.redis) > before + 2
        });
        holds_for(3 * PATIENCE, "the paused one owns the guard", || {
            owns(&stack.pg, &stack.redis)
        });
        assert_eq!(guard(&stack.pg, &stack.redis).expect("a guard").field("released"), "0");
        assert_eq!(standing(&stack.pg, "default").state, "paused");
        assert_eq!(stack.events().len(), 3);
    }
    set_enabled(&stack.pg, true);
    stack.wait_events(6);
    assert_eq!(ids(&stack.events()), [sent, waiting].concat());
    promoted.start_again();
    wait_fenced(&promoted, &stack.pg);
}

#[test]
fn trouble_with_redis_is_quiet_while_a_backend_is_paused() {
    let mut stack = Stack::with(WATCHFUL);
    let sent = delivered(&stack, "sent");
    set_enabled(&stack.pg, false);
    let before = beat(&stack.pg, &stack.redis);
    wait_until("a refresh", || beat(&stack.pg, &stack.redis) > before);
    let mark = stack.pg.log().len();
    // The error may be of an attempt from before the server learned the address of its Redis.
    let earlier_error = standing(&stack.pg, "default").last_error;
    stack.redis.shutdown();
    let waiting = publish(&stack.pg, "waits", 3);
    holds_for(3 * PATIENCE, "it is paused", || {
        let now = standing(&stack.pg, "default");
        now.state == "paused" && now.last_error == earlier_error && !now.will_try_again
    });
    assert!(
        !stack.pg.log()[mark..].contains("backend \"default\""),
        "{}",
        &stack.pg.log()[mark..]
    );
    stack.redis.start_again();
    set_enabled(&stack.pg, true);
    stack.redis.wait_entries("events", 3);
    wait_drained(&stack.pg, "default");
    let arrived = ids(&stack.events());
    assert!(arrived == waiting || arrived == [sent, waiting].concat(), "{arrived:?}");
}

// --- servers that do take over

/// The machine was started again: the same directory, under a kernel with another boot id.
#[test]
fn an_owner_comes_back_after_its_machine_was_started_again() {
    const BOOT_ID: &str = "/proc/sys/kernel/random/boot_id";
    if !kit::env::can_mount(BOOT_ID) {
        return;
    }
    let dir = kit::env::server_dir("boot");
    let boot = dir.path().join("boot_id");
    let start = |name: &str| std::fs::write(&boot, format!("{name}-0000-0000-0000-000000000000\n")).unwrap();
    start("11111111");
    let postgres = Postgres::with(WATCHFUL).mount(&boot, BOOT_ID);
    let mut stack = Stack::of(postgres, Redis::start());
    let mut expected = delivered(&stack, "sent");
    assert!(
        guard(&stack.pg, &stack.redis)
            .expect("a guard")
            .field("place")
            .contains("@11111111")
    );
    for (name, mode) in [("22222222", Some(Mode::Fast)), ("33333333", None)] {
        match mode {
            Some(mode) => drop(stack.pg.stop(mode)),
            None => stack.pg.crash(),
        }
        start(name);
        std::thread::sleep(Duration::from_millis(500));
        stack.pg.start_again();
        wait_owner(&stack.pg, &stack.redis);
        expected.extend(delivered(&stack, name));
        let place = guard(&stack.pg, &stack.redis)
            .expect("a guard")
            .field("place")
            .to_string();
        assert!(place.contains(&format!("@{name}")), "{place}");
    }
    assert_eq!(ids(&stack.events()), expected);
}

/// The promoted server remembers what it has streamed, although its primary is dead when it starts: after a restart, a
/// crash, and a promotion after which it was not used yet.
#[test]
fn a_standby_that_had_streamed_is_promoted_after_a_restart_and_takes_over() {
    for crashes in [false, true] {
        let mut stack = Stack::with(WATCHFUL);
        let mut standby = stack.pg.standby().start();
        let sent = delivered(&stack, "sent");
        wait_caught_up(&stack.pg, &standby);
        let seen = standby.data_dir().join("outbox_relay.standby");
        wait_until("the standby to have noticed", || seen.exists());
        stack.pg.crash();
        match crashes {
            true => standby.crash(),
            false => drop(standby.stop(Mode::Fast)),
        }
        standby.start_again();
        standby.promote();
        wait_owner(&standby, &stack.redis);
        let own = publish(&standby, "own", 3);
        stack.wait_events(6);
        assert_eq!(ids(&stack.events()), [sent, own].concat());
    }
}

#[test]
fn a_promoted_standby_stays_one_over_restarts() {
    let mut stack = Stack::with(WATCHFUL);
    let mut promoted = stack.pg.standby().start();
    let sent = delivered(&stack, "sent");
    wait_caught_up(&stack.pg, &promoted);
    promoted.promote();
    wait_fenced(&promoted, &stack.pg);
    promoted.restart();
    wait_fenced(&promoted, &stack.pg);
    promoted.kill_worker();
    wait_fenced(&promoted, &stack.pg);
    // A copy of the promoted server is a copy.
    let copy = promoted.base_backup().start();
    wait_fenced(&copy, &stack.pg);
    stack.pg.crash();
    wait_owner(&promoted, &stack.redis);
    let own = publish(&promoted, "own", 3);
    stack.wait_events(6);
    promoted.crash();
    sends_nothing(&copy, &stack);
    assert_eq!(ids(&stack.events()), [sent, own].concat());
}

#[test]
fn a_standby_that_never_streamed_is_a_copy() {
    let mut stack = Stack::with(WATCHFUL);
    let sent = delivered(&stack, "sent");
    let mut standby = stack.pg.standby().stopped();
    standby.configure(&[("primary_conninfo", "")]);
    // pg_basebackup has written it there.
    let auto = standby.data_dir().join("postgresql.auto.conf");
    std::fs::write(&auto, "").expect("the settings are written");
    stack.pg.stop(Mode::Fast);
    standby.start_again();
    standby.promote();
    wait_fenced(&standby, &stack.pg);
    sends_nothing(&standby, &stack);
    stack.pg.start_again();
    wait_owner(&stack.pg, &stack.redis);
    let more = delivered(&stack, "more");
    assert_eq!(ids(&stack.events()), [sent, more].concat());
}

/// A standby of a standby.
#[test]
fn a_cascading_standby_takes_over() {
    let mut stack = Stack::with(WATCHFUL);
    let mut first = stack.pg.standby().start();
    let second = first.standby().start();
    let sent = delivered(&stack, "sent");
    wait_caught_up(&stack.pg, &second);
    stack.pg.crash();
    first.crash();
    second.promote();
    wait_owner(&second, &stack.redis);
    let own = publish(&second, "own", 3);
    stack.wait_events(6);
    assert_eq!(ids(&stack.events()), [sent, own].concat());
}
