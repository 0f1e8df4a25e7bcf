//! Exactly once from a transaction of one Postgres to a transaction of another (`--end-to-end`). Sessions publish in
//! the first, by a function and by an attached table. The relay appends to the streams of a Redis. A consumer process
//! for each stream writes the effects to the second, with outbox.consume_once() in the same transaction and XACK after
//! its commit. Postmasters, the worker, Redis and consumers are killed, frozen and restarted at random. At the end,
//! ledger and effects must be the same.
//!
//! - [`publishers`] who publishes, and the ledger; [`consumer`] the other end, a process of its own
//! - [`nemesis`] what goes wrong; [`verdict`] compares both ends

pub(crate) mod consumer;
mod nemesis;
mod publishers;
mod verdict;

use std::time::{Duration, Instant};

use kit::{Postgres, Redis};

use self::consumer::Consumers;
use self::nemesis::Nemesis;
use self::publishers::Publishers;
use crate::options::Options;

/// Each stream has a consumer. All events of a key go into one stream.
const STREAMS: [&str; 3] = ["orders", "payments", "parcels"];
/// By this time after the last fault, all events must be consumed.
const DRAIN_LIMIT: Duration = Duration::from_secs(90);

struct Site {
    /// The server that publishes and relays.
    first: Postgres,
    redis: Redis,
    /// The server that consumes, without a worker: the library is not preloaded there.
    second: Postgres,
}

impl Site {
    fn start() -> Self {
        let first = Postgres::with(&[
            ("outbox_relay.redis_max_len", "0"),
            ("outbox_relay.poll_interval", "200ms"),
            ("outbox_relay.retry_max_delay", "200ms"),
            ("outbox_relay.redis_socket_timeout", "1s"),
        ]);
        let site = Site {
            first: first.start(),
            redis: Redis::persistent("always"),
            second: Postgres::with(&[("shared_preload_libraries", "")]).start(),
        };
        site.first.extension();
        site.first.exec(&format!(
            "insert into outbox.backends (name, stream_name) values ('parcels', 'parcels'); update outbox.backends set host = '127.0.0.1', port = {}",
            site.redis.port()
        ));
        site.first.exec(publishers::SCHEMA);
        site.second.extension();
        site.second.exec(consumer::SCHEMA);
        site
    }
}

/// Returns whether nothing was violated.
pub(crate) fn run(seed: u64, options: &Options) -> bool {
    let site = Site::start();
    let consumers = Consumers::start(&site, seed, options.careless);
    let publishers = Publishers::start(&site.first, options.sessions, seed);
    let mut nemesis = Nemesis::new(site, consumers, seed, options.quiet);
    nemesis.run(options.time);
    nemesis.repair();
    let (commits, thrown_out) = publishers.stop();

    let start = Instant::now();
    let mut verdict = verdict::judge(&nemesis.site);
    while !verdict.is_complete() && start.elapsed() < DRAIN_LIMIT {
        std::thread::sleep(Duration::from_millis(200));
        nemesis.consumers.revive();
        verdict = verdict::judge(&nemesis.site);
    }
    let clean = verdict.is_clean();
    println!(
        "seed {seed}: {} in {} s; {commits} commits told, publishers thrown out {thrown_out} times; {verdict}; drained in {:.1} s; faults: {}",
        if clean { "nothing violated" } else { "VIOLATED" },
        options.time.as_secs(),
        start.elapsed().as_secs_f64(),
        nemesis.told()
    );
    if !clean {
        verdict.show();
    }
    if let Some(dir) = &options.keep {
        let dir = dir.join(format!("seed-{seed}"));
        std::fs::create_dir_all(&dir).expect("a directory to keep logs in");
        for (name, log) in [
            ("first.log", nemesis.site.first.log()),
            ("second.log", nemesis.site.second.log()),
            ("redis.log", nemesis.site.redis.log()),
        ] {
            std::fs::write(dir.join(name), log).expect("a log can be kept");
        }
    }
    clean
}
