//! A clock that can be set while a server runs, as `date -s`, NTP or a machine that was suspended sets it.

use std::fs::OpenOptions;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::process::Command;

use tempfile::TempDir;

use crate::env;
use crate::postgres::builder::Builder;

/// The time of day of a server's processes. Their monotonic clock is the machine's.
#[derive(Debug)]
pub struct WallClock {
    dir: TempDir,
}

impl WallClock {
    /// A clock that is right, so far. `None`, after a report: there is no C compiler, so it cannot be had.
    pub fn new() -> Option<Self> {
        let dir = env::server_dir("clock");
        let source = dir.path().join("clock.c");
        std::fs::write(&source, include_str!("clock.c")).expect("cannot write clock.c");
        let clock = WallClock { dir };
        let compiled = Command::new("cc")
            .args(["-shared", "-fPIC", "-O1", "-Wall", "-Werror", "-o"])
            .args([&clock.library(), &source])
            .status();
        if compiled.is_err() {
            env::not_run("there is no C compiler (cc), which makes a clock that can be set");
            return None;
        }
        assert!(compiled.is_ok_and(|status| status.success()), "cannot compile clock.c");
        clock.set(0);
        Some(clock)
    }

    /// A server that goes by this clock.
    pub fn in_use_by(&self, server: Builder) -> Builder {
        let [library, offset] = [self.library(), self.offset()].map(|path| path.display().to_string());
        server.env("LD_PRELOAD", &library).env("OUTBOX_TEST_CLOCK", &offset)
    }

    /// Sets it to this many seconds after the right time.
    pub fn set(&self, seconds: i64) {
        let us = seconds * 1_000_000;
        let path = self.offset();
        let file = OpenOptions::new().create(true).truncate(false).write(true).open(path);
        let written = file.and_then(|file| file.write_all_at(&us.to_ne_bytes(), 0));
        written.expect("cannot set the clock");
    }

    fn library(&self) -> PathBuf {
        self.dir.path().join("clock.so")
    }

    fn offset(&self) -> PathBuf {
        self.dir.path().join("offset")
    }
}
