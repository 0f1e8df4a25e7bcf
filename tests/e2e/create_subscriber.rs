//! pg_createsubscriber (from Postgres 17 on) makes a subscriber of a standby: a copy of the data that has a system
//! identifier of its own, beside a primary that goes on. It sends nothing before `outbox.take_over()`.

use kit::ledger::{Ledger, Load};
use kit::owners::{LOGICAL, PATIENCE, WATCHFUL, delivered, owns, take_over, wait_applied, wait_fenced, wait_owner};
use kit::{LIMIT, Mode, Postgres, Redis, Stack, env, holds_for, ids, wait_drained, wait_until};

/// A primary and its standby; `None` if this Postgres has no pg_createsubscriber.
fn primary_and_standby() -> Option<(Stack, Postgres)> {
    if env::postgres_major() < 17 {
        env::not_run("pg_createsubscriber comes with Postgres 17");
        return None;
    }
    let stack = Stack::of(Postgres::with(WATCHFUL).with(LOGICAL), Redis::start());
    let standby = stack.pg.standby().start();
    Some((stack, standby))
}

/// Makes the standby a subscriber, which is stopped then. `databases`: the setting while the tool runs the server.
fn subscribe(standby: &mut Postgres, primary: &Postgres, databases: &str) {
    standby.stop(Mode::Fast);
    standby.configure(&[("outbox_relay.databases", databases)]);
    let source = format!(
        "host={} port=5432 dbname=postgres user=postgres",
        primary.host().display()
    );
    let sockets = standby.host().display().to_string();
    let data = standby.data_dir().display().to_string();
    let ran = env::server_command(env::postgres_bin().join("pg_createsubscriber"))
        .args(["--pgdata", &data, "--socketdir", &sockets])
        .args(["--publisher-server", &source])
        .args(["--subscriber-username=postgres", "--database=postgres"])
        .args(["--publication=move", "--subscription=move", "--replication-slot=move"])
        .output()
        .expect("pg_createsubscriber runs");
    let said = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    assert!(ran.status.success(), "{}\n{}", said(&ran.stdout), said(&ran.stderr));
    standby.configure(&[("outbox_relay.databases", "*")]);
}

/// Otherwise a short outage of the primary would move its streams to a server that nobody uses yet.
#[test]
fn a_subscriber_that_was_a_standby_sends_nothing_while_its_primary_is_away() {
    // With a worker while the tool works, and without one.
    for databases in ["*", ""] {
        let Some((mut stack, mut new)) = primary_and_standby() else {
            return;
        };
        let mut expected = delivered(&stack, "sent");
        subscribe(&mut new, &stack.pg, databases);
        new.start_again();
        wait_fenced(&new, &stack.pg);
        assert!(owns(&stack.pg, &stack.redis));
        for mode in [Mode::Fast, Mode::Immediate] {
            stack.pg.stop(mode);
            holds_for(6 * PATIENCE, "the subscriber claims nothing", || {
                !owns(&new, &stack.redis)
            });
            stack.pg.start_again();
            wait_owner(&stack.pg, &stack.redis);
            expected.extend(delivered(&stack, "more"));
        }
        new.restart();
        wait_fenced(&new, &stack.pg);
        assert_eq!(ids(&stack.events()), expected, "databases: {databases:?}");
    }
}

/// The procedure of docs/blue-green.md with a standby instead of an empty server.
#[test]
fn a_new_server_made_of_a_standby_goes_on_where_the_old_one_stopped() {
    let Some((stack, mut new)) = primary_and_standby() else {
        return;
    };
    stack.pg.exec("update outbox.backends set max_len = 0");
    let ledger = Ledger::create(&stack.pg);
    let load = Load::start(&stack.pg, 2, "");
    load.wait_more(100);
    // Both servers have these, and they become due on both.
    stack.pg.exec(
        "insert into ledger (event_id, backend, key, version)
        select outbox.publish_event('soon', 'ledger', scheduled_at => now() + i * interval '200 ms'), 'default', 'soon ' || i, 1
        from generate_series(1, 50) i",
    );
    subscribe(&mut new, &stack.pg, "");
    new.start_again();
    load.wait_more(100);
    stack.pg.exec("update outbox.backends set enabled = false");
    load.wait_more(50);
    load.stop();
    let scheduled = "select count(*) from outbox.scheduled_events";
    wait_until("the last scheduled event to be due", || {
        stack.pg.one::<i64>(scheduled) == 0
    });
    wait_applied(&stack.pg);
    new.exec("update outbox.backends set enabled = true");
    take_over(&new);
    new.exec("alter table ledger alter seq restart with 1000000");
    let load = Load::start(&new, 2, "");
    load.wait_more(50);
    load.stop();
    new.exec("drop subscription move");
    wait_drained(&new, "default");
    let held = "select (select count(*) from outbox.held_events) + (select count(*) from outbox.held_scheduled)";
    assert_eq!(new.one::<i64>(held), 0);
    let Stack { pg: _old, redis } = stack;
    let stack = Stack { pg: new, redis };
    ledger.settle(&stack, LIMIT).assert_exactly_once();
}
