//! The worker's resources: memory with large events and with backends that are down, and its work when idle. (Its
//! memory with a large backlog is measured together with the drain.)

use crate::options::Scale;
use crate::probe::{Busy, anonymous_kb, busy_seconds, wakes, written};
use crate::report::{Goal, Row, Taken, thousands};
use crate::servers::{BACKENDS, DATA, SETTINGS, stack, wait_long};
use kit::{Stack, wait_until};
use std::path::Path;
use std::time::{Duration, Instant};

const LARGE_EVENTS: u64 = 300;

pub(crate) fn measure_memory(scale: &Scale) -> Taken {
    Taken {
        rows: vec![large_events(), backends_down(scale)],
        ..Taken::default()
    }
}

/// A stack whose worker has sent something and has nothing to do, with its pid and memory.
fn settled() -> (Stack, i32, u64) {
    let stack = stack();
    stack.publish("warm.up");
    stack.wait_events(1);
    wait_until("the cursor to be saved", || {
        stack.pg.one::<i64>("select pending from outbox.status") == 0
    });
    let pid = stack.pg.wait_worker("postgres");
    let idle_kb = anonymous_kb(pid);
    (stack, pid, idle_kb)
}

fn above(what: String, highest_kb: u64, idle_kb: u64) -> Row {
    let mib = |kb: u64| kb as f64 / 1024.0;
    eprintln!("memory: {:.1} MiB, {:.1} idle, {what}", mib(highest_kb), mib(idle_kb));
    Row {
        floor: format!("{:.1} MiB idle", mib(idle_kb)),
        ..Row::plain(
            what,
            mib(highest_kb.saturating_sub(idle_kb)),
            1,
            " MiB",
            Goal::AtMost(32.0),
        )
    }
}

fn large_events() -> Row {
    let (stack, pid, idle_kb) = settled();
    stack.pg.exec("update outbox.backends set enabled = false");
    // With everything around it, an event has at most 1 MB.
    stack.pg.exec(&format!(
        "select outbox.publish_event('bench.large', 'bench', jsonb_build_object('n', g, 'pad', repeat('x', 1000000)))
         from generate_series(1, {LARGE_EVENTS}) g"
    ));
    let mut highest_kb = anonymous_kb(pid);
    stack.pg.exec("update outbox.backends set enabled = true");
    wait_long(|| {
        highest_kb = highest_kb.max(anonymous_kb(pid));
        stack.pg.one::<i64>("select pending from outbox.status") == 0
    });
    above(
        format!("worker's memory above idle, {LARGE_EVENTS} events of 1 MB drain"),
        highest_kb,
        idle_kb,
    )
}

fn backends_down(scale: &Scale) -> Row {
    let (stack, pid, idle_kb) = settled();
    // Port 1: nothing listens there.
    stack.pg.exec(&format!(
        "insert into outbox.backends (name, host, port) select 'd' || n, '127.0.0.1', 1 from generate_series(1, {BACKENDS}) n"
    ));
    let mut client = stack.pg.client();
    let (mut highest_kb, start) = (anonymous_kb(pid), Instant::now());
    // In many transactions, so that the backlog grows while the worker reads.
    for first in (1..=scale.events).step_by(1_000) {
        let sql = format!(
            "insert into outbox.events (event_type, source, backend, data)
             select 'bench.down', 'bench', 'd' || 1 + g % {BACKENDS}, {DATA} from generate_series({first}, {first} + 999) g"
        );
        client.batch_execute(&sql).expect("cannot publish");
        highest_kb = highest_kb.max(anonymous_kb(pid));
    }
    wait_long(|| {
        highest_kb = highest_kb.max(anonymous_kb(pid));
        start.elapsed() > Duration::from_secs(5)
    });
    let what = format!(
        "worker's memory above idle, {BACKENDS} backends down, {} events published",
        thousands(scale.events)
    );
    above(what, highest_kb, idle_kb)
}

/// As often as a worker polls.
const SLEEPER_WAKES_EACH: Duration = Duration::from_secs(5);

/// Sleeps for this time. Returns the processor time that this thread used, in seconds.
fn sleeper_seconds(time: Duration) -> f64 {
    let busy = || busy_seconds(Path::new("/proc/thread-self")).expect("Linux counts it");
    let (start, before) = (Instant::now(), busy());
    while let Some(rest) = time.checked_sub(start.elapsed()).filter(|rest| !rest.is_zero()) {
        std::thread::sleep(rest.min(SLEEPER_WAKES_EACH));
    }
    busy() - before
}

/// An idle worker with default settings: wake-ups, WAL and processor time.
pub(crate) fn measure_idle(scale: &Scale) -> Taken {
    // Otherwise the background writer logs a snapshot for standbys now and then.
    let quiet = [("wal_level", "minimal"), ("max_wal_senders", "0")];
    let stack = Stack::with(&[SETTINGS, &quiet].concat());
    stack.publish("warm.up");
    stack.wait_events(1);
    wait_until("the cursor to be saved", || {
        stack.pg.one::<i64>("select pending from outbox.status") == 0
    });
    let pid = stack.pg.wait_worker("postgres");
    // The session that has just queried has ended, too.
    std::thread::sleep(Duration::from_secs(2));
    let wal = written(&stack.pg);
    let (woken, busy, start) = (wakes(pid), Busy::of(pid), Instant::now());
    let slept = sleeper_seconds(Duration::from_secs(u64::from(scale.idle_seconds)));
    let (now, seconds) = (Busy::of(pid), start.elapsed().as_secs_f64());
    let busy = now.reader + now.senders - busy.reader - busy.senders;
    let woken = (wakes(pid) - woken) as f64 / seconds;
    Taken {
        rows: vec![
            Row::plain(
                "idle: wake-ups of all the worker's threads a second",
                woken,
                2,
                "",
                Goal::AtMost(0.2),
            ),
            Row::plain(
                format!("idle: WAL in {seconds:.0} s"),
                (written(&stack.pg) - wal) as f64,
                0,
                " bytes",
                Goal::AtMost(0.0),
            ),
            Row::plain("idle: CPU", busy / seconds * 100.0, 4, " %", Goal::AtMost(0.01)),
            Row::plain(
                format!(
                    "this machine's CPU for a thread that wakes each {} s and does nothing",
                    SLEEPER_WAKES_EACH.as_secs()
                ),
                slept / seconds * 100.0,
                4,
                " %",
                Goal::None,
            ),
        ],
        ..Taken::default()
    }
}
