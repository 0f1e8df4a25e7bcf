//! From commit to a consumer blocked in XREAD, at 50 events a second, beside an application that commits a bare INSERT and then XADDs
//! by itself. Both times run from sending COMMIT to the entry's arrival.

use crate::{Figure, Scale, median, quantile, stack};
use kit::Stack;
use std::sync::mpsc;
use std::time::{Duration, Instant};

const INTERVAL: Duration = Duration::from_millis(20);

pub fn measure(scale: &Scale) -> Vec<Figure> {
    let stack = stack();
    stack
        .pg
        .exec("create table bare (like outbox.events including indexes)");
    let (mut ours, mut floor) = (Vec::new(), Vec::new());
    for run in 0..scale.runs {
        ours.push(times_ms(&stack, "events", scale.transactions, relayed));
        floor.push(times_ms(&stack, "floor", scale.transactions, by_itself));
        eprintln!(
            "latency {}: p50 {:.2} ms, p99 {:.2} ms; by itself p50 {:.2} ms, p99 {:.2} ms",
            run + 1,
            quantile(&ours[run], 0.5),
            quantile(&ours[run], 0.99),
            quantile(&floor[run], 0.5),
            quantile(&floor[run], 0.99)
        );
    }
    [(0.5, "p50", "+1 ms"), (0.99, "p99", "+5 ms")]
        .into_iter()
        .map(|(share, name, goal)| {
            let of = |runs: &[Vec<f64>]| runs.iter().map(|times| quantile(times, share)).collect::<Vec<_>>();
            let differences = of(&ours).iter().zip(of(&floor)).map(|(a, b)| a - b).collect();
            Figure {
                name: format!("commit to consumer at 50 events/s, {name}"),
                ours: format!("{:.2} ms", median(of(&ours))),
                floor: format!("{:.2} ms", median(of(&floor))),
                ratio: format!("{:+.2} ms", median(differences)),
                goal,
            }
        })
        .collect()
}

type Publish = fn(&mut postgres::Client, &mut redis::Connection) -> Instant;

/// Publishes at a steady pace; returns the time that each took to arrive.
fn times_ms(stack: &Stack, stream: &'static str, transactions: usize, publish: Publish) -> Vec<f64> {
    let (arrived, arrivals) = mpsc::channel();
    let mut consumer = stack.redis.conn();
    let last: Vec<(String, Vec<String>)> = redis::cmd("XREVRANGE")
        .arg(stream)
        .arg("+")
        .arg("-")
        .arg("COUNT")
        .arg(1)
        .query(&mut consumer)
        .expect("XREVRANGE");
    let mut last = last.into_iter().next().map_or("0-0".to_owned(), |(id, _)| id);
    std::thread::spawn(move || {
        type Reply = Option<Vec<(String, Vec<(String, Vec<String>)>)>>;
        loop {
            let reply: redis::RedisResult<Reply> = redis::cmd("XREAD")
                .arg("BLOCK")
                .arg(10_000)
                .arg("STREAMS")
                .arg(stream)
                .arg(&last)
                .query(&mut consumer);
            let at = Instant::now();
            let Ok(Some(streams)) = reply else {
                return;
            };
            for (id, _) in streams.into_iter().flat_map(|(_, entries)| entries) {
                last = id;
                if arrived.send(at).is_err() {
                    return;
                }
            }
        }
    });
    let (mut client, mut conn) = (stack.pg.client(), stack.redis.conn());
    let mut times = Vec::new();
    let start = Instant::now();
    for n in 0..transactions {
        if let Some(wait) = (start + INTERVAL * n as u32).checked_duration_since(Instant::now()) {
            std::thread::sleep(wait);
        }
        let sent = publish(&mut client, &mut conn);
        let at = arrivals
            .recv_timeout(Duration::from_secs(10))
            .expect("an event never arrived");
        times.push(at.saturating_duration_since(sent).as_secs_f64() * 1_000.0);
    }
    times
}

fn relayed(client: &mut postgres::Client, _: &mut redis::Connection) -> Instant {
    let mut transaction = client.transaction().expect("begin");
    transaction
        .execute(
            "select outbox.publish_event('bench.latency', 'bench', '{\"n\": 1}')",
            &[],
        )
        .expect("publish");
    let sent = Instant::now();
    transaction.commit().expect("commit");
    sent
}

fn by_itself(client: &mut postgres::Client, conn: &mut redis::Connection) -> Instant {
    let mut transaction = client.transaction().expect("begin");
    transaction
        .execute(
            "insert into bare (seq, xid, created_at, event_id, backend_number, event_type, source, backend, data)
             values (floor(random() * 1e15), pg_current_xact_id(), now(), gen_random_uuid(), 1, 't', 's', 'default', '{\"n\": 1}')",
            &[],
        )
        .expect("insert");
    let sent = Instant::now();
    transaction.commit().expect("commit");
    let _: String = redis::cmd("XADD")
        .arg(&[
            "floor",
            "MAXLEN",
            "~",
            "10000",
            "*",
            "event_id",
            "01a209bb-302f-746e-bb1c-b5eca618182a",
        ])
        .arg(&[
            "event_type",
            "bench.latency",
            "source",
            "bench",
            "cloud_event",
            "{\"n\": 1}",
        ])
        .query(conn)
        .expect("XADD");
    sent
}
