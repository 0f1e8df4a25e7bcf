//! The servers and the worker as seen from outside.

use kit::Postgres;
use std::collections::HashMap;
use std::io::{Seek, SeekFrom, Write};
use std::path::Path;
use std::time::{Duration, Instant};

/// Entries that were appended to streams, over time: seconds from the first that was seen, and how many.
pub(crate) struct Progress {
    pub points: Vec<(f64, u64)>,
    goal: u64,
}

impl Progress {
    /// Watches existing streams until they have had `goal` entries; calls `look` each time.
    pub(crate) fn watch(
        conn: &mut redis::Connection,
        streams: &[String],
        goal: u64,
        interval: Duration,
        mut look: impl FnMut(u64),
    ) -> Self {
        let mut points: Vec<(f64, u64)> = Vec::new();
        let mut first: Option<Instant> = None;
        let (mut last, mut moved) = (0, Instant::now());
        while last < goal {
            let done = added(conn, streams);
            let now = Instant::now();
            if done > 0 {
                let first = *first.get_or_insert(now);
                points.push((now.duration_since(first).as_secs_f64(), done));
            }
            look(done);
            if done != last {
                (last, moved) = (done, now);
            }
            assert!(
                moved.elapsed() < Duration::from_secs(60),
                "{last} of {goal} events have come, and no more for a minute"
            );
            std::thread::sleep(interval);
        }
        Self { points, goal }
    }

    /// Events a second between the first look that found some and the last that found some missing.
    pub(crate) fn rate(&self) -> f64 {
        let (start, from) = self.points[0];
        let running: Vec<_> = self.points.iter().filter(|(_, done)| *done < self.goal).collect();
        // All arrived between two looks: uses what there is.
        let &(end, to) = match running.len() {
            0..3 => self.points.last().expect("it was reached"),
            n => running[n - 1],
        };
        (to - from) as f64 / (end - start)
    }

    /// Rate of the last tenth over that of the first.
    pub(crate) fn flatness(&self) -> f64 {
        let (tenth, goal) = (self.goal as f64 / 10.0, self.goal as f64);
        let from = self.points[0].1 as f64;
        let first = (from + tenth - from) / (self.when(from + tenth) - self.when(from));
        let last = tenth / (self.when(goal) - self.when(goal - tenth));
        last / first
    }

    /// When this many had arrived, interpolated between two looks.
    fn when(&self, count: f64) -> f64 {
        let after = self.points.partition_point(|&(_, done)| (done as f64) < count);
        let (t1, n1) = self.points[after.min(self.points.len() - 1)];
        let (t0, n0) = self.points[after.saturating_sub(1)];
        match n1 == n0 {
            true => t1,
            false => t0 + (t1 - t0) * (count - n0 as f64) / (n1 - n0) as f64,
        }
    }
}

/// Entries that were ever added to these streams.
pub(crate) fn added(conn: &mut redis::Connection, streams: &[String]) -> u64 {
    let mut ask = redis::pipe();
    for stream in streams {
        ask.cmd("XINFO").arg("STREAM").arg(stream);
    }
    let replies: Vec<HashMap<String, redis::Value>> = ask.query(conn).expect("XINFO STREAM");
    let count = |reply: &HashMap<String, redis::Value>| match reply.get("entries-added") {
        Some(redis::Value::Int(count)) => *count as u64,
        _ => panic!("this Redis does not count entries (needs 7.0)"),
    };
    replies.iter().map(count).sum()
}

/// Processor time of a worker's threads, in seconds.
pub(crate) struct Busy {
    pub reader: f64,
    pub senders: f64,
}

impl Busy {
    pub(crate) fn of(pid: i32) -> Self {
        let mut busy = Self {
            reader: 0.0,
            senders: 0.0,
        };
        for (thread, directory) in threads(pid) {
            // A thread that has ended meanwhile no longer counts.
            let seconds = busy_seconds(&directory).unwrap_or(0.0);
            match thread == pid {
                true => busy.reader += seconds,
                false => busy.senders += seconds,
            }
        }
        busy
    }
}

/// Processor time of a thread, by its directory in /proc.
pub(crate) fn busy_seconds(directory: &Path) -> Option<f64> {
    // The first number is the processor time in nanoseconds.
    let text = std::fs::read_to_string(directory.join("schedstat")).ok()?;
    let ns: f64 = text.split(' ').next()?.parse().ok()?;
    Some(ns / 1e9)
}

/// How often threads of the process went to sleep, and so woke.
pub(crate) fn wakes(pid: i32) -> u64 {
    let sleeps = |(_, directory): (i32, std::path::PathBuf)| {
        let status = std::fs::read_to_string(directory.join("status")).ok()?;
        let line = status
            .lines()
            .find_map(|l| l.strip_prefix("voluntary_ctxt_switches:"))?;
        line.trim().parse::<u64>().ok()
    };
    threads(pid).into_iter().filter_map(sleeps).sum()
}

fn threads(pid: i32) -> Vec<(i32, std::path::PathBuf)> {
    let tasks = std::fs::read_dir(format!("/proc/{pid}/task")).expect("the worker has gone");
    tasks
        .flatten()
        .filter_map(|task| Some((task.file_name().to_str()?.parse().ok()?, task.path())))
        .collect()
}

/// Private memory that is not backed by a file.
pub(crate) fn anonymous_kb(pid: i32) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).expect("the worker has gone");
    let line = status
        .lines()
        .find_map(|l| l.strip_prefix("RssAnon:"))
        .expect("no RssAnon");
    line.trim().trim_end_matches(" kB").parse().expect("no number")
}

/// The most private memory that a process has until `is_over`.
pub(crate) fn most_anonymous_kb(pid: i32, is_over: impl Fn() -> bool) -> u64 {
    let mut most = anonymous_kb(pid);
    while !is_over() {
        std::thread::sleep(Duration::from_millis(50));
        most = anonymous_kb(pid).max(most);
    }
    most
}

/// WAL written so far, in bytes.
pub(crate) fn written(pg: &Postgres) -> i64 {
    pg.one("select (pg_current_wal_insert_lsn() - '0/0'::pg_lsn)::bigint")
}

/// Milliseconds that this machine takes to write a block to disk, each of several times.
pub(crate) fn fsync_ms(directory: &Path) -> Vec<f64> {
    let mut file = tempfile_in(directory);
    file.write_all(&vec![0; 16 << 20]).expect("cannot write");
    file.sync_all().expect("cannot sync");
    (0..300)
        .map(|n| {
            file.seek(SeekFrom::Start(n * 8192 % (16 << 20))).expect("cannot seek");
            let start = Instant::now();
            file.write_all(&[1; 8192]).expect("cannot write");
            file.sync_data().expect("cannot sync");
            start.elapsed().as_secs_f64() * 1_000.0
        })
        .collect()
}

/// A file without a name: it is deleted with its handle.
fn tempfile_in(directory: &Path) -> std::fs::File {
    let path = directory.join("bench.fsync");
    let file = std::fs::File::create(&path).expect("cannot make a file beside the server's data");
    std::fs::remove_file(&path).expect("cannot remove it");
    file
}
