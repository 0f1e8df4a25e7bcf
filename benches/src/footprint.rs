//! What the worker costs: memory with a large backlog, and what it does when there is nothing to do.

use crate::{Figure, Scale, drain, poll_until, stack};
use kit::Stack;
use std::time::Duration;

/// The highest private memory of the worker while it drains a large backlog, above what it has when idle.
pub fn memory(scale: &Scale) -> Figure {
    let stack = stack();
    stack.publish("warm.up");
    stack.wait_events(1);
    let pid = stack.pg.wait_worker("postgres");
    let idle_kb = anonymous_kb(pid);
    drain::fill(&stack, scale.backlog, "exactly_once", false);
    let mut highest_kb = anonymous_kb(pid);
    stack.pg.exec("update outbox.backends set enabled = true");
    poll_until(|| {
        highest_kb = highest_kb.max(anonymous_kb(pid));
        let left: i64 = stack.pg.one("select pending from outbox.status");
        left == 0
    });
    Figure {
        name: format!("worker's memory with {} waiting", scale.backlog),
        ours: format!("{:.1} MiB", highest_kb as f64 / 1024.0),
        floor: format!("{:.1} MiB idle", idle_kb as f64 / 1024.0),
        ratio: format!("+{:.1} MiB", highest_kb.saturating_sub(idle_kb) as f64 / 1024.0),
        goal: "+64 MiB",
    }
}

/// Ten polls without work: WAL written, and times that the worker's threads woke.
pub fn idle() -> Vec<Figure> {
    const POLLS: u64 = 10;
    let stack = Stack::with(&[
        ("outbox_relay.poll_interval", "1s"),
        // Otherwise the background writer logs a snapshot for standbys now and then.
        ("wal_level", "minimal"),
        ("max_wal_senders", "0"),
        ("autovacuum", "off"),
        ("checkpoint_timeout", "1h"),
    ]);
    stack.publish("warm.up");
    stack.wait_events(1);
    // The last cursor is saved, and the standby snapshot of the background writer written.
    std::thread::sleep(Duration::from_secs(20));
    let pid = stack.pg.wait_worker("postgres");
    let wal: String = stack.pg.one("select pg_current_wal_insert_lsn()::text");
    let before = switches(pid);
    std::thread::sleep(Duration::from_secs(POLLS));
    let woken = switches(pid) - before;
    let written: String = stack.pg.one(&format!(
        "select pg_wal_lsn_diff(pg_current_wal_insert_lsn(), '{wal}')::text"
    ));
    vec![
        Figure {
            name: "idle: wake-ups of the worker's threads per poll".into(),
            ours: format!("{:.1}", woken as f64 / POLLS as f64),
            floor: "1 poll".into(),
            ratio: format!("{:.1}", woken as f64 / POLLS as f64),
            goal: "1",
        },
        Figure {
            name: format!("idle: WAL in {POLLS} polls"),
            ours: format!("{written} bytes"),
            floor: "0 bytes".into(),
            ratio: written,
            goal: "0",
        },
    ]
}

/// Private memory that is not backed by a file.
fn anonymous_kb(pid: i32) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).expect("the worker has gone");
    let line = status
        .lines()
        .find_map(|l| l.strip_prefix("RssAnon:"))
        .expect("no RssAnon");
    line.trim().trim_end_matches(" kB").parse().expect("no number")
}

/// Times that a thread of the process went to sleep, and so woke.
fn switches(pid: i32) -> u64 {
    let tasks = std::fs::read_dir(format!("/proc/{pid}/task")).expect("the worker has gone");
    tasks
        .filter_map(|task| std::fs::read_to_string(task.ok()?.path().join("status")).ok())
        .filter_map(|s| {
            s.lines()
                .find_map(|l| l.strip_prefix("voluntary_ctxt_switches:")?.trim().parse::<u64>().ok())
        })
        .sum()
}
