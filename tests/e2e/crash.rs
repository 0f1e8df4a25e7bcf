//! Processes die, one or all of them, and the relay goes on: no event is lost, made up or out of order.

use std::time::Duration;

use kit::process::signal;
use kit::{BlackHole, LIMIT, Ledger, Load, Mode, Postgres, Stack, ids, publish_many, wait_drained, wait_until};
use nix::sys::signal::Signal;

/// Streams that are never trimmed: each entry counts.
const UNTRIMMED: &[(&str, &str)] = &[("outbox_relay.redis_max_len", "0")];

#[test]
fn a_terminated_worker_comes_back_by_itself_and_repeats_nothing() {
    let stack = Stack::with(UNTRIMMED);
    let mut client = stack.pg.client();
    let mut published = publish_many(&mut client, "default", "", "before", 50);
    stack.wait_events(50);
    for round in 0..3 {
        let old = stack.pg.wait_worker("postgres");
        assert!(stack.pg.one::<bool>(&format!("select pg_terminate_backend({old})")));
        published.extend(publish_many(&mut client, "default", "", &format!("during{round}-"), 20));
        let took = stack.pg.wait_new_worker(old);
        assert!(took < Duration::from_secs(3), "it took {took:?}");
        published.extend(publish_many(&mut client, "default", "", &format!("after{round}-"), 10));
    }
    let entries = stack.wait_events(published.len());
    wait_drained(&stack.pg, "default");
    assert_eq!(ids(&entries), published);
    assert_eq!(stack.events().len(), published.len());
    assert!(!stack.pg.log().contains("reinitializing"), "the server restarted");
}

/// Told to end while it keeps its books, it keeps them all the same.
#[test]
fn a_worker_terminated_while_it_saves_repeats_nothing() {
    let stack = Stack::with(UNTRIMMED);
    stack.pg.exec(
        "create function slow() returns trigger language plpgsql as $$ begin perform pg_sleep(0.1); return new; end $$;
         create trigger slow before insert or update on outbox.cursors for each row execute function slow();
         alter table outbox.cursors enable always trigger slow",
    );
    let published = publish_many(&mut stack.pg.client(), "default", "", "event", 20);
    stack.wait_events(20);
    wait_until("the worker to save", || {
        stack.pg.one::<bool>(
            "select exists (select from pg_stat_activity \
             where backend_type = 'outbox_relay worker' and wait_event = 'PgSleep')",
        )
    });
    let old = stack.pg.wait_worker("postgres");
    stack.pg.exec(&format!("select pg_terminate_backend({old})"));
    stack.pg.wait_new_worker(old);
    wait_drained(&stack.pg, "default");
    let more = publish_many(&mut stack.pg.client(), "default", "", "more", 1);
    stack.wait_events(21);
    assert_eq!(ids(&stack.events()), [published, more].concat());
    let log = stack.pg.log();
    for word in ["FATAL:  terminating", "canceling statement"] {
        assert!(!log.contains(word), "{word} in the log");
    }
}

/// Also in the middle of work: the guard records what was in flight.
#[test]
fn a_worker_terminated_again_and_again_under_load_loses_and_repeats_nothing() {
    let stack = Stack::with(UNTRIMMED);
    let ledger = Ledger::create(&stack.pg);
    let load = Load::start(&stack.pg, 4, "");
    for _ in 0..6 {
        load.wait_more(100);
        let old = stack.pg.wait_worker("postgres");
        stack.pg.exec(&format!("select pg_terminate_backend({old})"));
        stack.pg.wait_new_worker(old);
    }
    assert!(load.stop() >= 600);
    ledger.settle(&stack, LIMIT).assert_exactly_once();
}

#[test]
fn a_killed_worker_takes_the_sessions_with_it_but_no_events() {
    let stack = Stack::with(UNTRIMMED);
    let ledger = Ledger::create(&stack.pg);
    let load = Load::start(&stack.pg, 4, "");
    for _ in 0..3 {
        load.wait_more(100);
        let old = stack.pg.wait_worker("postgres");
        stack.pg.kill_worker();
        stack.pg.wait_new_worker(old);
    }
    load.wait_more(100);
    load.stop();
    ledger.settle(&stack, LIMIT).assert_exactly_once();
}

#[test]
fn a_killed_session_takes_only_its_own_transaction_with_it() {
    let stack = Stack::with(UNTRIMMED);
    let mut committed = publish_many(&mut stack.pg.client(), "default", "", "before", 3);
    let mut victim = stack.pg.client();
    let pid: i32 = victim.query_one("select pg_backend_pid()", &[]).unwrap().get(0);
    victim.batch_execute("begin").unwrap();
    publish_many(&mut victim, "default", "", "never", 3);
    let mark = stack.pg.log().len();
    signal(pid, Signal::SIGKILL);
    stack.pg.wait_recovered(mark);
    stack.pg.wait_worker("postgres");
    committed.extend(publish_many(&mut stack.pg.client(), "default", "", "after", 3));
    stack.wait_events(6);
    wait_drained(&stack.pg, "default");
    assert_eq!(ids(&stack.events()), committed);
}

#[test]
fn a_killed_postmaster_or_a_crash_of_everything_loses_and_repeats_nothing() {
    let mut stack = Stack::with(UNTRIMMED);
    let ledger = Ledger::create(&stack.pg);
    let load = Load::start(&stack.pg, 4, "");
    let ends: [fn(&mut Postgres); 3] = [Postgres::kill9, Postgres::crash, |pg| {
        pg.stop(Mode::Immediate);
    }];
    for end in ends {
        load.wait_more(100);
        end(&mut stack.pg);
        stack.pg.start_again();
    }
    load.wait_more(100);
    load.stop();
    ledger.settle(&stack, LIMIT).assert_exactly_once();
}

/// An orderly end in the middle of work.
#[test]
fn a_fast_restart_under_load_repeats_nothing() {
    let mut stack = Stack::with(UNTRIMMED);
    let ledger = Ledger::create(&stack.pg);
    let load = Load::start(&stack.pg, 4, "");
    for _ in 0..2 {
        load.wait_more(200);
        stack.pg.restart();
    }
    load.wait_more(100);
    load.stop();
    ledger.settle(&stack, LIMIT).assert_exactly_once();
}

#[test]
fn a_backlog_outlives_crashes_while_redis_is_down() {
    let mut stack = Stack::with(UNTRIMMED);
    let ids_up = publish_many(&mut stack.pg.client(), "default", "", "up", 5);
    stack.wait_events(5);
    wait_drained(&stack.pg, "default");
    let hole = BlackHole::start();
    stack.point_at("default", "127.0.0.1", hole.port());
    wait_until("the worker to have fallen in", || hole.accepted() > 0);
    let mut published = ids_up;
    for round in 0..3 {
        published.extend(publish_many(
            &mut stack.pg.client(),
            "default",
            "",
            &format!("down{round}-"),
            20,
        ));
        stack.pg.crash();
        stack.pg.start_again();
    }
    assert_eq!(
        stack.pg.one::<i64>("select pending from outbox.backend_status"),
        60,
        "of the backlog"
    );
    stack.point("default", &stack.redis);
    stack.wait_events(65);
    wait_drained(&stack.pg, "default");
    assert_eq!(ids(&stack.events()), published);
}

#[test]
fn a_prepared_transaction_outlives_a_crash_and_is_sent_when_it_commits() {
    let mut stack = Stack::with(UNTRIMMED);
    let mut client = stack.pg.client();
    client.batch_execute("begin").unwrap();
    let prepared = publish_many(&mut client, "default", "", "prepared", 3);
    client.batch_execute("prepare transaction 'later'").unwrap();
    client.batch_execute("begin").unwrap();
    publish_many(&mut client, "default", "", "dropped", 3);
    client.batch_execute("prepare transaction 'never'").unwrap();
    let meanwhile = publish_many(&mut client, "default", "", "meanwhile", 3);
    stack.wait_events(3);
    wait_drained(&stack.pg, "default");
    stack.pg.crash();
    stack.pg.start_again();
    stack.pg.wait_worker("postgres");
    let mut client = stack.pg.client();
    let after = publish_many(&mut client, "default", "", "after", 3);
    stack.wait_events(6);
    client.batch_execute("rollback prepared 'never'").unwrap();
    client.batch_execute("commit prepared 'later'").unwrap();
    stack.wait_events(9);
    wait_drained(&stack.pg, "default");
    assert_eq!(ids(&stack.events()), [meanwhile, after, prepared].concat());
}

/// Postgres notices that its postmaster is gone only where it waits for a latch. As long as one process of the old
/// server lives, no new one starts on its data.
#[test]
fn a_worker_in_an_endless_trigger_of_others_ends_with_its_postmaster() {
    let mut stack = Stack::start();
    stack.pg.exec(
        "create function hang() returns trigger language plpgsql as $$ begin loop end loop; end $$;
         create trigger hang before insert on outbox.events for each row when (new.event_type = 'hang')
             execute function hang();
         alter table outbox.events enable always trigger hang",
    );
    stack
        .pg
        .exec("select outbox.publish_event('hang', 'kit', scheduled_at => now() + interval '300 ms')");
    let hanging = "select count(*) from pg_stat_activity where backend_type = 'outbox_relay worker'
         and state = 'active' and query like 'moving scheduled events%'";
    wait_until("the worker runs the trigger", || stack.pg.one::<i64>(hanging) == 1);
    stack.pg.kill9();
}
