//! The effect of events on other publishers, and for how long: many that fall due at one moment, or that fail. The
//! others' latency is measured only during that. What administrators do is in [`admin`](crate::admin).

use crate::load::{self, Arrivals, Pace};
use crate::options::Scale;
use crate::others::{OTHERS_RATE, fill, others, stack, wait_sent};
use crate::probe::{anonymous_kb, most_anonymous_kb};
use crate::report::{Goal, Row, Taken, thousands};
use crate::servers::{DATA, wait_long};
use crate::stats::quantile;
use kit::Stack;
use std::sync::Mutex;
use std::time::{Duration, Instant};

/// The result of one task.
struct Act {
    seconds: f64,
    /// p50 and p99 of the others, in milliseconds: during the task, and alone.
    during: [f64; 2],
    alone: [f64; 2],
    memory_mb: f64,
}

fn shares(arrivals: &Arrivals, from: f64, until: f64) -> [f64; 2] {
    let times = arrivals.times.iter().filter(|(at, _)| (from..until).contains(at));
    let times: Vec<f64> = times.map(|t| t.1).collect();
    [0.5, 0.99].map(|share| quantile(&times, share))
}

/// `act` begins half a second after the others have warmed up, which publish for this time, and returns when all its
/// effects are done.
fn during(stack: &Stack, seconds: f64, what: &str, act: impl FnOnce() + Send) -> Act {
    let pace = |seconds: f64| Pace {
        clients: 1,
        transactions_per_second: OTHERS_RATE,
        events: 1,
        seconds,
    };
    let worker = stack.pg.wait_worker("postgres");
    let before = anonymous_kb(worker);
    let alone = shares(&load::run(stack, &others(), pace(5.0)), 0.0, f64::MAX);
    let times = Mutex::new(None);
    let start = Instant::now() + Duration::from_millis(200);
    let (arrivals, most) = std::thread::scope(|scope| {
        scope.spawn(|| {
            std::thread::sleep(load::warm_up(seconds) + Duration::from_millis(500));
            let begin = start.elapsed().as_secs_f64();
            act();
            *times.lock().expect("no panic") = Some((begin, start.elapsed().as_secs_f64()));
        });
        let most = scope.spawn(|| most_anonymous_kb(worker, || times.lock().expect("no panic").is_some()));
        let arrivals = load::run(stack, &others(), pace(seconds));
        (arrivals, most.join().expect("no panic"))
    });
    let (begin, end) = times.into_inner().expect("no panic").expect("it has ended");
    let act = Act {
        seconds: end - begin,
        during: shares(&arrivals, begin, end),
        alone,
        memory_mb: most.saturating_sub(before) as f64 / 1024.0,
    };
    eprintln!(
        "{what}: {:.1} s; others p50 {:.2} ms, p99 {:.2} ms; alone p50 {:.2} ms, p99 {:.2} ms; worker's memory +{:.1} MiB",
        act.seconds, act.during[0], act.during[1], act.alone[0], act.alone[1], act.memory_mb
    );
    act
}

fn publish_into(stack: &Stack, stream: &str, count: u64) {
    stack.pg.exec(&format!(
        "insert into outbox.events (event_type, source, stream, data)
         select 'bench.cost', 'bench', '{stream}', {DATA} from generate_series(1, {count}) g"
    ));
}

fn wait_failed(stack: &Stack, count: u64) {
    wait_long(|| stack.pg.one::<i64>("select count(*) from outbox.failed_events") == count as i64);
}

pub(crate) fn measure(scale: &Scale) -> Taken {
    let stack = stack(&[
        ("outbox_relay.max_retries", "1"),
        ("outbox_relay.redis_max_len", "1000"),
    ]);
    let count = scale.events;
    let mut acts = Vec::new();
    let due = count / 20;
    fill(
        &stack,
        due,
        "perform outbox.publish_event('bench.cost', 'bench', '{}', scheduled_at => now() + interval '1 hour')
         from generate_series($from, $to) g",
    );
    acts.push((
        format!("{} fall due at one moment", thousands(due)),
        during(&stack, 20.0, "due", || {
            stack
                .pg
                .exec("update outbox.scheduled_events set scheduled_at = clock_timestamp()");
            stack.pg.exec("select outbox.wake()");
            wait_long(|| stack.pg.one::<i64>("select count(*) from outbox.scheduled_events") == 0);
            wait_sent(&stack);
        }),
    ));
    let refused = count / 10;
    stack.redis.call(&["SET", "bad", "a string"]);
    acts.push((
        format!("{} of a refused stream fail", thousands(refused)),
        during(&stack, 40.0, "failing", || {
            publish_into(&stack, "bad", refused);
            wait_failed(&stack, refused);
        }),
    ));
    let mut rows = Vec::new();
    for (what, act) in acts {
        rows.push(Row::plain(format!("{what}: takes"), act.seconds, 1, " s", Goal::None));
        let [during, alone] = [act.during, act.alone].map(|of| [vec![of[0]], vec![of[1]]]);
        for (index, name) in ["p50", "p99"].iter().enumerate() {
            let goal = if index == 0 { Goal::AtMost(2.0) } else { Goal::None };
            let title = format!("another backend's {name} while {what}, beside without");
            rows.push(Row::longer(title, &during[index], &alone[index], goal));
        }
        let title = format!("worker's memory above idle while {what}");
        rows.push(Row::plain(title, act.memory_mb, 1, " MiB", Goal::AtMost(32.0)));
    }
    Taken {
        rows,
        ..Taken::default()
    }
}
