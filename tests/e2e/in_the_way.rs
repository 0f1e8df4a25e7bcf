//! A session that locks the extension's tables, or makes a task of the worker fail, only delays what needs exactly
//! these.

use std::time::Duration;

use kit::{Bystander, QUICK, Stack, holds_for, ids, publish_many, standing, types, wait_drained, wait_eq, wait_until};

fn set(stack: &Stack, alter_system: &str) {
    stack.pg.exec(alter_system);
    stack.pg.exec("select pg_reload_conf()");
}

/// While a transaction of a second and a half holds this lock, events arrive as usual.
#[track_caller]
fn assert_nobody_waits_for(stack: &Stack, statement: &str) {
    let worker = stack.pg.wait_worker("postgres");
    let bystander = Bystander::start(stack);
    let mut holder = stack.pg.client();
    holder.batch_execute(&format!("begin; {statement}")).expect(statement);
    // There is always something to save, to record, to purge and to move.
    let load = || {
        stack.pg.exec("select outbox.publish_event('event', 'kit')");
        true
    };
    holds_for(Duration::from_millis(1_500), "publishing", load);
    holder.batch_execute("rollback").expect("an end");
    bystander.stop(stack).assert_undisturbed(statement);
    assert_eq!(stack.pg.worker_pid("postgres"), Some(worker));
}

#[test]
fn a_lock_on_the_cursors_delays_no_event() {
    let stack = Stack::with(QUICK);
    stack.publish("first");
    stack.wait_events(1);
    wait_drained(&stack.pg, "default");
    for statement in [
        "lock table outbox.cursors in access exclusive mode",
        "lock table outbox.cursors in share mode",
        "select from outbox.cursors for update",
        "update outbox.cursors set healings = healings",
    ] {
        assert_nobody_waits_for(&stack, statement);
    }
    // And state that could not be saved is saved afterwards.
    stack.publish("last");
    wait_drained(&stack.pg, "default");
    stack.pg.wait_log("The worker was saving cursors and refused events");
}

#[test]
fn a_lock_on_any_other_table_but_that_of_the_events_delays_no_event() {
    let stack = Stack::with(QUICK);
    // Not `backends`: a session that has not published yet reads it.
    for table in [
        "backend_passwords",
        "scheduled_events",
        "refused_events",
        "failed_events",
        "ticks",
        "installation",
        "incarnations",
        "take_overs",
        "restores",
    ] {
        assert_nobody_waits_for(&stack, &format!("lock table outbox.{table} in access exclusive mode"));
    }
}

/// Meanwhile events cannot be read; they are sent as soon as the lock is released.
#[test]
fn a_lock_on_the_events_is_waited_for_and_soon_noticed_to_be_gone() {
    let stack = Stack::start();
    stack.publish("first");
    stack.wait_events(1);
    stack.pg.exec("update outbox.backends set enabled = false");
    let published = publish_many(&mut stack.pg.client(), "default", "", "event", 3);
    let mut holder = stack.pg.client();
    holder
        .batch_execute("begin; lock table outbox.events in access exclusive mode")
        .expect("a lock");
    stack.pg.exec("update outbox.backends set enabled = true");
    stack.pg.wait_log("The worker was reading events");
    let mark = std::time::Instant::now();
    holder.batch_execute("commit").expect("an end");
    let entries = stack.wait_events(4);
    let took = mark.elapsed();
    assert_eq!(ids(&entries)[1..], published);
    assert!(took < Duration::from_millis(800), "{took:?} after the lock was gone");
}

/// Other rows are purged meanwhile, and this backend's afterwards.
#[test]
fn rows_that_a_session_is_deleting_delay_no_other_event() {
    let stack = Stack::with(&[
        ("outbox_relay.published_retention", "0"),
        ("outbox_relay.failed_retention", "0"),
    ]);
    set(&stack, "alter system set outbox_relay.cleanup_published = off");
    let _ = publish_many(&mut stack.pg.client(), "default", "", "old", 10);
    stack.wait_events(10);
    let mut holder = stack.pg.client();
    holder
        .batch_execute("begin; delete from outbox.events where event_type = 'old1'")
        .expect("a row");
    set(&stack, "alter system reset outbox_relay.cleanup_published");
    let bystander = Bystander::start(&stack);
    // The purge reaches this row repeatedly.
    std::thread::sleep(Duration::from_secs(3));
    bystander.stop(&stack).assert_undisturbed("an open DELETE");
    // Although the other backend is purged all the time.
    stack
        .pg
        .wait_log("The worker was purging sent events, for backend \"default\".");
    holder.batch_execute("rollback").expect("an end");
    wait_eq("rows", 0, || -> i64 {
        stack
            .pg
            .one("select count(*) from outbox.events where event_type like 'old%'")
    });
}

/// The same with failed events that a session has locked for a while.
#[test]
fn locked_failed_events_delay_no_other_event() {
    let mut settings = QUICK.to_vec();
    settings.push(("outbox_relay.max_retries", "1"));
    let stack = Stack::with(&settings);
    stack.redis.call(&["SET", "bad", "a string"]);
    stack
        .pg
        .exec("select outbox.publish_event('t', 'kit', stream => 'bad')");
    let failed = || -> i64 { stack.pg.one("select count(*) from outbox.failed_events") };
    wait_eq("failed events", 1, failed);
    let mut holder = stack.pg.client();
    holder
        .batch_execute("begin; select from outbox.failed_events for update")
        .expect("a row");
    set(&stack, "alter system set outbox_relay.failed_retention = 0");
    let bystander = Bystander::start(&stack);
    stack
        .pg
        .exec("select outbox.publish_event('t', 'kit', stream => 'bad')");
    std::thread::sleep(Duration::from_millis(1_500));
    bystander.stop(&stack).assert_undisturbed("failed_events for update");
    holder.batch_execute("rollback").expect("an end");
}

/// The event whose id another session seems to use waits; the others are sent when they are due.
#[test]
fn an_event_id_that_a_publisher_keeps_open_delays_that_event_alone() {
    let stack = Stack::start();
    let id = "a0000000-0000-4000-8000-000000000001";
    let mut publisher = stack.pg.client();
    publisher
        .batch_execute(&format!(
            "begin; select outbox.publish_event('open', 'kit', event_id => '{id}')"
        ))
        .expect("published");
    let schedule = |name: &str, id: &str| {
        stack.pg.exec(&format!(
            "select outbox.publish_event('{name}', 'kit', scheduled_at => clock_timestamp() + interval '300 ms', event_id => {id})"
        ));
    };
    schedule("contested", &format!("'{id}'"));
    let bystander = Bystander::start(&stack);
    for n in 1..=5 {
        schedule(&format!("free{n}"), "null");
        assert_eq!(types(&stack.wait_events(n)).last(), Some(&format!("free{n}").as_str()));
    }
    bystander.stop(&stack).assert_undisturbed("an event_id that is open");
    publisher.batch_execute("rollback").expect("an end");
    let entries = stack.wait_events(6);
    assert_eq!(types(&entries)[5], "contested");
}

/// A scheduled event that a session is about to cancel, or not.
#[test]
fn a_scheduled_event_that_somebody_has_locked_delays_that_event_alone() {
    let stack = Stack::start();
    stack
        .pg
        .exec("select outbox.publish_event('locked', 'kit', scheduled_at => clock_timestamp() + interval '300 ms')");
    let mut holder = stack.pg.client();
    holder
        .batch_execute("begin; delete from outbox.scheduled_events")
        .expect("a row");
    let bystander = Bystander::start(&stack);
    for n in 1..=5 {
        stack.pg.exec(&format!(
            "select outbox.publish_event('free{n}', 'kit', scheduled_at => clock_timestamp() + interval '300 ms')"
        ));
        stack.wait_events(n);
    }
    bystander
        .stop(&stack)
        .assert_undisturbed("a scheduled event that is locked");
    holder.batch_execute("rollback").expect("an end");
    assert_eq!(types(&stack.wait_events(6))[5], "locked");
}

#[test]
fn a_backend_that_cannot_be_saved_keeps_no_other_from_being_saved() {
    let stack = Stack::with(QUICK);
    let bystander = Bystander::start(&stack);
    stack.pg.exec(
        "create function broken() returns trigger language plpgsql as $$
            begin if new.backend_number = 1 then raise 'this one is closed'; end if; return new; end $$;
         create trigger broken before insert or update on outbox.cursors for each row execute function broken();
         alter table outbox.cursors enable always trigger broken",
    );
    let published = publish_many(&mut stack.pg.client(), "default", "", "event", 3);
    stack.wait_events(3);
    stack.pg.wait_log("outbox_relay worker: this one is closed");
    stack
        .pg
        .wait_log("The worker was saving cursors and refused events, for backend \"default\".");
    let before = standing(&stack.pg, "bystander").published;
    wait_until("the other's cursor", || {
        standing(&stack.pg, "bystander").published > before
    });
    bystander
        .stop(&stack)
        .assert_undisturbed("a trigger that refuses one backend");
    assert_eq!(standing(&stack.pg, "default").published, 0);
    stack.pg.exec("drop trigger broken on outbox.cursors");
    wait_drained(&stack.pg, "default");
    assert_eq!(ids(&stack.events()), published);
    assert_eq!(stack.pg.log().matches("this one is closed").count(), 1);
}

/// A role without any rights can take all locks that the server has room for. Until it ends, nobody can begin a
/// session, write, or lock a table in a strong mode.
#[test]
fn a_role_that_takes_all_locks_of_the_server_costs_neither_the_worker_nor_an_event() {
    let few = [("max_locks_per_transaction", "10"), ("max_connections", "20")];
    let stack = Stack::with(&[QUICK, &few].concat());
    stack.pg.exec("create role nobody login");
    let worker = stack.pg.wait_worker("postgres");
    let mut publisher = stack.pg.client();
    let mut published = publish_many(&mut publisher, "default", "", "before", 3);
    let mut nobody = stack.pg.client_as("nobody", "postgres");
    nobody.batch_execute("begin").expect("begun");
    let take_all = "do $$ declare i integer := 0; begin loop i := i + 1;
        begin perform pg_advisory_xact_lock(i); exception when out_of_memory then return; end; end loop; end $$";
    nobody.batch_execute(take_all).expect("taken");
    let refused = publisher.batch_execute("select outbox.publish_event('t', 's')");
    assert_eq!(kit::Refused::of(refused).code, "53200");
    // Meanwhile the worker cannot save, purge or load.
    stack.redis.call(&["CLIENT", "KILL", "TYPE", "normal"]);
    std::thread::sleep(Duration::from_secs(2));
    nobody.batch_execute("rollback").expect("an end");
    published.extend(publish_many(&mut publisher, "default", "", "after", 3));
    stack.wait_events(published.len());
    wait_drained(&stack.pg, "default");
    assert_eq!(ids(&stack.events()), published);
    assert_eq!(stack.pg.worker_pid("postgres"), Some(worker));
}
