//! `max_rate`: a backlog drains in order at the rate of its backend, and the backend counts as healthy.

use kit::{
    Cluster, Postgres, QUICK, Redis, Refused, Stack, UNTRIMMED, eventually, ids, publish_many, standing, wait_drained,
    wait_eq, wait_until,
};
use std::time::{Duration, Instant};

use crate::health::{check, follow};

fn stack() -> Stack {
    Stack::of(Postgres::with(QUICK).with(&[UNTRIMMED]), Redis::start())
}

fn pace(stack: &Stack, rate: &str) {
    stack.pg.exec(&format!(
        "update outbox.backends set max_rate = {rate} where name = 'default'"
    ));
}

fn health(stack: &Stack) -> (String, String) {
    let row = stack
        .pg
        .client()
        .query_one(
            "select status, detail from outbox.health() where \"check\" = 'backend default'",
            &[],
        )
        .expect("a row");
    (row.get(0), row.get(1))
}

#[test]
fn a_backlog_drains_at_its_pace_and_in_order() {
    let stack = stack();
    stack
        .pg
        .exec("update outbox.backends set enabled = false, max_rate = 200");
    let published = publish_many(&mut stack.pg.client(), "default", "", "event", 600);
    let start = Instant::now();
    stack.pg.exec("update outbox.backends set enabled = true");
    let mut looks = 0;
    while stack.events().len() < published.len() {
        let sent = stack.events().len();
        // The saved allowance, and what is added while this counts.
        let most = 200.0 * start.elapsed().as_secs_f64() + 10.0;
        assert!(sent as f64 <= most, "{sent} after {:?}", start.elapsed());
        let found = standing(&stack.pg, "default");
        // The saved count may be a second old, in which 200 are sent.
        if found.published > 0 && found.pending > 300 {
            looks += 1;
            assert_eq!(found.state, "sending", "{found:?}");
            let (status, detail) = health(&stack);
            assert_eq!(status, "ok", "{detail}");
            assert!(detail.contains("at most 200 a second (max_rate)"), "{detail}");
        }
        assert!(
            start.elapsed() < Duration::from_secs(15),
            "{sent} are slower than their pace"
        );
    }
    let took = start.elapsed();
    assert!(looks > 0);
    assert!(
        (2_900..8_000).contains(&took.as_millis()),
        "600 events at 200 a second took {took:?}"
    );
    assert_eq!(ids(&stack.events()), published);
    wait_drained(&stack.pg, "default");
    wait_eq("the state", "idle".to_owned(), || standing(&stack.pg, "default").state);
    let shown: Option<i32> = stack.pg.one("select max_rate from outbox.backend_status");
    assert_eq!(shown, Some(200));
    let metric: f64 = stack
        .pg
        .one("select value from outbox.metrics where name = 'outbox_relay_max_rate'");
    assert_eq!(metric as i64, 200);
}

#[test]
fn a_change_takes_effect_at_once_and_nonsense_is_refused() {
    let stack = stack();
    pace(&stack, "1");
    let mut published = publish_many(&mut stack.pg.client(), "default", "", "slow", 400);
    wait_until("the first", || !stack.events().is_empty());
    assert!(stack.events().len() < 20);
    pace(&stack, "1000000");
    let start = Instant::now();
    stack.wait_events(400);
    assert!(start.elapsed() < Duration::from_secs(5), "{:?}", start.elapsed());
    wait_drained(&stack.pg, "default");
    pace(&stack, "2");
    published.extend(publish_many(&mut stack.pg.client(), "default", "", "slow again", 100));
    wait_until("some", || stack.events().len() > 400);
    assert!(stack.events().len() < 450);
    pace(&stack, "null");
    assert_eq!(ids(&stack.wait_events(500)), published);
    wait_drained(&stack.pg, "default");
    wait_eq("the state", "idle".to_owned(), || standing(&stack.pg, "default").state);
    for nonsense in ["0", "-1"] {
        let sql = format!("update outbox.backends set max_rate = {nonsense}");
        assert_eq!(Refused::of(stack.pg.client().batch_execute(&sql)).code, "23514");
    }
}

/// Also if a backlog uses the whole rate.
#[test]
fn a_refused_stream_is_not_starved_by_a_backlog() {
    for delivery in ["exactly_once", "at_least_once"] {
        let stack = Stack::of(
            Postgres::with(QUICK).with(&[UNTRIMMED, ("outbox_relay.max_retries", "1000")]),
            Redis::start(),
        );
        stack
            .pg
            .exec(&format!("update outbox.backends set delivery = '{delivery}'"));
        stack.redis.call(&["SET", "bad", "a string"]);
        let refused = publish_many(&mut stack.pg.client(), "default", "bad", "refused", 10);
        wait_eq("waiting events", 10, || {
            stack
                .pg
                .one::<i64>("select count(*) from outbox.refused_events where accepted_in is null")
        });
        pace(&stack, "50");
        let backlog = publish_many(&mut stack.pg.client(), "default", "", "backlog", 2_000);
        wait_until("the backlog to move", || stack.events().len() > 5);
        stack.redis.call(&["DEL", "bad"]);
        assert_eq!(ids(&stack.redis.wait_entries("bad", 10)), refused);
        assert!(stack.events().len() < 1_500, "the backlog went first");
        pace(&stack, "null");
        assert_eq!(ids(&stack.wait_events(2_000)), backlog);
        wait_drained(&stack.pg, "default");
    }
}

/// Whatever is killed, nothing is lost or repeated while the rate limit delays events.
#[test]
fn each_event_is_sent_once_though_it_waits_for_its_pace() {
    let mut stack = stack();
    pace(&stack, "300");
    let published = publish_many(&mut stack.pg.client(), "default", "", "event", 900);
    let kills: [fn(&mut Stack); 3] = [
        |stack| stack.pg.kill_worker(),
        |stack| {
            stack.redis.call(&["CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes"]);
        },
        |stack| stack.pg.restart(),
    ];
    for kill in kills {
        let before = stack.events().len();
        wait_until("more", || stack.events().len() > before + 30);
        kill(&mut stack);
    }
    assert_eq!(ids(&stack.wait_events(900)), published);
    wait_drained(&stack.pg, "default");
    assert_eq!(stack.events().len(), 900);
}

#[test]
fn the_lanes_of_a_cluster_share_it() {
    let cluster = Cluster::start(0);
    let stack = stack();
    stack.pg.exec(&format!(
        "update outbox.backends set mode = 'cluster', nodes = '{}', host = null, port = null",
        cluster.addresses()
    ));
    let streams: Vec<String> = (0..4).map(|n| format!("s{n}")).collect();
    let mut client = stack.pg.client();
    for stream in &streams {
        publish_many(&mut client, "default", stream, "first", 1);
        cluster.wait_entries(stream, 1);
    }
    stack
        .pg
        .exec("update outbox.backends set enabled = false, max_rate = 100");
    // One stream after the other, in publishing order.
    for stream in &streams {
        publish_many(&mut client, "default", stream, "event", 100);
    }
    let sent = || -> Vec<usize> { streams.iter().map(|s| cluster.entries(s).len() - 1).collect() };
    stack.pg.exec("update outbox.backends set enabled = true");
    let start = Instant::now();
    wait_until("half of them", || sent().iter().sum::<usize>() >= 200);
    assert!(start.elapsed() > Duration::from_millis(1_700), "{:?}", start.elapsed());
    wait_until("all of them", || sent().iter().sum::<usize>() == 400);
    let took = start.elapsed();
    assert!(
        (3_700..12_000).contains(&took.as_millis()),
        "400 events at 100 a second took {took:?}"
    );
    wait_drained(&stack.pg, "default");
}

/// That it keeps to its pace is no comfort where more and more wait, and have waited for long.
#[test]
fn a_pace_that_publishers_exceed_for_long_is_named() {
    let stack = stack();
    pace(&stack, "50");
    // As if it had been so for a while.
    let publish = || {
        stack.pg.exec(
            "insert into outbox.events (event_type, source, created_at)
                select 'event', 'kit', now() - interval '10 min' from generate_series(1, 200)",
        );
    };
    publish();
    let ill = eventually("the pace to be named", Duration::from_secs(30), || {
        publish();
        std::thread::sleep(Duration::from_millis(1_000));
        let found = check(&crate::health::health(&stack.pg), "backend default");
        found
            .hint
            .as_deref()
            .is_some_and(|hint| hint.contains("max_rate"))
            .then_some(found)
    });
    assert!(ill.detail.contains("The lag grows"), "{ill:?}");
    follow(&stack.pg, "postgres", &ill);
    assert_eq!(stack.pg.one::<i32>("select max_rate from outbox.backends"), 100);
    // A backlog that becomes smaller is fine, however old it is.
    pace(&stack, "400");
    wait_eq("its status", "ok".to_owned(), || health(&stack).0);
}
