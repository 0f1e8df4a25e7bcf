//! The relay runs only on a primary, and follows a promotion.

use kit::owners::wait_caught_up;
use kit::{LIMIT, Ledger, Load, Mode, Postgres, Stack, ids, publish_many, wait_drained, wait_eq};

/// A promoted standby watches the guard for three of its owner's intervals.
const SHORT: (&str, &str) = ("outbox_relay.poll_interval", "300ms");

fn relay_processes(pg: &Postgres) -> i64 {
    pg.one("select count(*) from pg_stat_activity where backend_type like 'outbox_relay%'")
}

fn status(pg: &Postgres) -> (Option<i32>, String, i64) {
    let row = pg
        .client()
        .query_one("select worker_pid, state, pending from outbox.status", &[])
        .expect("the status can be read");
    (row.get(0), row.get(1), row.get(2))
}

#[test]
fn a_standby_sends_nothing_and_delivers_the_rest_once_it_is_promoted() {
    let mut stack = Stack::with(&[SHORT]);
    let standby = stack.pg.standby().start();
    let mut client = stack.pg.client();
    let sent = publish_many(&mut client, "default", "", "sent", 3);
    stack.wait_events(3);
    wait_drained(&stack.pg, "default");
    stack.pg.exec("update outbox.backends set enabled = false");
    let unsent = publish_many(&mut client, "default", "", "unsent", 4);
    stack
        .pg
        .exec("update outbox.backends set enabled = false, name = 'default'");
    wait_caught_up(&stack.pg, &standby);

    assert_eq!(relay_processes(&standby), 0);
    assert_eq!(status(&standby), (None, "standby".to_string(), 4));
    let refused = kit::Refused::of(standby.client().query("select outbox.publish_event('a', 'b')", &[]));
    assert_eq!(refused.code, "25006", "{refused:?}");
    assert_eq!(standby.log().matches("outbox_relay").count(), 0, "in the standby's log");

    stack.pg.stop(Mode::Fast);
    standby.promote();
    standby.wait_worker("postgres");
    let later = publish_many(&mut standby.client(), "default", "", "later", 2);
    standby.exec("update outbox.backends set enabled = true");
    assert_eq!(ids(&stack.wait_events(9)), [sent, unsent, later].concat());
    wait_drained(&standby, "default");
    assert_eq!(stack.events().len(), 9);
    let (worker, state, pending) = status(&standby);
    assert_eq!(
        (worker, state.as_str(), pending),
        (standby.worker_pid("postgres"), "running", 0)
    );
}

/// The primary dies under load; what the standby has of it is the history that survives.
#[test]
fn a_promotion_after_a_crash_loses_nothing_that_the_standby_has() {
    let mut stack = Stack::of(
        Postgres::with(&[SHORT, ("outbox_relay.redis_max_len", "0")]),
        kit::Redis::start(),
    );
    let ledger = Ledger::create(&stack.pg);
    let standby = stack.pg.standby().start();
    stack.pg.set("synchronous_standby_names", "*");
    wait_eq("synchronous standbys", 1, || {
        stack
            .pg
            .one::<i64>("select count(*) from pg_stat_replication where sync_state = 'sync'")
    });
    let load = Load::start(&stack.pg, 4, "");
    load.wait_more(300);
    stack.pg.crash();
    let committed = load.stop();
    standby.promote();
    standby.wait_worker("postgres");
    // Swapped, so that the ledger is read at the promoted server.
    let promoted = Stack {
        pg: standby,
        redis: std::mem::replace(&mut stack.redis, kit::Redis::start()),
    };
    let verdict = ledger.settle(&promoted, LIMIT);
    assert!(
        verdict.committed as u64 >= 2 * committed,
        "the ledger has {}",
        verdict.committed
    );
    assert_eq!(verdict.lost, Vec::<String>::new());
    assert_eq!(verdict.disorder, Vec::<String>::new());
}
