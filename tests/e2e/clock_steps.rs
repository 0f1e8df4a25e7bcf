//! The server's clock is set while it runs: by NTP, by somebody, or because the machine was suspended.

use std::time::{Duration, Instant};

use kit::{Redis, Refused, Stack, WallClock, types, wait_eq};
use postgres::Client;

const HOUR: i64 = 3_600;

/// A stack whose server goes by a clock that can be set.
fn stack(settings: &[(&str, &str)]) -> Option<(WallClock, Stack)> {
    let clock = WallClock::new()?;
    let server = kit::Postgres::with(settings);
    let stack = Stack::of(clock.in_use_by(server), Redis::start());
    Some((clock, stack))
}

#[test]
fn a_scheduled_event_is_sent_when_the_clock_is_put_past_its_time() {
    let Some((clock, stack)) = stack(&[("outbox_relay.poll_interval", "500ms")]) else {
        return;
    };
    stack
        .pg
        .exec("select outbox.publish_event('due', 's', scheduled_at => now() + interval '1 hour')");
    stack.publish("now");
    stack.wait_events(1);
    clock.set(2 * HOUR);
    assert_eq!(types(&stack.wait_events(2)), ["now", "due"]);
    // Put back, it is not sent too early.
    stack
        .pg
        .exec("select outbox.publish_event('later', 's', scheduled_at => now() + interval '1 s')");
    clock.set(0);
    stack.publish("again");
    assert_eq!(types(&stack.wait_events(3))[2], "again");
    std::thread::sleep(Duration::from_secs(2));
    assert_eq!(stack.events().len(), 3);
    clock.set(2 * HOUR);
    assert_eq!(types(&stack.wait_events(4))[3], "later");
}

/// What was sent before the clock was put back is purged, though later.
#[test]
fn retention_keeps_nothing_for_ever_when_the_clock_is_put_back() {
    let Some((clock, stack)) = stack(&[("outbox_relay.published_retention", "1min")]) else {
        return;
    };
    let mut sent = 0;
    let mut send = |event_type: &str| {
        stack.publish(event_type);
        sent += 1;
        stack.wait_events(sent);
        let sql = format!(
            "select exists (select from outbox.ticks t, outbox.events e
                where e.event_type = '{event_type}' and pg_visible_in_snapshot(e.xid, t.snapshot))"
        );
        wait_eq("a tick that sees it", true, || stack.pg.one::<bool>(&sql));
    };
    let kept = |expected: &str| {
        wait_eq("what is kept", expected.to_owned(), || {
            let sql = "select coalesce(string_agg(event_type, ',' order by seq), '') from outbox.events";
            stack.pg.one::<String>(sql)
        });
    };
    clock.set(10 * 60);
    send("a");
    send("b");
    clock.set(12 * 60);
    kept("");
    send("c");
    clock.set(0);
    send("d");
    assert_eq!(stack.pg.one::<i64>("select count(*) from outbox.events"), 2);
    clock.set(HOUR);
    send("e");
    kept("e");
}

/// The views' times are those of the clock, so an event of "tomorrow" may wait. But what is idle says so, and nothing
/// has a negative age.
#[test]
fn a_clock_that_is_put_back_makes_no_view_lie() {
    let Some((clock, stack)) = stack(&[]) else { return };
    clock.set(5 * HOUR);
    for _ in 0..20 {
        stack.publish("sent");
    }
    stack.wait_events(20);
    stack.pg.exec("update outbox.backends set enabled = false");
    stack.publish("waits");
    wait_eq("what waits", 1, || {
        stack.pg.one::<i64>("select pending from outbox.status")
    });
    clock.set(0);
    let one = |sql: &str| stack.pg.one::<bool>(sql);
    assert!(one("select oldest_pending_age >= '0' from outbox.status"), "status");
    assert!(
        one("select oldest_pending_age >= '0' from outbox.backend_status"),
        "backend_status"
    );
    assert!(one("select events_per_second = 0 from outbox.status"), "the rate");
    assert!(one("select per_s = '0' from outbox.top"), "the rate in top");
    let wrong: i64 = stack.pg.one("select count(*) from outbox.metrics where value < 0");
    assert_eq!(wrong, 0, "negative metrics");
}

/// Runs a statement, and puts the clock back or ahead while it waits. Returns how long it took.
fn takes<T: Send>(
    (clock, stack): &(WallClock, Stack),
    step: i64,
    statement: impl FnOnce(&mut Client) -> T + Send,
) -> (Duration, T) {
    clock.set(0);
    std::thread::scope(|scope| {
        let waiting = scope.spawn(|| {
            let mut client = stack.pg.client();
            let began = Instant::now();
            let outcome = statement(&mut client);
            (began.elapsed(), outcome)
        });
        std::thread::sleep(Duration::from_millis(500));
        clock.set(step);
        waiting.join().expect("it does not panic")
    })
}

#[test]
fn waiting_ends_after_its_time_whatever_the_clock_says() {
    let Some(both) = stack(&[]) else { return };
    both.1.pg.exec("update outbox.backends set enabled = false");
    let id = both.1.publish("waits");
    for call in [
        "outbox.drain('2 s')".to_owned(),
        format!("outbox.wait_published('{id}', '2 s')"),
    ] {
        for step in [-HOUR, HOUR] {
            let query = format!("select {call}");
            let (took, sent) = takes(&both, step, |client| client.query_one(&query, &[]));
            assert!(!sent.expect("it waits").get::<_, bool>(0), "{call}, {step}");
            assert!((1.9..5.0).contains(&took.as_secs_f64()), "{call}, {step}: {took:?}");
        }
    }
    for (statement, code) in [
        (format!("select outbox.erase('{id}')"), "55000"),
        ("delete from outbox.backends".to_owned(), "55006"),
    ] {
        let (took, outcome) = takes(&both, -HOUR, |client| client.batch_execute(&statement));
        assert_eq!(Refused::of(outcome).code, code);
        assert!(took.as_secs() < 15, "{statement}: {took:?}");
    }
}
