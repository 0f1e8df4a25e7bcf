//! Many changes of settings, or statements that look like changes: events are sent all the same.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use kit::{Bystander, Stack, ids, wait_drained, wait_until};

/// Runs statements repeatedly in a separate session, while `f` runs.
fn during<R>(stack: &Stack, statements: &[&str], f: impl FnOnce() -> R) -> R {
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        for statement in statements {
            let mut client = stack.pg.client();
            let stop = &stop;
            scope.spawn(move || {
                while !stop.load(Ordering::Relaxed) {
                    client.batch_execute(statement).expect(statement);
                }
            });
        }
        let result = f();
        stop.store(true, Ordering::Relaxed);
        result
    })
}

#[test]
fn changes_that_change_nothing_delay_no_event() {
    let stack = Stack::start();
    stack.pg.exec("create role somebody");
    // Two sessions that GRANT on one table disturb each other.
    for statements in [
        &["update outbox.backends set enabled = true where false"; 2][..],
        &["grant select on outbox.backends to somebody; revoke select on outbox.backends from somebody"],
        &["grant insert on outbox.events to somebody; revoke insert on outbox.events from somebody"],
    ] {
        let bystander = Bystander::start(&stack);
        let noticed = during(&stack, statements, || {
            std::thread::sleep(Duration::from_secs(2));
            bystander.stop(&stack)
        });
        noticed.assert_undisturbed(statements[0]);
    }
}

/// Meanwhile, events that a transaction publishes after its own change follow that change.
#[test]
fn a_real_change_takes_effect_at_once_among_void_changes() {
    let stack = Stack::start();
    stack.publish("first");
    stack.wait_events(1);
    let storm = ["update outbox.backends set enabled = true where false"; 2];
    during(&stack, &storm, || {
        let mut client = stack.pg.client();
        for n in 1..=20 {
            let sql = format!(
                "begin; update outbox.backends set stream_name = 'stream{n}' where name = 'default'; \
                 select outbox.publish_event('event', 'kit'); commit"
            );
            client.batch_execute(&sql).expect("published");
            assert_eq!(stack.redis.wait_entries(&format!("stream{n}"), 1).len(), 1);
        }
    });
}

/// One transaction for each row: the backend sends batches while they arrive, and other backends do not notice. Every
/// third event is already in its stream, and is not repeated.
#[test]
fn a_restore_row_by_row_delays_nobody_else_and_goes_on_meanwhile() {
    const ROWS: usize = 1_500;
    const SENT: usize = ROWS / 3;
    let stack = Stack::with(&[("outbox_relay.redis_max_len", "0")]);
    stack.pg.exec(&format!(
        "select outbox.publish_event('sent', 'kit') from generate_series(1, {SENT})"
    ));
    let mut expected = ids(&stack.wait_events(SENT));
    let sent = expected.clone();
    wait_drained(&stack.pg, "default");
    stack
        .pg
        .exec("create table dump as select event_id, created_at from outbox.events; delete from outbox.events");
    let bystander = Bystander::start(&stack);
    let mut client = stack.pg.client();
    let mut seen_meanwhile = 0;
    for n in 0..ROWS {
        let known = (n % 3 == 0).then(|| sent[n / 3]);
        let row = client
            .query_one(
                "insert into outbox.events (xid, backend_number, event_type, source, backend, event_id, created_at) \
                 values ('5', 1, 'restored', 'kit', 'default', coalesce($1, gen_random_uuid()), \
                     coalesce((select created_at from dump where event_id = $1), now())) returning event_id",
                &[&known],
            )
            .expect("restored");
        if known.is_none() {
            expected.push(row.get::<_, uuid::Uuid>(0));
        }
        if n % 100 == 99 && n + 100 < ROWS {
            seen_meanwhile = stack.redis.xlen("events") - SENT;
        }
    }
    bystander.stop(&stack).assert_undisturbed("a restore row by row");
    assert!(seen_meanwhile > 0, "none arrived before the restore was over");
    stack.wait_events(expected.len());
    wait_until("the restores to be forgotten", || {
        stack
            .pg
            .one::<i64>("select count(*) from outbox.restores where not is_looked_for")
            == 0
    });
    wait_drained(&stack.pg, "default");
    assert!(
        ids(&stack.redis.entries("events")) == expected,
        "lost, repeated or out of order"
    );
}
