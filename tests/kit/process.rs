//! Processes of servers: finding and ending them.

use std::path::Path;
use std::process::{Child, ExitStatus};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

/// Every process whose working directory is `dir`: for a data directory, the postmaster and all its children.
pub fn pids_in(dir: &Path) -> Vec<i32> {
    let processes = std::fs::read_dir("/proc").expect("cannot read /proc");
    processes
        .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok())
        .filter(|pid: &i32| works_in(*pid, dir))
        .collect()
}

fn works_in(pid: i32, dir: &Path) -> bool {
    let is_in = |path: String| std::fs::read_link(path).map(|cwd| cwd == dir);
    is_in(format!("/proc/{pid}/cwd")).unwrap_or_else(|_| {
        // A process that is exiting: its first thread has no directory any more, but another thread may still hold
        // shared resources.
        let threads = std::fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten();
        threads
            .filter_map(|thread| thread.ok()?.file_name().into_string().ok())
            .any(|thread| is_in(format!("/proc/{pid}/task/{thread}/cwd")).unwrap_or(false))
    })
}

/// The title of a process, such as `postgres: outbox_relay worker`.
pub fn title(pid: i32) -> String {
    let bytes = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    String::from_utf8_lossy(&bytes).replace('\0', " ").trim().to_string()
}

/// What a process occupies.
#[derive(Clone, Copy, Debug)]
pub struct Usage {
    /// Anonymous memory: neither shared memory nor files.
    pub memory_kb: u64,
    pub descriptors: usize,
    pub threads: usize,
}

impl Usage {
    /// `None`: there is no such process.
    pub fn of(pid: i32) -> Option<Self> {
        let status = std::fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
        let number = |name: &str| -> Option<u64> {
            let line = status.lines().find_map(|line| line.strip_prefix(name))?;
            line.split_whitespace().next()?.parse().ok()
        };
        Some(Usage {
            memory_kb: number("RssAnon:")?,
            descriptors: std::fs::read_dir(format!("/proc/{pid}/fd")).ok()?.count(),
            threads: usize::try_from(number("Threads:")?).ok()?,
        })
    }

    /// The larger figure of each.
    pub fn max(self, other: Usage) -> Usage {
        Usage {
            memory_kb: self.memory_kb.max(other.memory_kb),
            descriptors: self.descriptors.max(other.descriptors),
            threads: self.threads.max(other.threads),
        }
    }
}

/// How many file descriptors a process has open.
pub fn descriptors(pid: i32) -> usize {
    Usage::of(pid).expect("the process lives").descriptors
}

/// Anonymous memory of a process, in KiB.
pub fn memory_kb(pid: i32) -> u64 {
    Usage::of(pid).expect("the process lives").memory_kb
}

/// Processor time of all threads of a process, in steps of ten milliseconds.
pub fn cpu_time(pid: i32) -> Duration {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).expect("the process lives");
    let fields: Vec<&str> = stat.rsplit(')').next().unwrap_or_default().split_whitespace().collect();
    // utime and stime are fields 14 and 15 of the line; two fields were removed before.
    let ticks: u64 = [11, 12]
        .map(|index: usize| fields[index].parse::<u64>().expect("a number"))
        .iter()
        .sum();
    Duration::from_millis(ticks * 10)
}

/// Sends a signal; a process that has already ended is no error.
pub fn signal(pid: i32, signal: Signal) {
    match kill(Pid::from_raw(pid), signal) {
        Ok(()) | Err(nix::errno::Errno::ESRCH) => {}
        Err(error) => panic!("cannot send {signal} to {pid}: {error}"),
    }
}

/// The pid of a server of ours.
#[track_caller]
pub(crate) fn pid_of(child: Option<&Child>) -> i32 {
    let child = child.expect("this server is stopped");
    i32::try_from(child.id()).expect("a pid fits")
}

/// Waits for a child process to exit; `None` if it still runs after `limit`.
pub fn wait_exit(child: &mut Child, limit: Duration) -> Option<ExitStatus> {
    let deadline = Instant::now() + limit;
    loop {
        if let Some(status) = child.try_wait().expect("cannot wait for a child") {
            return Some(status);
        }
        if Instant::now() >= deadline {
            return None;
        }
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// The last `lines` lines of a log, for a failing test's output.
pub fn tail(log: &str, lines: usize) -> String {
    let all: Vec<&str> = log.lines().collect();
    all[all.len().saturating_sub(lines)..].join("\n")
}
