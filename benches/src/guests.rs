//! How relay and publishers affect each other, and the effect of a transaction or a snapshot that is open all the time.

use crate::bare::{self, pgbench};
use crate::load::{self, Pace, Way};
use crate::options::Scale;
use crate::probe::added;
use crate::report::{Goal, Row, Taken};
use crate::servers::{stack, wait_long};
use kit::Stack;
use std::time::Instant;

const CLIENTS: u32 = 8;

/// Eight publishers while the relay sends their events, compared with the same while it is paused.
pub(crate) fn measure(scale: &Scale) -> Taken {
    let stack = stack();
    stack.pg.exec(bare::TABLE);
    let (mut running, mut paused) = (Vec::new(), Vec::new());
    for run in 0..scale.runs {
        for turn in 0..2 {
            let relays = (run + turn) % 2 == 0;
            bare::empty(&stack);
            stack.pg.exec(&format!("update outbox.backends set enabled = {relays}"));
            let rate = pgbench(&stack.pg, &bare::publish_sql(), CLIENTS, true, scale.seconds).tps;
            if relays { &mut running } else { &mut paused }.push(rate);
        }
        eprintln!(
            "publishers {}: {:.0}/s, {:.0}/s while the relay is paused",
            run + 1,
            running[run],
            paused[run]
        );
    }
    Taken {
        rows: vec![Row::rate(
            "publish_event by 8 clients, relay running beside paused",
            &running,
            &paused,
            Goal::AtLeast(0.85),
        )],
        ..Taken::default()
    }
}

/// The session that is open all the time: its name, and what it does first.
const GUESTS: [(&str, &str); 3] = [
    ("nobody", "select 1"),
    (
        "a write transaction open all along",
        "begin; create temporary table mine (n integer); insert into mine values (1); select pg_current_xact_id()",
    ),
    (
        "a snapshot held all along",
        "begin isolation level repeatable read; select count(*) from outbox.events",
    ),
];

pub(crate) fn measure_open(scale: &Scale) -> Taken {
    let stack = stack();
    stack.pg.exec(bare::TABLE);
    let mut rates: [Vec<f64>; GUESTS.len()] = Default::default();
    let mut p99s: [Vec<f64>; GUESTS.len()] = Default::default();
    let pace = Pace {
        clients: CLIENTS as usize,
        transactions_per_second: 2_000.0,
        events: 1,
        seconds: f64::from(scale.seconds).max(1.0),
    };
    for run in 0..scale.runs {
        for turn in 0..GUESTS.len() {
            // The order of the measurements changes each time.
            let turn = if run % 2 == 0 { turn } else { GUESTS.len() - turn };
            let who = (run + turn) % GUESTS.len();
            bare::empty(&stack);
            let mut guest = stack.pg.client();
            guest.batch_execute(GUESTS[who].1).expect("the guest cannot settle");
            rates[who].push(relayed(&stack, scale.seconds));
            p99s[who].push(load::run(&stack, &Way::ours(), pace).ms(0.99));
            eprintln!(
                "open {}: {:.0}/s, p99 {:.2} ms at 2,000/s, with {}",
                run + 1,
                rates[who][run],
                p99s[who][run],
                GUESTS[who].0
            );
        }
    }
    let mut rows = Vec::new();
    for who in 1..GUESTS.len() {
        let name = GUESTS[who].0;
        rows.push(Row::rate(
            format!("published by 8 clients and delivered with {name}, beside without"),
            &rates[who],
            &rates[0],
            Goal::AtLeast(0.98),
        ));
        rows.push(Row::longer(
            format!("p99 from commit to consumer at 2,000/s with {name}, beside without"),
            &p99s[who],
            &p99s[0],
            Goal::AtMost(1.1),
        ));
    }
    Taken {
        rows,
        ..Taken::default()
    }
}

/// Events a second from the first publishing to the last delivery.
fn relayed(stack: &Stack, seconds: u32) -> f64 {
    let mut conn = stack.redis.conn();
    let streams = ["events".to_owned()];
    if stack.redis.xlen("events") == 0 {
        stack.publish("warm.up");
        stack.wait_events(1);
    }
    let before = added(&mut conn, &streams);
    let start = Instant::now();
    let published = pgbench(&stack.pg, &bare::publish_sql(), CLIENTS, true, seconds).transactions;
    wait_long(|| added(&mut conn, &streams) >= before + published);
    published as f64 / start.elapsed().as_secs_f64()
}
