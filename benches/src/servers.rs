//! Servers as a user would run them, and a backlog that can be drained repeatedly.

use crate::probe::{Busy, Progress, anonymous_kb, written};
use kit::{Stack, wait_until};
use std::time::{Duration, Instant};

/// 200 bytes of JSON for the event number `g`.
pub(crate) const DATA: &str = "json_build_object('n', 1000000 + g, 'pad', repeat('x', 174))";
/// How many events of a backlog were published in one transaction.
const IN_ONE_TRANSACTION: u64 = 1_000;

pub(crate) const STREAMS: usize = 10;
pub(crate) const BACKENDS: usize = 5;

/// Durable, with room for the load.
pub(crate) const SETTINGS: &[(&str, &str)] = &[
    ("fsync", "on"),
    ("shared_buffers", "512MB"),
    ("max_wal_size", "16GB"),
    ("checkpoint_timeout", "1h"),
    ("autovacuum", "off"),
];

pub(crate) fn stack() -> Stack {
    Stack::with(SETTINGS)
}

/// Pending events, all for one stream or spread over several streams and backends. The rows stay after a drain, and the
/// relay is made to forget that it has sent them.
pub(crate) struct Backlog {
    pub stack: Stack,
    pub events: u64,
    spread: bool,
}

/// How a backlog is drained.
#[derive(Clone, Copy)]
pub(crate) struct Way {
    pub delivery: &'static str,
    pub batch_size: u32,
}

/// The defaults of an installation.
pub(crate) const DEFAULT: Way = Way {
    delivery: "exactly_once",
    batch_size: 100,
};

/// The result of one drain.
pub(crate) struct Drain {
    pub progress: Progress,
    /// Processor time of the worker's main thread and of its senders, in microseconds for each event.
    pub reader_us: f64,
    pub sender_us: f64,
    /// Bytes of WAL an event.
    pub wal: f64,
    /// The most private memory that the worker had.
    pub memory_kb: u64,
}

impl Drain {
    pub(crate) fn rate(&self) -> f64 {
        self.progress.rate()
    }
}

impl Backlog {
    pub(crate) fn of(events: u64, spread: bool) -> Self {
        let mut backlog = Self {
            stack: stack(),
            events: 0,
            spread,
        };
        if spread {
            backlog.stack.pg.exec(&format!(
                "insert into outbox.backends (name, host, port)
                 select 'b' || n, host, port from outbox.backends, generate_series(0, {}) n where name = 'default'",
                BACKENDS - 1
            ));
        }
        backlog.grow(events);
        backlog
    }

    /// Publishes until there are this many events.
    pub(crate) fn grow(&mut self, events: u64) {
        self.stop();
        let (backend, stream) = match self.spread {
            true => (format!("'b' || g % {BACKENDS}"), format!("'s' || g % {STREAMS}")),
            false => ("'default'".to_owned(), "null".to_owned()),
        };
        let fill = |first: u64, last: u64| {
            let sql = format!(
                "do $$ begin for start in {first}..{last} by {IN_ONE_TRANSACTION} loop
                     insert into outbox.events (event_type, source, backend, stream, data)
                     select 'bench.drain', 'bench', {backend}, {stream}, {DATA}
                     from generate_series(start, least(start + {IN_ONE_TRANSACTION} - 1, {last})) g;
                     commit;
                 end loop; end $$"
            );
            let mut client = self.stack.pg.client();
            client
                .batch_execute("set synchronous_commit to off")
                .expect("cannot set");
            client.batch_execute(&sql).expect("cannot fill the outbox");
        };
        let middle = (self.events + events) / 2;
        std::thread::scope(|scope| {
            scope.spawn(|| fill(self.events + 1, middle));
            scope.spawn(|| fill(middle + 1, events));
        });
        self.events = events;
        let mut client = self.stack.pg.client();
        for settle in ["vacuum (analyze) outbox.events", "checkpoint"] {
            client.batch_execute(settle).expect("cannot settle");
        }
    }

    /// Drains all of it, with a worker that starts anew and has sent nothing. The measurement begins with the first
    /// XADD.
    pub(crate) fn drain(&self, way: Way) -> Drain {
        let pg = &self.stack.pg;
        self.stop();
        pg.exec(&format!(
            "delete from outbox.cursors; delete from outbox.ticks;
             update outbox.backends set delivery = '{}'",
            way.delivery
        ));
        pg.set("outbox_relay.batch_size", &way.batch_size.to_string());
        self.stack.redis.call(&["FLUSHALL"]);
        let mut conn = self.stack.redis.conn();
        let streams = self.streams();
        for stream in &streams {
            // So that the stream can be read before it has entries.
            self.stack
                .redis
                .call(&["XGROUP", "CREATE", stream, "nobody", "0", "MKSTREAM"]);
        }
        let wal = written(pg);
        pg.set("outbox_relay.enabled", "on");
        let pid = pg.wait_worker("postgres");
        let mut memory_kb = 0;
        let mut before: Option<(Busy, u64)> = None;
        let interval = match self.events {
            0..100_000 => Duration::from_millis(2),
            _ => Duration::from_millis(10),
        };
        let progress = Progress::watch(&mut conn, &streams, self.events, interval, |done| {
            if done > 0 && before.is_none() {
                before = Some((Busy::of(pid), done));
            }
            // Reading it visits all pages of the process.
            if self.events >= 1_000_000 {
                memory_kb = memory_kb.max(anonymous_kb(pid));
            }
        });
        let (busy, (before, already)) = (Busy::of(pid), before.expect("the first entries were seen"));
        let counted = (self.events - already) as f64;
        wait_until("the cursors to be saved", || {
            pg.one::<i64>("select pending from outbox.status") == 0
        });
        Drain {
            progress,
            reader_us: (busy.reader - before.reader) * 1e6 / counted,
            sender_us: (busy.senders - before.senders) * 1e6 / counted,
            wal: (written(pg) - wal) as f64 / self.events as f64,
            memory_kb: memory_kb.max(anonymous_kb(pid)),
        }
    }

    fn streams(&self) -> Vec<String> {
        match self.spread {
            true => (0..STREAMS).map(|n| format!("s{n}")).collect(),
            false => vec!["events".to_owned()],
        }
    }

    /// Without a worker, nothing reads the state or overwrites it.
    fn stop(&self) {
        self.stack.pg.set("outbox_relay.enabled", "off");
        wait_until("the worker to leave", || self.stack.pg.worker_pid("postgres").is_none());
    }

    /// The fields of one of its entries.
    pub(crate) fn one_entry(&self) -> Vec<String> {
        let newest: Vec<(String, Vec<String>)> = redis::cmd("XREVRANGE")
            .arg(&self.streams()[0])
            .arg("+")
            .arg("-")
            .arg("COUNT")
            .arg(1)
            .query(&mut self.stack.redis.conn())
            .expect("no entry");
        newest.into_iter().next().expect("no entry").1
    }
}

/// Waits for something to happen, for a long time, without disturbing it much.
pub(crate) fn wait_long(mut done: impl FnMut() -> bool) {
    let start = Instant::now();
    while !done() {
        assert!(start.elapsed() < Duration::from_secs(600), "waited ten minutes in vain");
        std::thread::sleep(Duration::from_millis(5));
    }
}
