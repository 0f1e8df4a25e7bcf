//! Publishers at a steady pace, and a consumer blocked in XREAD: how long each event takes from sending COMMIT to its
//! arrival.

use crate::bare;
use crate::stats::quantile;
use kit::Stack;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// How events are published: a statement whose parameter $1 is the payload as text, and the stream in which they
/// arrive.
#[derive(Clone)]
pub(crate) struct Way {
    pub sql: String,
    pub stream: &'static str,
    /// XADDs itself after the commit.
    pub adds: bool,
}

impl Way {
    pub(crate) fn ours() -> Self {
        Self {
            sql: "select outbox.publish_event('bench.latency', 'bench', $1::text::jsonb)".to_owned(),
            stream: "events",
            adds: false,
        }
    }

    /// An application that commits a bare INSERT and then XADDs the same entry (see [`bare::TABLE`]).
    pub(crate) fn by_itself() -> Self {
        Self {
            sql: "insert into bare (event_type, source, data) values ('bench.latency', 'bench', $1::text::json)"
                .to_owned(),
            stream: "floor",
            adds: true,
        }
    }
}

/// What is published, and how fast.
#[derive(Clone, Copy)]
pub(crate) struct Pace {
    pub clients: usize,
    /// Of all clients together.
    pub transactions_per_second: f64,
    /// In one transaction.
    pub events: usize,
    pub seconds: f64,
}

impl Pace {
    fn transactions(&self) -> usize {
        (self.transactions_per_second * self.seconds / self.clients as f64) as usize * self.clients
    }
}

/// When each event's commit was sent (seconds from the start), and how long it took to arrive.
pub(crate) struct Arrivals {
    pub times: Vec<(f64, f64)>,
}

impl Arrivals {
    pub(crate) fn ms(&self, share: f64) -> f64 {
        quantile(&self.times.iter().map(|t| t.1).collect::<Vec<_>>(), share)
    }
}

const NEVER: u64 = 0;
/// The first of so many parts are left out: connections warm up.
const WARM_UP_PART: usize = 20;

/// How long that is in a run of so many seconds.
pub(crate) fn warm_up(seconds: f64) -> Duration {
    Duration::from_secs_f64(seconds / WARM_UP_PART as f64)
}

pub(crate) fn run(stack: &Stack, way: &Way, pace: Pace) -> Arrivals {
    let events = pace.transactions() * pace.events;
    let slots = || (0..events).map(|_| AtomicU64::new(NEVER)).collect::<Vec<_>>();
    // Nanoseconds from the start.
    let (sent, arrived) = (slots(), slots());
    let (start, published) = (Instant::now() + Duration::from_millis(200), AtomicBool::new(false));
    let last = last_id(stack, way.stream);
    std::thread::scope(|scope| {
        scope.spawn(|| consume(stack, way.stream, last, start, &arrived, &published));
        let clients: Vec<_> = (0..pace.clients)
            .map(|client| {
                let sent = &sent;
                scope.spawn(move || publish(stack, way, pace, client, start, sent))
            })
            .collect();
        for client in clients {
            client.join().expect("a publisher has panicked");
        }
        published.store(true, Ordering::SeqCst);
    });
    let lost = arrived.iter().filter(|at| at.load(Ordering::SeqCst) == NEVER).count();
    assert_eq!(lost, 0, "events that never arrived, of {events}");
    let seconds = |slot: &AtomicU64| slot.load(Ordering::SeqCst) as f64 / 1e9;
    let times = sent.iter().zip(&arrived).map(|(sent, arrived)| {
        // The entry of the comparison may arrive before the clock was read.
        let took = (seconds(arrived) - seconds(sent)).max(0.0);
        (seconds(sent), took * 1_000.0)
    });
    let mut times: Vec<_> = times.collect();
    times.sort_by(|a, b| a.0.total_cmp(&b.0));
    times.drain(..events / WARM_UP_PART);
    Arrivals { times }
}

fn publish(stack: &Stack, way: &Way, pace: Pace, client: usize, start: Instant, sent: &[AtomicU64]) {
    let (mut session, mut conn) = (stack.pg.client(), stack.redis.conn());
    let statement = session.prepare(&way.sql).expect("cannot prepare");
    for turn in (client..pace.transactions()).step_by(pace.clients) {
        let due = start + Duration::from_secs_f64(turn as f64 / pace.transactions_per_second);
        if let Some(wait) = due.checked_duration_since(Instant::now()) {
            std::thread::sleep(wait);
        }
        let mut transaction = session.transaction().expect("begin");
        let numbers = turn * pace.events..(turn + 1) * pace.events;
        for n in numbers.clone() {
            transaction
                .execute(&statement, &[&bare::data(n)])
                .expect("cannot publish");
        }
        let at = Instant::now().saturating_duration_since(start).as_nanos() as u64;
        for n in numbers.clone() {
            sent[n].store(at, Ordering::SeqCst);
        }
        transaction.commit().expect("commit");
        if way.adds {
            for n in numbers {
                add(&mut conn, way.stream, &bare::data(n));
            }
        }
    }
}

/// The entry that the relay would append.
fn add(conn: &mut redis::Connection, stream: &str, data: &str) {
    let (id, time) = (
        "01a209bb-302f-746e-bb1c-b5eca618182a",
        "2026-01-31T23:59:58.123456+00:00",
    );
    let cloud_event = format!(
        r#"{{"specversion": "1.0", "type": "bench.latency", "source": "bench", "id": "{id}", "time": "{time}", "datacontenttype": "application/json", "data": {data}}}"#
    );
    let _: String = redis::cmd("XADD")
        .arg(&[stream, "MAXLEN", "~", "10000", "*", "event_id", id])
        .arg(&["event_type", "bench.latency", "source", "bench", "timestamp", time])
        .arg(&["cloud_event", &cloud_event])
        .query(conn)
        .expect("XADD");
}

type Entries = Vec<(String, Vec<(String, Vec<String>)>)>;

fn last_id(stack: &Stack, stream: &str) -> String {
    let newest: Vec<(String, Vec<String>)> = redis::cmd("XREVRANGE")
        .arg(stream)
        .arg(&["+", "-", "COUNT", "1"])
        .query(&mut stack.redis.conn())
        .expect("XREVRANGE");
    newest.into_iter().next().map_or("0-0".to_owned(), |(id, _)| id)
}

/// Records when each event has arrived, until all have, or no more arrive.
fn consume(
    stack: &Stack,
    stream: &str,
    mut last: String,
    start: Instant,
    arrived: &[AtomicU64],
    published: &AtomicBool,
) {
    let mut conn = stack.redis.conn();
    let (mut left, mut silent_since) = (arrived.len(), Instant::now());
    while left > 0 {
        let reply: Option<Entries> = redis::cmd("XREAD")
            .arg(&["COUNT", "1000", "BLOCK", "500", "STREAMS", stream, &last])
            .query(&mut conn)
            .expect("XREAD");
        let at = Instant::now().saturating_duration_since(start).as_nanos() as u64;
        let Some(streams) = reply else {
            if published.load(Ordering::SeqCst) && silent_since.elapsed() > Duration::from_secs(20) {
                return;
            }
            continue;
        };
        silent_since = Instant::now();
        for (id, fields) in streams.into_iter().flat_map(|(_, entries)| entries) {
            last = id;
            let number = fields.iter().find_map(|field| number(field));
            // Events of an earlier run have numbers, too, but arrived before.
            if let Some(slot) = number.and_then(|n| arrived.get(n))
                && slot
                    .compare_exchange(NEVER, at.max(1), Ordering::SeqCst, Ordering::SeqCst)
                    .is_ok()
            {
                left -= 1;
            }
        }
    }
}

/// The `n` of a payload somewhere in a text.
fn number(text: &str) -> Option<usize> {
    let (_, behind) = text.rsplit_once("\"n\":")?;
    let behind = behind.trim_start();
    let digits = behind.find(|c: char| !c.is_ascii_digit()).unwrap_or(behind.len());
    behind[..digits].parse::<usize>().ok()?.checked_sub(1_000_000)
}
