//! A bystander, who should not notice what others do: publishes to a backend of its own, and measures how long its
//! events took, and what the worker occupied meanwhile.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use crate::postgres::{DB, USER};
use crate::process::Usage;
use crate::{Stack, wait_until};

/// The bystander's backend, and its stream.
const NAME: &str = "bystander";
const PAUSE: Duration = Duration::from_millis(5);

/// Publishes an event each few milliseconds.
#[derive(Debug)]
pub struct Bystander {
    stop: Arc<AtomicBool>,
    idle: Usage,
    thread: JoinHandle<(usize, Usage)>,
}

/// What a bystander has noticed.
#[derive(Debug)]
pub struct Noticed {
    /// In milliseconds, from publishing to Redis's clock: sorted.
    delays: Vec<i64>,
    /// What the worker occupied before, and the most that it occupied.
    idle: Usage,
    most: Usage,
}

impl Bystander {
    /// Creates the backend, in the stack's Redis, and begins once its events arrive.
    #[track_caller]
    pub fn start(stack: &Stack) -> Self {
        let port = stack.redis.port();
        stack.pg.exec(&format!(
            "insert into outbox.backends (name, host, port, stream_name, max_len) values ('{NAME}', '127.0.0.1', {port}, '{NAME}', 0)
                on conflict do nothing"
        ));
        let publish = format!("select outbox.publish_event('event', 'kit', backend => '{NAME}')");
        stack.pg.exec(&publish);
        wait_until("the bystander's first event", || stack.redis.xlen(NAME) > 0);
        stack.redis.call(&["DEL", NAME]);
        let stop = Arc::new(AtomicBool::new(false));
        let (stopped, config) = (Arc::clone(&stop), stack.pg.config(USER, DB));
        let worker = stack.pg.wait_worker(DB);
        let idle = Usage::of(worker).expect("the worker lives");
        let thread = std::thread::spawn(move || {
            let mut client = config.connect(::postgres::NoTls).expect("a session");
            let (mut count, mut most) = (0, idle);
            while !stopped.load(Ordering::Relaxed) {
                client.batch_execute(&publish).expect("published");
                count += 1;
                // Of another worker, if there is one, nothing is known.
                most = Usage::of(worker).map_or(most, |usage| usage.max(most));
                std::thread::sleep(PAUSE);
            }
            (count, most)
        });
        Bystander { stop, idle, thread }
    }

    /// What it noticed, once all its events have arrived.
    #[track_caller]
    pub fn stop(self, stack: &Stack) -> Noticed {
        self.stop.store(true, Ordering::Relaxed);
        let (count, most) = self.thread.join().expect("the bystander published");
        let entries = stack.redis.wait_entries(NAME, count);
        assert_eq!(entries.len(), count, "each event once");
        let delay_ms = |entry: &crate::Entry| -> i64 {
            let published = chrono::DateTime::parse_from_rfc3339(entry.field("timestamp")).expect("a time");
            let arrived: i64 = entry
                .id
                .split('-')
                .next()
                .expect("an id")
                .parse()
                .expect("milliseconds");
            arrived - published.timestamp_millis()
        };
        let mut delays: Vec<i64> = entries.iter().map(delay_ms).collect();
        delays.sort_unstable();
        stack.redis.call(&["DEL", NAME]);
        let idle = self.idle;
        Noticed { delays, idle, most }
    }
}

/// The median of a bystander's delays while `act` runs, which must not disturb it.
#[track_caller]
pub fn median_beside(stack: &Stack, what: &str, act: impl FnOnce()) -> Duration {
    let bystander = Bystander::start(stack);
    act();
    let noticed = bystander.stop(stack);
    noticed.assert_undisturbed(what);
    noticed.quantile(0.5)
}

impl Noticed {
    /// The delay that this share of the events did not exceed.
    pub fn quantile(&self, share: f64) -> Duration {
        let index = (self.delays.len() as f64 * share) as usize;
        Duration::from_millis(self.delays[index.min(self.delays.len() - 1)].max(0) as u64)
    }

    /// An event that is delayed by a lock, a flood or a failure is usually seconds late. A busy machine delays less,
    /// and a very busy one a few events by more than a second.
    #[track_caller]
    pub fn assert_undisturbed(&self, by: &str) {
        let [median, most] = [0.5, 0.99].map(|share| self.quantile(share));
        println!(
            "{by}: {} events, median {median:?}, p99 {most:?}; worker +{} KiB, +{} descriptors, +{} threads",
            self.delays.len(),
            self.grown_kb(),
            self.most.descriptors - self.idle.descriptors,
            self.most.threads - self.idle.threads,
        );
        assert!(
            median < Duration::from_millis(800) && most < Duration::from_secs(3),
            "{by}: p99 {most:?}, median {median:?}"
        );
    }

    /// The same, and the worker has not grown much, whatever servers have said to it.
    #[track_caller]
    pub fn assert_harmless(&self, by: &str) {
        self.assert_undisturbed(by);
        let (idle, most) = (self.idle, self.most);
        assert!(self.grown_kb() < 32 * 1_024, "{by}: {idle:?}, {most:?}");
        assert!(most.descriptors < idle.descriptors + 150, "{by}: {idle:?}, {most:?}");
        assert!(most.threads < idle.threads + 100, "{by}: {idle:?}, {most:?}");
    }

    /// How much more memory the worker had at most.
    pub fn grown_kb(&self) -> u64 {
        self.most.memory_kb - self.idle.memory_kb
    }
}
