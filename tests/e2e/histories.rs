//! A standby that lost the end of its primary's history is promoted: its events are delivered, once; lost events stay
//! in the stream, and transaction ids that are used again hide nothing.

use kit::owners::{WATCHFUL, publish, take_over, wait_caught_up, wait_fenced, wait_owner};
use kit::{
    LIMIT, Ledger, Load, Mode, Postgres, Redis, Stack, first_ids, ids, standing, wait_drained, wait_eq, wait_until,
};
use uuid::Uuid;

fn stack(settings: &[(&str, &str)]) -> Stack {
    Stack::of(Postgres::with(WATCHFUL).with(settings), Redis::start())
}

/// From here on the standby receives nothing of its primary.
#[track_caller]
fn cut_off(standby: &Postgres) {
    standby.set("primary_conninfo", "");
    wait_eq("walreceivers", 0, || {
        standby.one::<i64>("select count(*) from pg_stat_wal_receiver")
    });
}

#[track_caller]
fn set_enabled(pg: &Postgres, enabled: bool) {
    pg.exec(&format!("update outbox.backends set enabled = {enabled}"));
}

/// The transaction ids under which these events were published.
#[track_caller]
fn xids(pg: &Postgres, prefix: &str) -> (i64, i64) {
    let row = pg
        .client()
        .query_one(
            "select min(xid::text::bigint), max(xid::text::bigint) from outbox.events where event_type like $1 || '%'",
            &[&prefix],
        )
        .expect("the events are there");
    (row.get(0), row.get(1))
}

/// `count` events, each in a separate transaction.
#[track_caller]
fn publish_singly(pg: &Postgres, prefix: &str, count: i32) -> Vec<Uuid> {
    let mut client = pg.client();
    (0..count)
        .flat_map(|n| kit::publish_many(&mut client, "default", "", &format!("{prefix}{n}-"), 1))
        .collect()
}

/// The line that says how many events were found in the streams and how many were sent.
fn counted(there: i64, sent: i64) -> String {
    format!(
        "{there} of the events after its saved position are already in the streams and are not repeated; {sent} are sent."
    )
}

#[test]
fn a_standby_that_lost_a_tail_repeats_nothing_and_delivers_what_uses_its_ids_again() {
    let mut stack = stack(&[]);
    let standby = stack.pg.standby().start();
    let mut expected = publish_singly(&stack.pg, "base", 10);
    stack.wait_events(10);
    wait_drained(&stack.pg, "default");
    // The standby has these events, and perhaps not yet the cursor after them.
    expected.extend(publish(&stack.pg, "edge", 30));
    wait_caught_up(&stack.pg, &standby);
    cut_off(&standby);
    let unsure = standing(&standby, "default").pending;
    expected.extend(publish_singly(&stack.pg, "tail", 50));
    stack.wait_events(expected.len());
    let (lost_from, lost_to) = xids(&stack.pg, "tail");
    stack.pg.crash();

    standby.promote();
    let new = publish_singly(&standby, "new", 50);
    stack.wait_events(expected.len() + 50);
    wait_drained(&standby, "default");
    let (new_from, new_to) = xids(&standby, "new");
    assert!(
        new_from <= lost_to && lost_from <= new_to,
        "no id was used twice: {lost_from}..{lost_to}, {new_from}..{new_to}"
    );
    expected.extend(new);
    assert_eq!(ids(&stack.events()), expected);
    standby.wait_log("backend \"default\" goes on after another history of this database");
    let log = standby.log();
    let said = log
        .lines()
        .find(|line| line.contains("are already in the streams"))
        .expect("a count");
    // Events of the promoted server may have been published before the comparison.
    let (there, _) = said.split_once(" of the events").expect("a count");
    assert!(there.ends_with(&format!(" {unsure}")), "{said} should say {unsure}");
}

/// Events that both have were pending when the standby was cut off: its primary sent them later, or never.
#[test]
fn events_pending_at_the_promotion_are_sent_if_they_were_not() {
    for sent_by_primary in [true, false] {
        let mut stack = stack(&[]);
        let standby = stack.pg.standby().start();
        let mut expected = publish(&stack.pg, "base", 5);
        stack.wait_events(5);
        wait_drained(&stack.pg, "default");
        set_enabled(&stack.pg, false);
        expected.extend(publish(&stack.pg, "waits", 30));
        wait_caught_up(&stack.pg, &standby);
        cut_off(&standby);
        let mut tail = Vec::new();
        if sent_by_primary {
            set_enabled(&stack.pg, true);
            tail = publish_singly(&stack.pg, "tail", 10);
            stack.wait_events(expected.len() + 10);
        }
        stack.pg.crash();
        standby.promote();
        standby.wait_worker("postgres");
        set_enabled(&standby, true);
        wait_owner(&standby, &stack.redis);
        expected.extend(tail);
        expected.extend(publish(&standby, "new", 5));
        stack.wait_events(expected.len());
        wait_drained(&standby, "default");
        assert_eq!(ids(&stack.events()), expected, "sent by the primary: {sent_by_primary}");
        match sent_by_primary {
            true => standby.wait_log(&counted(30, 0)),
            false => assert!(
                !standby.log().contains("another history"),
                "the guard is within its history"
            ),
        }
    }
}

/// The standby is cut off in the middle of a load: the surviving events are delivered, and repeated ones have the same
/// event_id.
#[test]
fn a_lost_tail_under_load_loses_nothing_of_the_surviving_history() {
    let mut stack = stack(&[]);
    let ledger = Ledger::create(&stack.pg);
    let standby = stack.pg.standby().start();
    let load = Load::start(&stack.pg, 4, "");
    load.wait_more(100);
    cut_off(&standby);
    load.wait_more(100);
    stack.pg.crash();
    load.stop();
    standby.promote();
    stack.pg = standby;
    let load = Load::start(&stack.pg, 4, "");
    load.wait_more(200);
    load.stop();
    let mut verdict = ledger.settle(&stack, LIMIT);
    assert!(!verdict.phantoms.is_empty(), "no tail was lost");
    verdict.phantoms.clear();
    verdict.assert_exactly_once();
}

/// A transaction was open at the promotion: it committed in the lost history, and never in the other one, which gives
/// its id to no transaction.
#[test]
fn a_transaction_that_was_open_when_the_histories_parted_is_not_made_up() {
    let mut stack = stack(&[]);
    let standby = stack.pg.standby().start();
    let mut open = stack.pg.client();
    open.batch_execute("begin").expect("begin");
    let mut committed_late = kit::publish_many(&mut open, "default", "", "open", 3);
    let mut expected = publish(&stack.pg, "base", 5);
    stack.wait_events(5);
    wait_caught_up(&stack.pg, &standby);
    cut_off(&standby);
    open.batch_execute("commit").expect("commit");
    stack.wait_events(8);
    stack.pg.crash();
    standby.promote();
    let new = publish_singly(&standby, "new", 20);
    stack.wait_events(28);
    wait_drained(&standby, "default");
    expected.append(&mut committed_late);
    expected.extend(new);
    assert_eq!(ids(&stack.events()), expected);
    assert_eq!(
        standby.one::<i64>("select count(*) from outbox.events where event_type like 'open%'"),
        0
    );
}

/// A prepared transaction survives the promotion, and commits in the new history.
#[test]
fn a_prepared_transaction_is_delivered_when_it_commits_after_the_promotion() {
    let mut stack = stack(&[]);
    let standby = stack.pg.standby().start();
    let mut client = stack.pg.client();
    client.batch_execute("begin").expect("begin");
    let prepared = kit::publish_many(&mut client, "default", "", "prepared", 3);
    client.batch_execute("prepare transaction 'later'").expect("prepare");
    let mut expected = publish(&stack.pg, "base", 5);
    stack.wait_events(5);
    wait_caught_up(&stack.pg, &standby);
    cut_off(&standby);
    expected.extend(publish_singly(&stack.pg, "tail", 10));
    stack.wait_events(15);
    stack.pg.crash();
    standby.promote();
    expected.extend(publish_singly(&standby, "new", 10));
    stack.wait_events(25);
    standby.exec("commit prepared 'later'");
    expected.extend(prepared);
    stack.wait_events(28);
    wait_drained(&standby, "default");
    assert_eq!(ids(&stack.events()), expected);
}

/// The primary restarted after the standby had been cut off: the standby does not know this run of the owner, and waits
/// for take_over().
#[test]
fn a_standby_that_missed_a_restart_of_its_primary_waits_for_take_over() {
    let mut stack = stack(&[]);
    let standby = stack.pg.standby().start();
    let mut expected = publish(&stack.pg, "base", 5);
    stack.wait_events(5);
    wait_drained(&stack.pg, "default");
    wait_caught_up(&stack.pg, &standby);
    cut_off(&standby);
    stack.pg.restart();
    expected.extend(publish(&stack.pg, "tail", 5));
    stack.wait_events(10);
    stack.pg.crash();
    standby.promote();
    let new = publish(&standby, "new", 5);
    wait_fenced(&standby, &stack.pg);
    kit::holds_for(2 * kit::owners::PATIENCE, "it is fenced", || {
        standing(&standby, "default").pending == 5
    });
    take_over(&standby);
    stack.wait_events(15);
    wait_drained(&standby, "default");
    expected.extend(new);
    assert_eq!(ids(&stack.events()), expected);
}

/// With `send_after = standby_flush` a promoted server sends nothing until it has a standby of its own. Meanwhile it
/// compares its events with the streams, and repeats none of them afterwards.
#[test]
fn a_promoted_server_that_waits_for_its_own_standby_compares_with_what_it_has() {
    let mut stack = stack(&[("outbox_relay.send_after", "standby_flush")]);
    let standby = stack.pg.standby().start();
    set_enabled(&stack.pg, false);
    let mut expected = publish(&stack.pg, "waits", 30);
    wait_caught_up(&stack.pg, &standby);
    cut_off(&standby);
    set_enabled(&stack.pg, true);
    expected.extend(publish(&stack.pg, "tail", 10));
    stack.wait_events(40);
    stack.pg.crash();
    standby.configure(&[("synchronous_standby_names", "*")]);
    standby.reload();
    standby.promote();
    standby.wait_worker("postgres");
    let mut client = standby.client();
    client
        .batch_execute("set synchronous_commit = local; update outbox.backends set enabled = true")
        .expect("it commits without standbys");
    let new = kit::publish_many(&mut client, "default", "", "new", 5);
    kit::holds_for(2 * kit::owners::PATIENCE, "nothing is sent without a standby", || {
        stack.events().len() == 40
    });
    let second = standby.standby().start();
    expected.extend(new);
    stack.wait_events(45);
    wait_drained(&standby, "default");
    assert_eq!(first_ids(&stack.events()), expected);
    assert_eq!(stack.events().len(), 45, "repeats");
    drop(second);
}

/// Two promotions one after the other, each of a standby that lost the end of the WAL.
#[test]
fn tails_that_are_lost_twice_leave_each_history_in_order() {
    let mut stack = stack(&[]);
    let mut expected = publish(&stack.pg, "base", 5);
    stack.wait_events(5);
    wait_drained(&stack.pg, "default");
    for round in 0..2 {
        let standby = stack.pg.standby().start();
        wait_caught_up(&stack.pg, &standby);
        cut_off(&standby);
        expected.extend(publish_singly(&stack.pg, &format!("tail{round}-"), 10));
        stack.wait_events(expected.len());
        wait_drained(&stack.pg, "default");
        match round {
            0 => stack.pg.crash(),
            _ => drop(stack.pg.stop(Mode::Fast)),
        }
        standby.promote();
        stack.pg = standby;
        expected.extend(publish_singly(&stack.pg, &format!("new{round}-"), 10));
        stack.wait_events(expected.len());
        wait_drained(&stack.pg, "default");
        assert_eq!(ids(&stack.events()), expected, "round {round}");
    }
    wait_until("it to be well", || standing(&stack.pg, "default").state == "idle");
}
