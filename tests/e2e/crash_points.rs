//! The worker dies at each point where that makes a difference, and comes back: every event is in its stream once and
//! in order, and refused events fail as they should. Needs a library built with the feature `faults`.

use kit::faults::POINTS;
use kit::{
    LIMIT, Ledger, Load, Mode, Postgres, QUICK, Redis, Stack, UNTRIMMED, Way, ids, publish_many, standing,
    wait_drained, wait_eq, wait_until,
};
use uuid::Uuid;

const WRONGTYPE: &str = "WRONGTYPE Operation against a key holding the wrong kind of value";

/// A stack whose worker dies at a chosen point, and whose Redis has a string at the key `bad`.
fn stack(settings: &[(&str, &str)]) -> Stack {
    let redis = Redis::start();
    redis.call(&["SET", "bad", "a string"]);
    let postgres = Postgres::with(QUICK).with(&[UNTRIMMED]).with(settings);
    Stack::of(postgres.faults(), redis)
}

/// Makes the relay connect again, and so claim.
fn kill_clients(redis: &Redis) {
    redis.call(&["CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes"]);
}

/// Publishes events in turn to the backend's stream and to another one, in one transaction.
fn publish_to_two(stack: &Stack, other: &str, count: i32) -> [Vec<Uuid>; 2] {
    let mut client = stack.pg.client();
    let rows = client.query(
        "select outbox.publish_event('event', 'kit', stream => case when n % 2 = 0 then $1::text end)
         from generate_series(1, 2 * $2::int) n order by n",
        &[&other, &count],
    );
    let ids: Vec<Uuid> = rows.expect("publish").iter().map(|row| row.get(0)).collect();
    let every_second = |first: usize| ids[first..].iter().step_by(2).copied().collect();
    [every_second(0), every_second(1)]
}

fn failed(pg: &Postgres) -> Vec<(Uuid, String)> {
    let rows = pg.client().query(
        "select event_id, last_error from outbox.failed_events order by seq",
        &[],
    );
    rows.expect("readable")
        .iter()
        .map(|row| (row.get(0), row.get(1)))
        .collect()
}

fn refused(pg: &Postgres) -> i64 {
    pg.one("select count(*) from outbox.refused_events where accepted_in is null")
}

/// Waits until the server, which restarts after a crash of the worker, has come back.
fn wait_back(stack: &Stack, mark: usize) {
    stack.pg.wait_recovered(mark);
    stack.pg.wait_worker("postgres");
}

/// The worker dies at the point where it is to wait: by then, the publishers know that their transactions are
/// committed.
fn die_here(stack: &Stack) {
    stack.pg.wait_reached();
    stack.pg.kill_worker();
    stack.pg.release();
}

#[test]
fn a_worker_that_dies_at_any_point_under_load_repeats_nothing() {
    let stack = stack(&[]);
    let ledger = Ledger::create(&stack.pg);
    let load = Load::start(&stack.pg, 3, "");
    for point in POINTS.iter().filter(|point| **point != "before_refused_saved") {
        load.wait_more(20);
        let mark = stack.pg.log().len();
        stack.pg.crash_at(point);
        if point.ends_with("_claim") {
            kill_clients(&stack.redis);
        }
        stack.pg.wait_reached();
        wait_back(&stack, mark);
    }
    load.wait_more(20);
    load.stop();
    ledger.settle(&stack, LIMIT).assert_exactly_once();
}

/// Each time, half of one batch is refused, and nothing else happens.
#[test]
fn a_worker_that_dies_at_any_point_fails_what_redis_refuses_and_nothing_else() {
    let stack = stack(&[
        ("outbox_relay.max_retries", "2"),
        // Only a published event brings the worker to a point.
        ("outbox_relay.poll_interval", "1h"),
    ]);
    let [mut good, mut bad] = [Vec::new(), Vec::new()];
    for point in POINTS {
        stack.pg.hold_at(point);
        if point.ends_with("_claim") {
            kill_clients(&stack.redis);
        }
        let [to_good, to_bad] = publish_to_two(&stack, "bad", 5);
        good.extend(to_good);
        bad.extend(to_bad);
        if *point == "before_save" {
            // Refusals are saved elsewhere, together with the cursor.
            wait_eq("failed events", bad.len(), || failed(&stack.pg).len());
            good.push(stack.publish("alone"));
        }
        die_here(&stack);
        wait_eq(&format!("failed events after {point}"), bad.len(), || {
            failed(&stack.pg).len()
        });
    }
    stack.wait_events(good.len());
    wait_drained(&stack.pg, "default");
    assert_eq!(ids(&stack.events()), good);
    let expected: Vec<(Uuid, String)> = bad.iter().map(|id| (*id, WRONGTYPE.to_string())).collect();
    assert_eq!(failed(&stack.pg), expected);
    assert_eq!(refused(&stack.pg), 0);
    let found = standing(&stack.pg, "default");
    assert_eq!(
        (found.published, found.failed),
        (i64::try_from(good.len()).unwrap(), i64::try_from(bad.len()).unwrap())
    );
}

/// The guard's position is already after them, and their refusal is not saved: the ends of the streams prove it.
#[test]
fn refused_events_that_were_not_saved_are_found_again() {
    let stack = stack(&[("outbox_relay.max_retries", "1000")]);
    stack.pg.hold_at("before_refused_saved");
    let [good, bad] = publish_to_two(&stack, "bad", 20);
    die_here(&stack);
    wait_eq("refused events", 20, || refused(&stack.pg));
    wait_until("a reason", || {
        stack.pg.one::<bool>(&format!(
            "select last_error = '{WRONGTYPE}' from outbox.refused_events order by seq limit 1"
        ))
    });
    assert_eq!(ids(&stack.events()), good);
    let [later_good, later_bad] = publish_to_two(&stack, "bad", 5);
    stack.wait_events(25);
    stack.redis.call(&["DEL", "bad"]);
    assert_eq!(ids(&stack.redis.wait_entries("bad", 25)), [bad, later_bad].concat());
    wait_drained(&stack.pg, "default");
    assert_eq!(ids(&stack.events()), [good, later_good].concat());
    assert_eq!((refused(&stack.pg), failed(&stack.pg).len()), (0, 0));
    assert_eq!(standing(&stack.pg, "default").published, 50);
}

/// Redis would accept them now, and nothing records that it did not.
#[test]
fn a_stream_corrected_before_its_refusal_was_saved_loses_nothing() {
    let mut stack = stack(&[("outbox_relay.max_retries", "1000")]);
    stack.pg.hold_at("before_refused_saved");
    let [good, bad] = publish_to_two(&stack, "bad", 20);
    stack.pg.wait_reached();
    stack.pg.stop(Mode::Immediate);
    stack.redis.call(&["DEL", "bad"]);
    stack.pg.release();
    stack.pg.start_again();
    assert_eq!(ids(&stack.redis.wait_entries("bad", 20)), bad);
    wait_drained(&stack.pg, "default");
    assert_eq!((ids(&stack.events()), ids(&stack.redis.entries("bad"))), (good, bad));
    assert_eq!((refused(&stack.pg), failed(&stack.pg).len()), (0, 0));
}

/// The head was refused, and by the time its followers are tried the stream is healthy: some events of a batch are in
/// the stream, some are not.
#[test]
fn a_partly_accepted_batch_is_compared_event_by_event() {
    let mut stack = stack(&[("outbox_relay.max_retries", "1000")]);
    stack.redis.call(&["SET", "worse", "a string"]);
    stack.pg.hold_at("before_refused_saved");
    let mut client = stack.pg.client();
    let rows = client.query(
        "select outbox.publish_event('event', 'kit', stream => (array['a', 'bad', 'b', 'worse', 'c'])[1 + n % 5])
         from generate_series(0, 49) n order by n",
        &[],
    );
    let published: Vec<Uuid> = rows.expect("publish").iter().map(|row| row.get(0)).collect();
    let of = |index: usize| -> Vec<Uuid> { published.iter().skip(index).step_by(5).copied().collect() };
    drop(client);
    stack.pg.wait_reached();
    stack.pg.stop(Mode::Immediate);
    stack.redis.call(&["DEL", "worse"]);
    stack.pg.release();
    stack.pg.start_again();
    assert_eq!(ids(&stack.redis.wait_entries("worse", 10)), of(3));
    wait_eq("refused events", 10, || refused(&stack.pg));
    stack.redis.call(&["DEL", "bad"]);
    assert_eq!(ids(&stack.redis.wait_entries("bad", 10)), of(1));
    wait_drained(&stack.pg, "default");
    for (index, stream) in ["a", "bad", "b", "worse", "c"].into_iter().enumerate() {
        assert_eq!(ids(&stack.redis.entries(stream)), of(index), "{stream}");
    }
}

/// Waiting events were accepted, and the worker dies before it has saved that.
#[test]
fn waiting_events_that_were_accepted_just_before_a_crash_are_not_repeated() {
    for point in ["after_write", "after_exec", "before_refused_saved"] {
        let stack = stack(&[
            ("outbox_relay.max_retries", "1000"),
            ("outbox_relay.retry_delay", "300ms"),
            ("outbox_relay.retry_max_delay", "300ms"),
        ]);
        let [good, bad] = publish_to_two(&stack, "bad", 7);
        wait_eq("refused events", 7, || refused(&stack.pg));
        wait_drained_but(&stack, 7);
        for left in [7, 6] {
            // First only the head, then the events behind it.
            let mark = stack.pg.log().len();
            stack.pg.crash_at(point);
            if left == 7 {
                stack.redis.call(&["DEL", "bad"]);
            }
            stack.pg.wait_reached();
            wait_back(&stack, mark);
            if stack.redis.xlen("bad") == 7 {
                break;
            }
        }
        assert_eq!(ids(&stack.redis.wait_entries("bad", 7)), bad, "{point}");
        stack.pg.release();
        wait_eq("refused events", 0, || refused(&stack.pg));
        wait_drained(&stack.pg, "default");
        assert_eq!(
            (ids(&stack.events()), ids(&stack.redis.entries("bad"))),
            (good, bad),
            "{point}"
        );
        assert_eq!(failed(&stack.pg), []);
    }
}

/// Waits until the saved state says that all but this many are delivered.
fn wait_drained_but(stack: &Stack, count: i64) {
    wait_eq("pending events", count, || standing(&stack.pg, "default").pending);
}

/// The claim of the dead worker arrives when another has claimed.
#[test]
fn a_late_claim_of_a_dead_worker_changes_nothing() {
    let stack = stack(&[("outbox_relay.poll_interval", "1h")]);
    let proxy = stack.through_proxy();
    let mut published = publish_many(&mut stack.pg.client(), "default", "", "before", 10);
    stack.wait_events(10);
    wait_drained(&stack.pg, "default");
    stack.pg.hold_at("before_claim");
    kill_clients(&stack.redis);
    published.extend(publish_many(&mut stack.pg.client(), "default", "", "meanwhile", 10));
    stack.pg.wait_reached();
    proxy.hold(Way::ToServer);
    stack.pg.release();
    // MULTI, HSET and EXEC of the claim.
    proxy.wait_held(Way::ToServer, 200);
    stack.pg.kill_worker();
    assert_eq!(ids(&stack.wait_events(20)), published);
    wait_drained(&stack.pg, "default");
    let guard = stack.guard();
    proxy.release();
    wait_eq("connections", 1, || proxy.connections());
    assert_eq!(stack.guard(), guard);
    published.extend(publish_many(&mut stack.pg.client(), "default", "", "after", 10));
    assert_eq!(ids(&stack.wait_events(30)), published);
}

/// The cursor was not saved, and it misses many batches.
#[test]
fn the_guard_records_what_was_sent_since_the_cursor_was_saved() {
    let mut stack = stack(&[("outbox_relay.batch_size", "3")]);
    stack.publish("first");
    stack.wait_events(1);
    wait_drained(&stack.pg, "default");
    stack.pg.hold_at("before_save");
    let mut published = ids(&stack.events());
    let first = stack.guard().number("number");
    // One transaction, so that all batches are on their way before a position is saved, however slow the machine is.
    published.extend(publish_many(&mut stack.pg.client(), "default", "", "event", 18 * 3));
    stack.wait_events(published.len());
    assert!(stack.guard().number("number") >= first + 18, "few batches");
    stack.pg.wait_reached();
    stack.pg.stop(Mode::Immediate);
    stack.pg.release();
    // The worker cannot read the guard, and saves nothing, before the cursor was checked.
    stack.redis.sigstop();
    stack.pg.start_again();
    let saved: i64 = stack
        .pg
        .one("select batch_number from outbox.cursors where backend_number = 1");
    stack.redis.sigcont();
    published.extend(publish_many(&mut stack.pg.client(), "default", "", "after", 3));
    stack.wait_events(published.len());
    wait_drained(&stack.pg, "default");
    assert_eq!(ids(&stack.events()), published);
    assert!(saved.cast_unsigned() < first + 18, "the cursor was saved: {saved}");
    assert_eq!(
        standing(&stack.pg, "default").published,
        i64::try_from(published.len()).unwrap()
    );
}

/// The guard is ahead of the saved cursor when the delivery becomes at_least_once, which ignores guards: those few
/// events may be repeated. Events that were sent after the switch are not, although the guard says nothing of them when
/// the delivery is exactly_once again.
#[test]
fn a_crash_just_before_a_switch_of_the_delivery_repeats_no_more_than_was_not_saved() {
    let mut stack = stack(&[]);
    stack.publish("first");
    stack.wait_events(1);
    wait_drained(&stack.pg, "default");
    let mut published = ids(&stack.events());
    stack.pg.hold_at("before_save");
    let unsaved = publish_many(&mut stack.pg.client(), "default", "", "unsaved", 5);
    stack.wait_events(6);
    stack.pg.wait_reached();
    stack.pg.stop(Mode::Immediate);
    stack.pg.release();
    stack.pg.configure(&[("outbox_relay.enabled", "off")]);
    stack.pg.start_again();
    stack.pg.exec("update outbox.backends set delivery = 'at_least_once'");
    stack.pg.configure(&[("outbox_relay.enabled", "on")]);
    stack.pg.reload();
    published.extend(unsaved.repeat(2));
    stack.wait_events(11);
    published.extend(publish_many(&mut stack.pg.client(), "default", "", "later", 50));
    stack.wait_events(61);
    wait_drained(&stack.pg, "default");
    stack.pg.exec("update outbox.backends set delivery = 'exactly_once'");
    published.extend(publish_many(&mut stack.pg.client(), "default", "", "last", 5));
    stack.wait_events(66);
    wait_drained(&stack.pg, "default");
    assert_eq!(ids(&stack.events()), published);
}
