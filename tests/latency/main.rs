//! Measures how long after its commit an event reaches a consumer: `latency SOCKET_DIR REDIS_PORT TRANSACTIONS`.
//!
//! A consumer thread is blocked in XREAD on the stream `events`; transactions run one after the other, each once the
//! one before has arrived. Both ends read the same clock. Two times are printed: from sending COMMIT, which counts the
//! flush of the WAL too, and from its acknowledgement (less than zero if the consumer was faster than the client).

use std::collections::HashMap;
use std::error::Error;
use std::sync::mpsc;
use std::time::{Duration, Instant};

use postgres::{Client, NoTls};
use redis::{Connection, cmd};
use uuid::Uuid;

const STREAM: &str = "events";
const WARM_UP: usize = 10;
const PATIENCE: Duration = Duration::from_secs(10);

type Result<T> = std::result::Result<T, Box<dyn Error + Send + Sync>>;
type Reply = Option<Vec<(String, Vec<(String, HashMap<String, String>)>)>>;

fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [host, port, count] = &arguments[..] else {
        return Err("usage: latency SOCKET_DIR REDIS_PORT TRANSACTIONS".into());
    };
    let count: usize = count.parse()?;
    let mut pg = Client::connect(&format!("host={host} user=postgres dbname=postgres"), NoTls)?;
    let conn = redis::Client::open(format!("redis://127.0.0.1:{port}"))?.get_connection()?;

    let (arrived, arrivals) = mpsc::channel();
    // Ends with the process, since it is blocked most of the time.
    std::thread::spawn(move || consume(conn, &arrived));
    let ready = arrivals.recv_timeout(PATIENCE)??;
    debug_assert!(ready.0.is_nil());

    let mut from_sent_ms = Vec::new();
    let mut from_acknowledged_ms = Vec::new();
    for n in 0..WARM_UP + count {
        let mut transaction = pg.transaction()?;
        let event: Uuid = transaction
            .query_one("select outbox.publish_event('demo.measured', 'latency')", &[])?
            .get(0);
        let sent = Instant::now();
        transaction.commit()?;
        let acknowledged = Instant::now();
        let at = loop {
            let (id, at) = arrivals.recv_timeout(PATIENCE)??;
            if id == event {
                break at;
            }
        };
        if n >= WARM_UP {
            from_sent_ms.push(signed_ms(sent, at));
            from_acknowledged_ms.push(signed_ms(acknowledged, at));
        }
        // Lets the worker fall asleep, as it is when an event comes now and then.
        std::thread::sleep(Duration::from_millis(5));
    }
    print_quantiles("from sending COMMIT", from_sent_ms);
    print_quantiles("from its acknowledgement", from_acknowledged_ms);
    Ok(())
}

/// Sends the id and the time of each entry's arrival; first a nil id, when it is about to block.
fn consume(mut conn: Connection, arrived: &mpsc::Sender<Result<(Uuid, Instant)>>) {
    let mut read = || -> Result<()> {
        let newest: Vec<(String, HashMap<String, String>)> = cmd("XREVRANGE")
            .arg(STREAM)
            .arg("+")
            .arg("-")
            .arg("COUNT")
            .arg(1)
            .query(&mut conn)?;
        let mut last = newest.into_iter().next().map_or("0-0".to_string(), |(id, _)| id);
        arrived.send(Ok((Uuid::nil(), Instant::now())))?;
        loop {
            let reply: Reply = cmd("XREAD")
                .arg("BLOCK")
                .arg(0)
                .arg("STREAMS")
                .arg(STREAM)
                .arg(&last)
                .query(&mut conn)?;
            let at = Instant::now();
            for (id, fields) in reply.into_iter().flatten().flat_map(|(_, entries)| entries) {
                last = id;
                let event = fields.get("event_id").ok_or("an entry without event_id")?;
                arrived.send(Ok((event.parse()?, at)))?;
            }
        }
    };
    if let Err(error) = read() {
        // Nobody listens any more once main has returned.
        let _ = arrived.send(Err(error));
    }
}

fn signed_ms(from: Instant, to: Instant) -> f64 {
    let ahead = to.saturating_duration_since(from).as_secs_f64();
    let behind = from.saturating_duration_since(to).as_secs_f64();
    (ahead - behind) * 1_000.0
}

fn print_quantiles(what: &str, mut times_ms: Vec<f64>) {
    times_ms.sort_by(f64::total_cmp);
    let at = |percent: usize| {
        let rank = (times_ms.len() * percent).div_ceil(100);
        times_ms.get(rank.saturating_sub(1)).copied().unwrap_or(f64::NAN)
    };
    println!(
        "   {what:<26} p50 {:.2} ms, p99 {:.2} ms, worst {:.2} ms",
        at(50),
        at(99),
        at(100)
    );
}
