//! Other ways from a table to a Redis stream, each with its own table and process: their rates and latencies.
//!
//! `scripts/rivals` installs them into a temporary directory and lists them in the environment.

use crate::bare::data;
use crate::latency::distribution;
use crate::load::{self, Arrivals, Pace, Way};
use crate::options::Scale;
use crate::probe::{Progress, added};
use crate::report::{Goal, Row, Series, Taken};
use crate::servers::{Backlog, DATA, DEFAULT, SETTINGS, stack, wait_long};
use crate::stats::median;
use kit::{Postgres, Redis, Stack};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

struct Rival {
    name: &'static str,
    /// In `benches/rivals`.
    script: &'static str,
    /// In the environment, if it is there.
    needs: &'static str,
    /// The others' number of pending events divided by this.
    share: u64,
    /// Whether it reads the WAL, through TCP.
    decodes: bool,
    /// Publishes the events `g` of a range.
    fill: fn(u64, u64) -> String,
    publish: &'static str,
}

const RIVALS: [Rival; 4] = [
    Rival {
        name: "a SKIP LOCKED loop",
        script: "skip_locked.py",
        needs: "OUTBOX_BENCH_PYTHON",
        share: 1,
        decodes: false,
        fill: |first, last| {
            format!("insert into hand_outbox (event_type, source, data) select 'bench.drain', 'bench', {DATA} from generate_series({first}, {last}) g")
        },
        publish: "insert into hand_outbox (event_type, source, data) values ('bench.latency', 'bench', $1::text::json)",
    },
    Rival {
        name: "PgQ 3.5",
        script: "pgq_consumer.py",
        needs: "OUTBOX_BENCH_PGQ",
        share: 1,
        decodes: false,
        fill: |first, last| {
            format!("select pgq.insert_event('outbox', 'bench.drain', {DATA}::text) from generate_series({first}, {last}) g; select pgq.ticker('outbox')")
        },
        publish: "select pgq.insert_event('outbox', 'bench.latency', $1::text)",
    },
    Rival {
        name: "django-broadcaster 0.1.1",
        script: "broadcaster.py",
        needs: "OUTBOX_BENCH_PYTHON",
        share: 50,
        decodes: false,
        fill: |first, last| {
            format!("insert into outbox_events (id, spec_version, event_type, source, subject, data_content_type, data_schema, data, status,
                     created_at, updated_at, scheduled_at, retry_count, max_retries, last_error, publisher_backend, publisher_config)
                     select gen_random_uuid(), '1.0', 'bench.drain', 'bench', '', 'application/json', '', {DATA}::jsonb, 'pending',
                     clock_timestamp(), now(), now(), 0, 3, '', '', '{{}}' from generate_series({first}, {last}) g")
        },
        publish: "insert into outbox_events (id, spec_version, event_type, source, subject, data_content_type, data_schema, data, status,
                  created_at, updated_at, scheduled_at, retry_count, max_retries, last_error, publisher_backend, publisher_config)
                  values (gen_random_uuid(), '1.0', 'bench.latency', 'bench', '', 'application/json', '', $1::text::jsonb, 'pending',
                  clock_timestamp(), now(), now(), 0, 3, '', '', '{}')",
    },
    Rival {
        name: "Debezium 3.6",
        script: "debezium.py",
        needs: "OUTBOX_BENCH_DEBEZIUM",
        share: 1,
        decodes: true,
        fill: |first, last| {
            format!("insert into outbox (type, payload) select 'bench.drain', {DATA} from generate_series({first}, {last}) g")
        },
        publish: "insert into outbox (type, payload) values ('bench.latency', $1::text::json)",
    },
];

const PACE: Pace = Pace {
    clients: 1,
    transactions_per_second: 50.0,
    events: 1,
    seconds: 0.0,
};

pub(crate) fn measure(scale: &Scale) -> Taken {
    let (ours, quiet) = (Backlog::of(scale.rival_events, false), stack());
    let pace = Pace {
        seconds: f64::from(scale.seconds).max(1.0),
        ..PACE
    };
    let mut taken = Taken::default();
    for rival in &RIVALS {
        let what = format!("beside {}", rival.name);
        if std::env::var_os(rival.needs).is_none() {
            taken.rows.push(Row::missing(what, "could not be installed here"));
            continue;
        }
        let (mut rates, mut ours_rates) = (Vec::new(), Vec::new());
        let (mut times, mut ours_times) = (Vec::new(), Vec::new());
        for run in 1..=scale.runs {
            let stack = rival.stack();
            rates.push(rival.drain(&stack, scale.rival_events / rival.share));
            ours_rates.push(ours.drain(DEFAULT).rate());
            times.push(rival.latency(&stack, pace));
            ours_times.push(load::run(&quiet, &Way::ours(), pace));
            eprintln!(
                "rivals {run}: {:.0}/s, p50 {:.2} ms, p99 {:.2} ms, {}",
                rates[run - 1],
                times[run - 1].ms(0.5),
                times[run - 1].ms(0.99),
                rival.name
            );
        }
        taken.rows.push(Row::rate(
            format!("drain at default settings {what}"),
            &ours_rates,
            &rates,
            Goal::None,
        ));
        for (name, share) in [("p50", 0.5), ("p99", 0.99)] {
            let of = |runs: &[Arrivals]| runs.iter().map(|r| r.ms(share)).collect::<Vec<_>>();
            taken.rows.push(Row::longer(
                format!("commit to consumer at 50/s, {name}, {what}"),
                &of(&ours_times),
                &of(&times),
                Goal::None,
            ));
        }
        let all: Vec<f64> = times.iter().flat_map(|r| r.times.iter().map(|t| t.1)).collect();
        for (figure, points) in [("drain", vec![(0.0, median(&rates))]), ("latency", distribution(&all))] {
            taken.series.push(Series {
                name: format!("{}, {figure}", rival.name),
                points,
            });
        }
    }
    taken
}

impl Rival {
    /// Servers with this rival's table.
    fn stack(&self) -> Stack {
        let stack = match self.decodes {
            false => stack(),
            true => {
                let settings = [SETTINGS, &[("wal_level", "logical")]].concat();
                Stack::of(Postgres::with(&settings).tcp(), Redis::start())
            }
        };
        // Its rows are updated or deleted, so it needs vacuum.
        stack.pg.set("autovacuum", "on");
        stack.pg.set("outbox_relay.enabled", "off");
        let status = self.command(&stack, "setup").status().expect("python");
        assert!(status.success(), "{} cannot make its table", self.name);
        // So that the stream can be read before it has entries.
        stack
            .redis
            .call(&["XGROUP", "CREATE", "events", "nobody", "0", "MKSTREAM"]);
        stack
    }

    fn command(&self, stack: &Stack, what: &str) -> Command {
        let python = std::env::var_os("OUTBOX_BENCH_PYTHON").expect("there is one");
        let mut command = Command::new(python);
        command
            .arg(format!("benches/rivals/{}", self.script))
            .arg(what)
            .env("PGHOST", stack.pg.host())
            .env("PGPORT", stack.pg.port().to_string())
            .env("PGUSER", kit::postgres::USER)
            .env("PGDATABASE", kit::postgres::DB)
            .env("REDIS_PORT", stack.redis.port().to_string())
            .env("PYTHONDONTWRITEBYTECODE", "1");
        command
    }

    fn start(&self, stack: &Stack) -> Relay {
        let child = self
            .command(stack, "relay")
            .stdin(Stdio::null())
            .spawn()
            .expect("python");
        Relay(child)
    }

    /// Events a second from the first one that it appends.
    fn drain(&self, stack: &Stack, events: u64) -> f64 {
        let mut client = stack.pg.client();
        for first in (1..=events).step_by(1_000) {
            let last = (first + 999).min(events);
            // Each statement in its own transaction.
            for statement in (self.fill)(first, last).split("; ") {
                client.batch_execute(statement).expect("cannot fill a rival's table");
            }
        }
        client.batch_execute("vacuum analyze").expect("cannot settle");
        let mut conn = stack.redis.conn();
        let _relay = self.start(stack);
        let interval = Duration::from_millis(10);
        Progress::watch(&mut conn, &["events".to_owned()], events, interval, |_| {}).rate()
    }

    /// At a steady pace, after vacuuming the rows that the drain has left.
    fn latency(&self, stack: &Stack, pace: Pace) -> Arrivals {
        stack.pg.exec("vacuum analyze");
        let _relay = self.start(stack);
        let (mut conn, streams) = (stack.redis.conn(), ["events".to_owned()]);
        let before = added(&mut conn, &streams);
        let mut client = stack.pg.client();
        client
            .execute(self.publish, &[&data(0)])
            .expect("cannot publish to a rival");
        // It takes a while to start.
        wait_long(|| added(&mut conn, &streams) > before);
        let way = Way {
            sql: self.publish.to_owned(),
            stream: "events",
            adds: false,
        };
        load::run(stack, &way, pace)
    }
}

/// A rival's process; ends with its value.
struct Relay(Child);

impl Drop for Relay {
    fn drop(&mut self) {
        // It holds no state that matters.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}
