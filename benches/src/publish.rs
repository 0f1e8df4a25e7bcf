//! `publish_event` beside a bare INSERT of the same columns, with the same indexes and defaults, and many events in one
//! statement beside the bare INSERT ... SELECT.

use crate::bare::{self, pgbench};
use crate::options::Scale;
use crate::report::{Goal, Row, Taken, thousands};
use crate::servers::{DATA, stack};
use crate::stats::median_ratio;
use kit::Stack;
use std::time::Instant;

pub(crate) fn measure(scale: &Scale) -> Taken {
    let stack = stack();
    // Published events are not sent here: only publishing is measured.
    stack.pg.exec("update outbox.backends set enabled = false");
    stack.pg.exec(bare::TABLE);
    let mut rows = Vec::new();
    for (clients, durable) in [(1, true), (8, true), (1, false), (8, false)] {
        rows.push(single(&stack, scale, clients, durable));
    }
    Taken {
        rows,
        ..Taken::default()
    }
}

fn single(stack: &Stack, scale: &Scale, clients: u32, durable: bool) -> Row {
    let (mut ours, mut floor) = (Vec::new(), Vec::new());
    for run in 0..scale.runs {
        bare::empty(stack);
        // Each goes first every other time.
        for turn in 0..2 {
            let (rates, script) = match (run + turn) % 2 {
                0 => (&mut ours, bare::publish_sql()),
                _ => (&mut floor, bare::insert_sql()),
            };
            rates.push(pgbench(&stack.pg, &script, clients, durable, scale.seconds).tps);
        }
    }
    let commit = if durable { "on" } else { "off" };
    let name = format!("publish_event beside a bare INSERT, {clients} clients, synchronous_commit {commit}");
    eprintln!("publish: {:.2}, {name}", median_ratio(&ours, &floor));
    Row::rate(name, &ours, &floor, Goal::AtLeast(0.97))
}

/// Many events in one statement.
pub(crate) fn measure_bulk(scale: &Scale) -> Taken {
    let stack = stack();
    stack.pg.exec("update outbox.backends set enabled = false");
    stack.pg.exec(bare::TABLE);
    let events = scale.bulk;
    // The payloads are prepared: making them is not measured.
    stack.pg.exec(&format!(
        "create table payloads as select g, {DATA} as data from generate_series(1, {events}) g;
         create table arrays as
             select jsonb_agg(jsonb_build_object('event_type', 'bench.bulk', 'source', 'bench', 'data', data) order by g) as events
             from payloads group by g / 1000;
         analyze payloads, arrays"
    ));
    let insert = |table: &str| {
        format!("insert into {table} (event_type, source, data) select 'bench.bulk', 'bench', data from payloads")
    };
    let bare = insert("bare");
    let ways = [
        ("INSERT ... SELECT", insert("outbox.events")),
        (
            "publish_events, arrays of 1,000",
            "select outbox.publish_events(events) from arrays".to_owned(),
        ),
    ];
    let rate = |sql: &str| {
        bare::empty(&stack);
        let mut client = stack.pg.client();
        let start = Instant::now();
        client.batch_execute(sql).expect("cannot publish in bulk");
        events as f64 / start.elapsed().as_secs_f64()
    };
    let row = |(name, sql): &(&str, String)| {
        let (mut ours, mut floor) = (Vec::new(), Vec::new());
        for run in 0..scale.runs {
            for turn in 0..2 {
                match (run + turn) % 2 {
                    0 => ours.push(rate(sql)),
                    _ => floor.push(rate(&bare)),
                }
            }
        }
        let name = format!("{name}, {} events, beside a bare INSERT ... SELECT", thousands(events));
        eprintln!("bulk: {:.2}, {name}", median_ratio(&ours, &floor));
        Row::rate(name, &ours, &floor, Goal::AtLeast(0.7))
    };
    Taken {
        rows: ways.iter().map(row).collect(),
        ..Taken::default()
    }
}
