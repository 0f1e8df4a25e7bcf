//! The effect of some publishers on others: how long an event of another backend takes while one schedules, purges,
//! publishes in bulk or floods, compared with the same without; and how long queries of views take.

use crate::load::{self, Pace, Way};
use crate::options::Scale;
use crate::probe::anonymous_kb;
use crate::report::{Goal, Row, Taken, thousands};
use crate::servers::{DATA, SETTINGS, wait_long};
use crate::stats::median;
use kit::Stack;
use std::time::{Duration, Instant};

/// Events a second of the affected publishers.
pub(crate) const OTHERS_RATE: f64 = 200.0;
/// Rows of one filling transaction.
const TOGETHER: u64 = 10_000;

pub(crate) fn others() -> Way {
    Way {
        sql: "select outbox.publish_event('bench.latency', 'bench', $1::text::jsonb, backend => 'other')".to_owned(),
        stream: "other",
        adds: false,
    }
}

fn pace(scale: &Scale) -> Pace {
    Pace {
        clients: 1,
        transactions_per_second: OTHERS_RATE,
        events: 1,
        seconds: f64::from(scale.seconds).max(3.0),
    }
}

/// Two backends on one Redis.
pub(crate) fn stack(settings: &[(&str, &str)]) -> Stack {
    let stack = Stack::with(&[SETTINGS, settings].concat());
    stack.pg.exec(
        "insert into outbox.backends (name, host, port, stream_name)
         select 'other', host, port, 'other' from outbox.backends where name = 'default'",
    );
    load::run(
        &stack,
        &others(),
        Pace {
            clients: 1,
            transactions_per_second: OTHERS_RATE,
            events: 1,
            seconds: 1.0,
        },
    );
    stack
}

/// Runs `sql`, whose `$from` and `$to` are numbers, until there are this many rows.
pub(crate) fn fill(stack: &Stack, count: u64, sql: &str) {
    let mut client = stack.pg.client();
    client
        .batch_execute("set synchronous_commit to off")
        .expect("cannot set");
    let body = sql
        .replace("$from", "start")
        .replace("$to", "least(start + $each - 1, $count)");
    let sql = format!("do $do$ begin for start in 1..$count by $each loop {body}; commit; end loop; end $do$")
        .replace("$count", &count.to_string())
        .replace("$each", &TOGETHER.to_string());
    client.batch_execute(&sql).expect("cannot fill");
}

pub(crate) fn fill_events(stack: &Stack, count: u64) {
    fill(
        stack,
        count,
        &format!(
            "insert into outbox.events (event_type, source, subject, data)
             select 'bench.cost', 'bench', 'subject-' || g, {DATA} from generate_series($from, $to) g"
        ),
    );
    wait_sent(stack);
}

pub(crate) fn wait_sent(stack: &Stack) {
    wait_long(|| stack.pg.one::<i64>("select pending from outbox.status") == 0);
}

/// The others' latency alone, and while `disturb` runs.
fn beside(stack: &Stack, scale: &Scale, disturb: impl FnOnce() + Send) -> [load::Arrivals; 2] {
    let alone = load::run(stack, &others(), pace(scale));
    let disturbed = std::thread::scope(|scope| {
        scope.spawn(|| {
            std::thread::sleep(Duration::from_millis(500));
            disturb();
        });
        load::run(stack, &others(), pace(scale))
    });
    [disturbed, alone]
}

/// p50 and p99 with and without.
#[derive(Default)]
struct Figures {
    with: [Vec<f64>; 2],
    without: [Vec<f64>; 2],
}

impl Figures {
    fn take(&mut self, what: &str, [with, without]: [load::Arrivals; 2]) {
        for (index, share) in [0.5, 0.99].into_iter().enumerate() {
            self.with[index].push(with.ms(share));
            self.without[index].push(without.ms(share));
        }
        eprintln!(
            "{what}: p50 {:.2} ms, p99 {:.2} ms, longest {:.2} ms; without p50 {:.2} ms, p99 {:.2} ms, longest {:.2} ms",
            with.ms(0.5),
            with.ms(0.99),
            with.ms(1.0),
            without.ms(0.5),
            without.ms(0.99),
            without.ms(1.0)
        );
    }

    fn rows(&self, what: &str, goal: Goal) -> Vec<Row> {
        ["p50", "p99"]
            .iter()
            .enumerate()
            .map(|(index, name)| {
                Row::longer(
                    format!("another backend's {name} {what}, beside without"),
                    &self.with[index],
                    &self.without[index],
                    if index == 1 { goal } else { Goal::None },
                )
            })
            .collect()
    }

    /// The p99, compared with that of another disturbance.
    fn p99_beside(&self, floor: &Self, what: &str, goal: Goal) -> Row {
        Row::longer(
            format!("another backend's p99 {what}"),
            &self.with[1],
            &floor.with[1],
            goal,
        )
    }
}

/// Many events are scheduled for another day, some for soon, and a tenth of them become due at one moment.
pub(crate) fn measure_scheduled(scale: &Scale) -> Taken {
    let stack = stack(&[]);
    let schedule = |from: &str, to: &str, at: &str| {
        format!(
            "perform outbox.publish_event('bench.cost', 'bench', '{{}}', scheduled_at => {at})
             from generate_series({from}, {to}) g"
        )
    };
    fill(
        &stack,
        scale.events,
        &schedule("$from", "$to", "now() + interval '1 day' + g * interval '1 s'"),
    );
    stack.pg.exec("vacuum analyze outbox.scheduled_events");
    let soon = || {
        let mut client = stack.pg.client();
        for _ in 0..50 {
            client
                .batch_execute(
                    "select outbox.publish_event('bench.soon', 'bench', '{}', scheduled_at => clock_timestamp() + interval '20 ms')",
                )
                .expect("cannot schedule");
            std::thread::sleep(Duration::from_millis(40));
        }
    };
    let burst = scale.events / 10;
    let (mut waiting, mut due) = (Figures::default(), Figures::default());
    for _ in 0..scale.runs {
        waiting.take("scheduled", beside(&stack, scale, soon));
        let at = format!(
            "timestamptz '{}'",
            stack.pg.one::<String>("select (now() + interval '1 hour')::text")
        );
        fill(&stack, burst, &schedule("$from", "$to", &at));
        let [with, without] = beside(&stack, scale, || {
            stack
                .pg
                .exec("update outbox.scheduled_events set scheduled_at = clock_timestamp() where scheduled_at < now() + interval '2 hours'");
            // Once that is committed.
            stack.pg.exec("select outbox.wake()");
        });
        due.take("scheduled for one moment", [with, without]);
        wait_long(|| {
            stack.pg.one::<i64>("select count(*) from (select from outbox.scheduled_events where scheduled_at < now() + interval '2 hours' limit 1) s") == 0
        });
        wait_sent(&stack);
    }
    let mut rows = waiting.rows(
        &format!("with {} scheduled, some due", thousands(scale.events)),
        Goal::AtMost(1.5),
    );
    rows.extend(due.rows(&format!("with {} due at one moment", thousands(burst)), Goal::None));
    Taken {
        rows,
        ..Taken::default()
    }
}

/// Retained events are purged.
pub(crate) fn measure_purge(scale: &Scale) -> Taken {
    let stack = stack(&[]);
    let count = scale.events * 3;
    let (mut figures, mut rates) = (Figures::default(), Vec::new());
    for _ in 0..scale.runs {
        stack.pg.set("outbox_relay.published_retention", "7d");
        fill_events(&stack, count);
        stack.pg.exec("vacuum analyze outbox.events");
        // It continues for longer than the others are measured.
        let (mut gone, mut seconds) = (0, 0.0);
        let left = || {
            stack
                .pg
                .one::<i64>("select count(*) from outbox.events where event_type = 'bench.cost'") as u64
        };
        let both = beside(&stack, scale, || {
            let start = Instant::now();
            stack.pg.set("outbox_relay.published_retention", "0");
            std::thread::sleep(Duration::from_secs_f64(pace(scale).seconds - 0.5));
            (seconds, gone) = (start.elapsed().as_secs_f64(), count - left());
        });
        figures.take("purge", both);
        eprintln!("purge: {gone} rows in {seconds:.1} s");
        rates.push(gone as f64 / seconds);
        stack.pg.exec("call outbox.purge()");
        wait_long(|| left() == 0);
        stack.pg.exec("vacuum outbox.events");
    }
    let mut rows = figures.rows(&format!("while {} are purged", thousands(count)), Goal::AtMost(1.5));
    rows.push(Row::plain(
        "rows purged a second beside 200 events/s",
        median(&rates),
        0,
        "/s",
        Goal::None,
    ));
    Taken {
        rows,
        ..Taken::default()
    }
}

/// One transaction publishes many events. The others' latency is compared with the same without, and with the same rows
/// in a plain table: the latter is the effect of Postgres itself, because a commit waits for the WAL of others and for
/// the processor.
pub(crate) fn measure_beside_bulk(scale: &Scale) -> Taken {
    // Recycled segments of the WAL: a new one is filled with zeros first, and all commits wait for that.
    let stack = stack(&[("min_wal_size", "2GB"), ("max_wal_size", "4GB")]);
    let count = scale.events * 2 / 5;
    let publish = format!(
        "insert into outbox.events (event_type, source, data)
         select 'bench.cost', 'bench', {DATA} from generate_series(1, {count}) g"
    );
    let plain = format!(
        "insert into plain (seq, xid, created_at, event_id, branch, backend_number, event_type, source, backend, data)
         select g, pg_current_xact_id(), now(), gen_random_uuid(), 0, 1, 'bench.cost', 'bench', 'default', {DATA}
         from generate_series(1, {count}) g"
    );
    stack
        .pg
        .exec("create table plain (like outbox.events including indexes)");
    stack.pg.exec(&plain);
    stack.pg.exec("truncate plain");
    stack.pg.exec("checkpoint");
    let (mut figures, mut floor) = (Figures::default(), Figures::default());
    for _ in 0..scale.runs {
        figures.take("beside bulk", beside(&stack, scale, || stack.pg.exec(&publish)));
        wait_sent(&stack);
        floor.take("beside a plain bulk", beside(&stack, scale, || stack.pg.exec(&plain)));
        stack.pg.exec("truncate plain");
    }
    let what = format!("while another publishes {} in one transaction", thousands(count));
    let mut rows = figures.rows(&what, Goal::AtMost(1.5));
    rows.push(figures.p99_beside(
        &floor,
        &format!("{what}, beside the same into a plain table"),
        Goal::AtMost(1.5),
    ));
    Taken {
        rows,
        ..Taken::default()
    }
}

/// Many events wait behind one that Redis refuses, and follow it; many streams are refused.
pub(crate) fn measure_refused(scale: &Scale) -> Taken {
    let stack = stack(&[
        ("outbox_relay.retry_delay", "2s"),
        ("outbox_relay.retry_max_delay", "2s"),
        ("outbox_relay.retry_backoff", "off"),
        ("outbox_relay.max_retries", "1000"),
    ]);
    let count = scale.events / 10;
    let waiting = "select count(*) from outbox.refused_events where accepted_in is null";
    let (mut parking, mut following, mut streams) = (Figures::default(), Figures::default(), Figures::default());
    let (mut rates, mut memory) = (Vec::new(), Vec::new());
    let before = anonymous_kb(stack.pg.wait_worker("postgres"));
    for run in 0..scale.runs {
        let publish = |name: &str| {
            stack.pg.exec(&format!(
                "insert into outbox.events (event_type, source, stream, data)
                 select 'bench.cost', 'bench', {name}, {DATA} from generate_series(1, {count}) g"
            ));
        };
        stack.redis.call(&["SET", "bad", "a string"]);
        let both = beside(&stack, scale, || publish("'bad'"));
        parking.take("parking", both);
        wait_long(|| stack.pg.one::<i64>(waiting) == count as i64);
        let mut took = 0.0;
        let both = beside(&stack, scale, || {
            stack.redis.call(&["DEL", "bad"]);
            wait_long(|| stack.redis.xlen("bad") > 0);
            let start = Instant::now();
            wait_long(|| stack.pg.one::<i64>(waiting) == 0);
            took = start.elapsed().as_secs_f64();
        });
        following.take("following", both);
        rates.push(count as f64 / took);
        stack.redis.call(&["DEL", "bad"]);
        eprintln!("refused: {:.0}/s follow", rates[run]);
        let keys: Vec<String> = (1..=count).map(|n| format!("bad{n}")).collect();
        for some in keys.chunks(10_000) {
            let mut pipe = redis::pipe();
            for key in some {
                pipe.set(key, "a string").ignore();
            }
            pipe.query::<()>(&mut stack.redis.conn()).expect("SET");
        }
        publish("'bad' || g");
        wait_long(|| stack.pg.one::<i64>(waiting) == count as i64);
        streams.take("refused streams", beside(&stack, scale, || ()));
        memory.push(anonymous_kb(stack.pg.wait_worker("postgres")).saturating_sub(before) as f64 / 1024.0);
        stack.redis.call(&["FLUSHALL"]);
        wait_long(|| stack.pg.one::<i64>(waiting) == 0);
        wait_sent(&stack);
    }
    let of = thousands(count);
    let mut rows = parking.rows(&format!("while {of} come behind one refused"), Goal::AtMost(1.5));
    rows.extend(following.rows(&format!("while {of} follow one that was mended"), Goal::None));
    rows.push(Row::plain(
        format!("{of} that follow one that was mended"),
        median(&rates),
        0,
        "/s",
        Goal::None,
    ));
    rows.extend(streams.rows(&format!("with {of} refused streams"), Goal::AtMost(1.5)));
    rows.push(Row::plain(
        format!("worker's memory above idle, {of} refused streams"),
        median(&memory),
        1,
        " MiB",
        Goal::None,
    ));
    Taken {
        rows,
        ..Taken::default()
    }
}

/// Queries for some events among many retained ones.
pub(crate) fn measure_looking(scale: &Scale) -> Taken {
    let stack = stack(&[]);
    let count = scale.events * 5;
    fill_events(&stack, count);
    stack
        .pg
        .exec("update outbox.backends set enabled = false where name = 'other'");
    stack
        .pg
        .exec("select outbox.publish_event('bench.cost', 'bench', backend => 'other') from generate_series(1, 100)");
    stack.pg.exec("vacuum analyze outbox.events");
    let rows = [
        ("status = 'failed'", "where status = 'failed'"),
        ("status = 'pending'", "where status = 'pending'"),
        ("the latest 20", "order by created_at desc limit 20"),
        (
            "the latest 20 published",
            "where status = 'published' order by created_at desc limit 20",
        ),
        (
            "one subject of the last minute",
            "where subject = 'subject-7' and created_at > now() - interval '1 min'",
        ),
        ("one subject of all time", "where subject = 'subject-7'"),
        (
            "one event_id",
            "where event_id = (select event_id from outbox.events limit 1)",
        ),
    ];
    let rows = rows.iter().map(|(name, condition)| {
        let mut client = stack.pg.client();
        let times: Vec<f64> = (0..scale.runs + 1)
            .map(|_| {
                let start = Instant::now();
                client
                    .query(&format!("select * from outbox.event_status {condition}"), &[])
                    .expect("cannot look");
                start.elapsed().as_secs_f64() * 1_000.0
            })
            .collect();
        // The first warms up.
        let ms = median(&times[1..]);
        eprintln!("looking: {name} in {ms:.1} ms (first {:.1} ms)", times[0]);
        let goal = if name.contains("subject") {
            Goal::None
        } else {
            Goal::AtMost(50.0)
        };
        Row::plain(
            format!("event_status, {name}, of {} retained", thousands(count)),
            ms,
            1,
            " ms",
            goal,
        )
    });
    Taken {
        rows: rows.collect(),
        ..Taken::default()
    }
}
