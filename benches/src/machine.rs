//! The machine on which the figures were measured.

use std::process::Command;

/// A sentence for readers.
pub(crate) fn describe() -> String {
    let cores = std::thread::available_parallelism().map_or(0, |n| n.get());
    let cpu = first_value("/proc/cpuinfo", "model name");
    let memory = first_value("/proc/meminfo", "MemTotal");
    let memory_kb: f64 = memory.trim_end_matches(" kB").parse().unwrap_or(0.0);
    let postgres = version(kit::env::postgres_bin().join("postgres").as_os_str());
    let redis = version("redis-server".as_ref());
    format!(
        "Measured on {cores} cores of an {cpu} with {:.0} GiB of memory, {} and Redis {} on the same machine.",
        memory_kb / 1024.0 / 1024.0,
        postgres
            .replace("postgres (PostgreSQL) ", "Postgres ")
            .split(" (")
            .next()
            .unwrap_or_default(),
        redis
            .split("v=")
            .nth(1)
            .and_then(|rest| rest.split(' ').next())
            .unwrap_or("(unknown)")
    )
}

fn version(program: &std::ffi::OsStr) -> String {
    let output = Command::new(program).arg("--version").output();
    output.map_or(String::new(), |o| String::from_utf8_lossy(&o.stdout).trim().to_owned())
}

/// The value of the first line `NAME : VALUE` of a file.
fn first_value(path: &str, name: &str) -> String {
    let text = std::fs::read_to_string(path).unwrap_or_default();
    let value = text.lines().find_map(|line| {
        Some(
            line.strip_prefix(name)?
                .trim_start_matches([' ', '\t', ':'])
                .trim()
                .to_owned(),
        )
    });
    value.unwrap_or("unknown".to_owned())
}
