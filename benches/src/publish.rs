//! `publish_event` beside a bare INSERT of the same columns, with the same indexes and defaults, by pgbench.

use crate::{Figure, Scale, median, stack};
use kit::Stack;
use std::time::Instant;

const PAD: usize = 174;

pub fn measure(scale: &Scale) -> Vec<Figure> {
    let stack = stack();
    // Published events only wait: this is about publishing.
    stack.pg.exec("update outbox.backends set enabled = false");
    stack.pg.exec(
        "create table bare (like outbox.events including indexes);
         create sequence bare_seq;
         alter table bare alter xid set default pg_current_xact_id(), alter seq set default nextval('bare_seq'),
            alter created_at set default clock_timestamp(), alter event_id set default gen_random_uuid(),
            alter backend set default 'default', alter backend_number set default 1",
    );
    let data = format!(r#"{{"n": 1000001, "pad": "{}"}}"#, "x".repeat(PAD));
    let ours = format!("select outbox.publish_event('bench.publish', 'bench', '{data}');\n");
    let bare = format!("insert into bare (event_type, source, data) values ('bench.publish', 'bench', '{data}');\n");
    let mut figures = Vec::new();
    for (clients, durable) in [(1, true), (8, true), (1, false), (8, false)] {
        let (mut tps, mut floor, mut ratios) = (Vec::new(), Vec::new(), Vec::new());
        for run in 0..scale.runs {
            stack.pg.exec("truncate outbox.events; truncate bare; checkpoint");
            // Each goes first every other time.
            for turn in 0..2 {
                match (run + turn) % 2 {
                    0 => tps.push(pgbench(&stack, &ours, clients, durable, scale.seconds)),
                    _ => floor.push(pgbench(&stack, &bare, clients, durable, scale.seconds)),
                }
            }
            ratios.push(tps[run] / floor[run]);
            eprintln!(
                "publish, {clients} clients: {:.0}/s, floor {:.0}/s, ratio {:.2}",
                tps[run], floor[run], ratios[run]
            );
        }
        let commit = if durable { "on" } else { "off" };
        figures.push(Figure {
            name: format!("publish_event over a bare INSERT, {clients} clients, synchronous_commit {commit}"),
            ours: format!("{:.0}/s", median(tps)),
            floor: format!("{:.0}/s", median(floor)),
            ratio: format!("{:.2}", median(ratios)),
            goal: "0.97",
        });
    }
    figures.extend(bulk(&stack, scale));
    figures.push(under_relay(&stack, scale, &ours));
    figures
}

/// Many events in one statement, over the bare INSERT ... SELECT of as many rows.
fn bulk(stack: &Stack, scale: &Scale) -> Vec<Figure> {
    const EVENTS: u32 = 100_000;
    let source = format!("json_build_object('n', 1000000 + g, 'pad', repeat('x', {PAD}))");
    let bare = format!(
        "insert into bare (event_type, source, data) select 'bench.bulk', 'bench', {source} from generate_series(1, {EVENTS}) g"
    );
    let ways = [
        ("INSERT ... SELECT", bare.replace("insert into bare", "insert into outbox.events")),
        (
            "publish_events",
            format!(
                "select outbox.publish_events(jsonb_agg(jsonb_build_object('event_type', 'bench.bulk', 'source', 'bench', 'data', {source})))
                 from generate_series(1, {EVENTS}) g group by g / 1000"
            ),
        ),
    ];
    let rate = |sql: &str| {
        stack.pg.exec("truncate outbox.events; truncate bare; checkpoint");
        let start = Instant::now();
        stack.pg.exec(sql);
        f64::from(EVENTS) / start.elapsed().as_secs_f64()
    };
    let figure = |(name, sql): &(&str, String)| {
        let (ours, floor): (Vec<f64>, Vec<f64>) = (0..scale.runs).map(|_| (rate(sql), rate(&bare))).unzip();
        Figure {
            name: format!("{name} of {EVENTS} events over a bare INSERT ... SELECT"),
            ours: format!("{:.0}/s", median(ours.clone())),
            floor: format!("{:.0}/s", median(floor.clone())),
            ratio: format!("{:.2}", median(ours.iter().zip(&floor).map(|(a, b)| a / b).collect())),
            goal: "0.7",
        }
    };
    ways.iter().map(figure).collect()
}

/// Eight publishers while the relay sends what they publish, over the same while it is paused.
fn under_relay(stack: &Stack, scale: &Scale, script: &str) -> Figure {
    let (mut running, mut paused) = (Vec::new(), Vec::new());
    for run in 0..scale.runs {
        for turn in 0..2 {
            let relays = (run + turn) % 2 == 0;
            stack.pg.exec("truncate outbox.events; checkpoint");
            stack.pg.exec(&format!("update outbox.backends set enabled = {relays}"));
            let rate = pgbench(stack, script, 8, true, scale.seconds);
            if relays { &mut running } else { &mut paused }.push(rate);
        }
    }
    Figure {
        name: "publish_event by 8 clients with the relay running over paused".to_owned(),
        ours: format!("{:.0}/s", median(running.clone())),
        floor: format!("{:.0}/s", median(paused.clone())),
        ratio: format!(
            "{:.2}",
            median(running.iter().zip(&paused).map(|(a, b)| a / b).collect())
        ),
        goal: "0.85",
    }
}

fn pgbench(stack: &Stack, script: &str, clients: u32, durable: bool, seconds: u32) -> f64 {
    let commit = if durable { "on" } else { "off" };
    stack
        .pg
        .exec(&format!("alter database postgres set synchronous_commit to {commit}"));
    let (clients, seconds) = (clients.to_string(), seconds.to_string());
    let arguments = [
        "-n",
        "-M",
        "prepared",
        "-c",
        &clients,
        "-j",
        "2",
        "-T",
        &seconds,
        "-f",
        "/dev/stdin",
        "postgres",
    ];
    let ran = stack.pg.run("pgbench", &arguments, script);
    assert!(ran.ok, "pgbench failed: {}", ran.stderr);
    let line = ran
        .stdout
        .lines()
        .find_map(|l| l.strip_prefix("tps = "))
        .expect("no tps line");
    line.split_whitespace()
        .next()
        .and_then(|n| n.parse().ok())
        .expect("no tps")
}
