//! A server that is not started yet: the source of its programs and its data, and its settings.

use std::path::{Path, PathBuf};

use crate::env;
use crate::port::TakenPort;
use crate::postgres::{PORT, Postgres, USER};

const DEFAULTS: &[(&str, &str)] = &[
    ("listen_addresses", ""),
    ("shared_preload_libraries", "outbox_relay"),
    // Before a test says where its Redis is, nothing must be written to one that this machine may run.
    ("outbox_relay.redis_port", "1"),
    // Nothing here has to survive the machine; a test of durability switches this on.
    ("fsync", "off"),
    // In the data directory: a killed server would leave /dev/shm/PostgreSQL.*.
    ("dynamic_shared_memory_type", "mmap"),
    ("max_prepared_transactions", "10"),
    ("log_min_messages", "info"),
    ("log_line_prefix", "%m [%p] %b "),
    // In the form in which tests read the log.
    ("lc_messages", "C"),
];

/// The source of a new server's data.
#[derive(Debug, Clone)]
pub(super) enum Origin {
    Template,
    Copy(PathBuf),
    BaseBackup { host: PathBuf, standby: bool },
}

/// A server that isn't started yet.
#[derive(Debug, Clone)]
#[must_use]
pub struct Builder {
    /// The programs.
    bin: PathBuf,
    settings: Vec<(String, String)>,
    env: Vec<(String, String)>,
    mounts: Vec<(PathBuf, String)>,
    arguments: Vec<String>,
    has_tcp: bool,
    origin: Origin,
}

impl Builder {
    pub(super) fn new(origin: Origin) -> Self {
        Builder {
            bin: env::postgres_bin(),
            settings: Vec::new(),
            env: Vec::new(),
            mounts: Vec::new(),
            arguments: Vec::new(),
            has_tcp: false,
            origin,
        }
    }

    /// With the programs in this directory, not those under test.
    pub fn bin(mut self, bin: &Path) -> Self {
        self.bin = bin.to_path_buf();
        self
    }

    /// With the library that can be made to die, to wait and to have a mutation: see [`crate::faults`].
    pub fn faults(mut self) -> Self {
        self.bin = env::faults_bin();
        self
    }

    /// Adds lines to postgresql.conf; the last one of a name applies, also over the kit's defaults.
    pub fn with(mut self, settings: &[(&str, &str)]) -> Self {
        self.settings.extend(
            settings
                .iter()
                .map(|(name, value)| (name.to_string(), value.to_string())),
        );
        self
    }

    /// With this setting on the command line, where it has priority over all files.
    pub fn argument(mut self, name: &str, value: &str) -> Self {
        self.arguments.extend(["-c".to_owned(), format!("{name}={value}")]);
        self
    }

    /// With this variable in the server's environment.
    pub fn env(mut self, name: &str, value: &str) -> Self {
        self.env.push((name.to_string(), value.to_string()));
        self
    }

    /// With this file mounted over `target`, only for this server; needs root.
    pub fn mount(mut self, file: &Path, target: &str) -> Self {
        self.mounts.push((file.to_path_buf(), target.to_string()));
        self
    }

    /// Also listens on 127.0.0.1, for clients that do not use Unix sockets: see [`Postgres::port`].
    pub fn tcp(mut self) -> Self {
        self.has_tcp = true;
        self
    }

    pub fn start(self) -> Postgres {
        let mut server = self.stopped();
        server.start_again();
        server
    }

    /// The server with its data directory in place, to be started by [`Postgres::start_again`].
    pub fn stopped(self) -> Postgres {
        let dir = env::server_dir("pg");
        let data = dir.path().join("data");
        match &self.origin {
            Origin::Template => copy(&env::template(), &data),
            Origin::Copy(from) => copy(from, &data),
            Origin::BaseBackup { host, standby } => base_backup(host, &data, *standby),
        }
        // A copied directory may contain the postmaster.pid of a server that still runs.
        let _ = std::fs::remove_file(data.join("postmaster.pid"));
        let server = Postgres {
            bin: self.bin,
            env: self.env,
            mounts: self.mounts,
            arguments: self.arguments,
            data,
            port: self.has_tcp.then(TakenPort::any),
            dir,
            child: None,
        };
        let socket_dir = server.host().display().to_string();
        server.configure(&[("unix_socket_directories", &socket_dir)]);
        if matches!(self.origin, Origin::Template) {
            server.configure(DEFAULTS);
        }
        for (name, value) in &self.settings {
            server.configure(&[(name, value)]);
        }
        if self.has_tcp {
            let port = server.port().to_string();
            server.configure(&[("listen_addresses", "127.0.0.1"), ("port", &port)]);
        }
        server
    }
}

/// Copies a data directory as the user who will own it.
fn copy(from: &Path, to: &Path) {
    let status = env::server_command("cp")
        .args(["-R", "--reflink=auto"])
        .arg(from)
        .arg(to)
        .status();
    assert!(
        status.expect("cannot run cp").success(),
        "cannot copy {}",
        from.display()
    );
    let status = env::server_command("chmod").arg("700").arg(to).status();
    assert!(
        status.expect("cannot run chmod").success(),
        "cannot chmod {}",
        to.display()
    );
}

fn base_backup(host: &Path, to: &Path, standby: bool) {
    let mut command = env::server_command(env::postgres_bin().join("pg_basebackup"));
    command
        .args([
            "--checkpoint=fast",
            "--no-sync",
            "-U",
            USER,
            "-p",
            &PORT.to_string(),
            "-h",
        ])
        .arg(host);
    command.arg("-D").arg(to);
    if standby {
        command.arg("-R");
    }
    let output = command.output().expect("cannot run pg_basebackup");
    assert!(
        output.status.success(),
        "pg_basebackup failed: {}",
        String::from_utf8_lossy(&output.stderr)
    );
}
