//! A throwaway Postgres server with its own data directory and a Unix socket (and TCP on request), removed with its
//! value.

pub mod builder;
mod misuse;

use std::fs::OpenOptions;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::Duration;

use ::postgres::types::FromSqlOwned;
use ::postgres::{Client, Config, NoTls};
use nix::sys::signal::Signal;
use tempfile::TempDir;

use crate::env;
use crate::port::TakenPort;
use crate::postgres::builder::{Builder, Origin};
use crate::process::{self, pids_in, tail, wait_exit};
use crate::wait::{LIMIT, eventually};

/// The superuser of every throwaway cluster, and the database that tests use unless they say otherwise.
pub const USER: &str = "postgres";
pub const DB: &str = "postgres";

/// Each server listens on its own Unix socket, so that all of them can have this port.
const PORT: u16 = 5432;

/// How a server is told to stop, in the terms of Postgres.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// Waits until all clients have left.
    Smart,
    /// Ends the clients' sessions.
    Fast,
    /// Exits at once; the next start recovers.
    Immediate,
}

/// What a client program printed, and whether it succeeded.
#[derive(Debug)]
pub struct Ran {
    pub ok: bool,
    pub stdout: String,
    pub stderr: String,
}

/// A Postgres server, or a stopped one. Dropping it stops it at once and removes its data; if that happens in a panic,
/// the end of its log is printed, else its log must not tell of misuse.
#[derive(Debug)]
pub struct Postgres {
    child: Option<Child>,
    bin: PathBuf,
    env: Vec<(String, String)>,
    mounts: Vec<(PathBuf, String)>,
    /// Further arguments of its command line.
    arguments: Vec<String>,
    data: PathBuf,
    /// The port on 127.0.0.1, if it listens there.
    port: Option<TakenPort>,
    /// Holds the data directory, the socket and the log; removed last.
    dir: TempDir,
}

impl Postgres {
    /// A server with the kit's defaults: the extension's library is preloaded, the extension is not created.
    pub fn start() -> Self {
        Self::builder().start()
    }

    /// A server with these settings in addition to the defaults, to be started with `.start()`.
    pub fn with(settings: &[(&str, &str)]) -> Builder {
        Self::builder().with(settings)
    }

    pub fn builder() -> Builder {
        Builder::new(Origin::Template)
    }

    /// A server on a copy of this data directory, made when it is started. The directory must be a stopped server's.
    pub fn copy_of(data: &Path) -> Builder {
        Builder::new(Origin::Copy(data.to_path_buf()))
    }

    /// A streaming standby of this server (pg_basebackup -R), with the same settings.
    pub fn standby(&self) -> Builder {
        self.backup(true)
    }

    /// A restored base backup of this server: same system identifier and settings, but independent of it.
    pub fn base_backup(&self) -> Builder {
        self.backup(false)
    }

    fn backup(&self, standby: bool) -> Builder {
        let host = self.host().to_path_buf();
        Builder::new(Origin::BaseBackup { host, standby }).bin(&self.bin)
    }

    /// The directory of its programs.
    pub fn bin(&self) -> &Path {
        &self.bin
    }

    // --- connecting to it

    /// A connection as superuser to the database `postgres`.
    #[track_caller]
    pub fn client(&self) -> Client {
        self.client_as(USER, DB)
    }

    /// A connection as superuser to `db`.
    #[track_caller]
    pub fn client_db(&self, db: &str) -> Client {
        self.client_as(USER, db)
    }

    #[track_caller]
    pub fn client_as(&self, user: &str, db: &str) -> Client {
        match self.config(user, db).connect(NoTls) {
            Ok(client) => client,
            Err(error) => panic!("cannot connect as {user} to {db}: {error:?}"),
        }
    }

    /// For a connection that may fail, or needs other parameters.
    pub fn config(&self, user: &str, db: &str) -> Config {
        let mut config = Config::new();
        config
            .host_path(self.host())
            .port(self.port())
            .user(user)
            .dbname(db)
            .connect_timeout(LIMIT);
        config
    }

    /// Runs statements in a session of their own, as one transaction unless they contain transaction commands.
    #[track_caller]
    pub fn exec(&self, sql: &str) {
        self.exec_db(DB, sql);
    }

    #[track_caller]
    pub fn exec_db(&self, db: &str, sql: &str) {
        if let Err(error) = self.client_db(db).batch_execute(sql) {
            panic!("{sql}\nfailed: {error:?}");
        }
    }

    /// The single column of the single row of a query, in a session of its own.
    #[track_caller]
    pub fn one<T: FromSqlOwned>(&self, sql: &str) -> T {
        self.one_db(DB, sql)
    }

    #[track_caller]
    pub fn one_db<T: FromSqlOwned>(&self, db: &str, sql: &str) -> T {
        let row = self
            .client_db(db)
            .query_one(sql, &[])
            .unwrap_or_else(|error| panic!("{sql}\nfailed: {error:?}"));
        row.try_get(0)
            .unwrap_or_else(|error| panic!("{sql}\ngave another type: {error}"))
    }

    /// Runs psql, without ~/.psqlrc, in the database `postgres` unless the arguments name one with `-d`.
    pub fn psql(&self, args: &[&str]) -> Ran {
        self.run("psql", args, "")
    }

    /// Runs a client program of this installation (`pgbench`, `vacuumdb`...) against this server.
    pub fn run(&self, program: &str, args: &[&str], stdin: &str) -> Ran {
        let mut command = Command::new(self.bin.join(program));
        if program == "psql" {
            command.arg("-X");
        }
        let mut child = command
            .args(args)
            .env("PGHOST", self.host())
            .env("PGPORT", self.port().to_string())
            .env("PGUSER", USER)
            .env("PGDATABASE", DB)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap_or_else(|error| panic!("cannot run {program}: {error}"));
        let mut input = child.stdin.take().expect("stdin is piped");
        let output = std::thread::scope(|scope| {
            // In a separate thread: a program that prints while it reads would block on a full pipe. A program that
            // ends early breaks the pipe, and its exit status shows that.
            scope.spawn(move || input.write_all(stdin.as_bytes()).ok());
            child
                .wait_with_output()
                .expect("cannot read the output of a client program")
        });
        Ran {
            ok: output.status.success(),
            stdout: String::from_utf8_lossy(&output.stdout).into_owned(),
            stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
        }
    }

    /// `db` as a plain SQL dump.
    #[track_caller]
    pub fn pg_dump(&self, db: &str) -> String {
        let ran = self.run("pg_dump", &["-d", db], "");
        assert!(ran.ok, "pg_dump failed: {}", ran.stderr);
        ran.stdout
    }

    /// Restores a plain SQL dump into `db`, which exists; any error fails the test.
    #[track_caller]
    pub fn restore(&self, db: &str, sql: &str) {
        let ran = self.run("psql", &["-q", "-v", "ON_ERROR_STOP=1", "-d", db, "-f", "-"], sql);
        assert!(ran.ok, "restoring into {db} failed: {}", ran.stderr);
    }

    /// `CREATE EXTENSION outbox_relay` in the database `postgres`.
    #[track_caller]
    pub fn extension(&self) {
        self.exec("create extension outbox_relay");
    }

    /// Changes a setting permanently (ALTER SYSTEM) and reloads.
    #[track_caller]
    pub fn set(&self, name: &str, value: &str) {
        let value = value.replace('\'', "''");
        self.exec(&format!("alter system set {name} = '{value}'"));
        self.reload();
    }

    /// Appends lines to postgresql.conf, also while the server is stopped. They apply from the next start or reload on.
    pub fn configure(&self, settings: &[(&str, &str)]) {
        let path = self.data.join("postgresql.conf");
        let mut file = OpenOptions::new()
            .append(true)
            .open(&path)
            .expect("cannot open postgresql.conf");
        for (name, value) in settings {
            writeln!(file, "{name} = '{}'", value.replace('\'', "''")).expect("cannot write postgresql.conf");
        }
    }

    /// Renames the data directory of a stopped server.
    #[track_caller]
    pub fn move_data(&mut self, name: &str) {
        let to = self.dir.path().join(name);
        std::fs::rename(&self.data, &to).expect("cannot rename the data directory");
        self.data = to;
    }

    // --- starting and stopping

    /// Starts a stopped server, and waits until it accepts connections (for a standby, until it is consistent).
    #[track_caller]
    pub fn start_again(&mut self) {
        assert!(self.child.is_none(), "this server runs already");
        let log = OpenOptions::new()
            .create(true)
            .append(true)
            .open(self.log_path())
            .expect("cannot open the log");
        let child = env::mounted_command(&self.bin.join("postgres"), &self.mounts)
            .arg("-D")
            .arg(&self.data)
            .args(&self.arguments)
            .envs(self.env.iter().map(|(name, value)| (name, value)))
            .stdin(Stdio::null())
            .stdout(log.try_clone().expect("cannot duplicate the log's handle"))
            .stderr(log)
            .spawn()
            .expect("cannot run postgres");
        self.child = Some(child);
        eventually("postgres to take connections", LIMIT * 3, || {
            if let Some(status) = self.child.as_mut().and_then(|child| child.try_wait().expect("wait")) {
                self.child = None;
                panic!("postgres ended while starting, {status}:\n{}", tail(&self.log(), 40));
            }
            self.config(USER, DB).connect(NoTls).ok()
        });
    }

    /// Stops the server and waits until it has ended; panics if that takes longer than [`LIMIT`].
    #[track_caller]
    pub fn stop(&mut self, mode: Mode) -> ExitStatus {
        let limit = LIMIT;
        self.try_stop(mode, limit).unwrap_or_else(|| {
            panic!(
                "postgres still runs {limit:?} after a {mode:?} stop: {}",
                self.processes()
            )
        })
    }

    /// Asks the server to stop; `None` if it still runs after `limit` (it continues to stop then).
    #[track_caller]
    pub fn try_stop(&mut self, mode: Mode, limit: Duration) -> Option<ExitStatus> {
        let signal = match mode {
            Mode::Smart => Signal::SIGTERM,
            Mode::Fast => Signal::SIGINT,
            Mode::Immediate => Signal::SIGQUIT,
        };
        process::signal(self.pid(), signal);
        let status = wait_exit(self.child.as_mut().expect("pid() found it"), limit)?;
        self.child = None;
        Some(status)
    }

    /// A fast stop and a start.
    #[track_caller]
    pub fn restart(&mut self) {
        self.stop(Mode::Fast);
        self.start_again();
    }

    /// Kills only the postmaster (SIGKILL), and waits until its children have noticed and ended.
    #[track_caller]
    pub fn kill9(&mut self) {
        process::signal(self.pid(), Signal::SIGKILL);
        self.reap();
        let deadline = std::time::Instant::now() + LIMIT;
        while !pids_in(&self.data).is_empty() {
            if std::time::Instant::now() >= deadline {
                panic!(
                    "still there {LIMIT:?} after the postmaster was killed: {}",
                    self.processes()
                );
            }
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    /// Kills every process of the server at once (SIGKILL), as a crash of the machine would.
    #[track_caller]
    pub fn crash(&mut self) {
        // Stopped first, so that the postmaster starts no process while its children are looked for.
        process::signal(self.pid(), Signal::SIGSTOP);
        self.kill_all();
    }

    /// Reloads the configuration files (SIGHUP); returns before every process has.
    #[track_caller]
    pub fn reload(&self) {
        process::signal(self.pid(), Signal::SIGHUP);
    }

    /// Makes a standby a primary, and waits until it is.
    #[track_caller]
    pub fn promote(&self) {
        // Its snapshot must not block recovery for as long as that takes.
        self.exec("select pg_promote(wait => false)");
        eventually("the end of recovery", LIMIT, || {
            (!self.one::<bool>("select pg_is_in_recovery()")).then_some(())
        });
    }

    /// Creates a tablespace, which lives as long as the returned directory.
    #[track_caller]
    pub fn make_tablespace(&self, name: &str) -> TempDir {
        let dir = env::server_dir("space");
        self.exec(&format!("create tablespace {name} location '{}'", dir.path().display()));
        dir
    }

    // --- examining it

    pub fn is_running(&self) -> bool {
        self.child.is_some()
    }

    /// The pid of the postmaster.
    #[track_caller]
    pub fn pid(&self) -> i32 {
        process::pid_of(self.child.as_ref())
    }

    /// The pid of the relay's worker in `db`, or `None` while there is none.
    #[track_caller]
    pub fn worker_pid(&self, db: &str) -> Option<i32> {
        self.client()
            .query_opt(
                "select pid from pg_catalog.pg_stat_activity \
                 where backend_type = 'outbox_relay worker' and datname = $1",
                &[&db],
            )
            .unwrap_or_else(|error| panic!("cannot look for the worker: {error:?}"))
            .map(|row| row.get(0))
    }

    /// The same, once there is a worker.
    #[track_caller]
    pub fn wait_worker(&self, db: &str) -> i32 {
        eventually(&format!("a worker in {db}"), LIMIT, || self.worker_pid(db))
    }

    pub fn data_dir(&self) -> &Path {
        &self.data
    }

    /// The directory of its programs.
    pub fn programs(&self) -> &Path {
        &self.bin
    }

    /// The directory of the socket: libpq's `host`.
    pub fn host(&self) -> &Path {
        self.dir.path()
    }

    /// With its socket's name, and TCP if it listens there.
    pub fn port(&self) -> u16 {
        self.port.as_ref().map_or(PORT, |port| port.number)
    }

    /// Everything that the server has logged, over all its starts.
    pub fn log(&self) -> String {
        let bytes = std::fs::read(self.log_path()).unwrap_or_default();
        String::from_utf8_lossy(&bytes).into_owned()
    }

    /// Waits until the log contains `text`.
    #[track_caller]
    pub fn wait_log(&self, text: &str) {
        self.wait_log_after(0, text);
    }

    /// Waits until the log contains `text` after its first `mark` bytes; take the mark as `log().len()` before the
    /// action.
    #[track_caller]
    pub fn wait_log_after(&self, mark: usize, text: &str) {
        eventually(&format!("{text:?} in the log"), LIMIT, || {
            self.log()
                .get(mark..)
                .is_some_and(|log| log.contains(text))
                .then_some(())
        });
    }

    /// The bytes of the log, which may be in the encodings of several databases.
    pub fn log_path(&self) -> PathBuf {
        self.dir.path().join("postgres.log")
    }

    /// The titles of its processes, for a panic's message.
    fn processes(&self) -> String {
        let pids = pids_in(&self.data);
        pids.iter()
            .map(|pid| format!("{pid} {}", process::title(*pid)))
            .collect::<Vec<_>>()
            .join("; ")
    }

    fn reap(&mut self) {
        if let Some(mut child) = self.child.take() {
            let _ = child.wait();
        }
    }

    fn kill_all(&mut self) {
        loop {
            let pids = pids_in(&self.data);
            if let Some(child) = self.child.as_mut() {
                let _ = child.kill();
            }
            for pid in &pids {
                process::signal(*pid, Signal::SIGKILL);
            }
            self.reap();
            if pids.is_empty() {
                return;
            }
            std::thread::sleep(Duration::from_millis(2));
        }
    }
}

impl Drop for Postgres {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("--- the end of the log of {}", self.data.display());
            eprintln!("{}\n---", tail(&self.log(), 60));
        }
        if let Some(child) = self.child.as_mut() {
            process::signal(i32::try_from(child.id()).unwrap_or(i32::MAX), Signal::SIGQUIT);
            wait_exit(child, Duration::from_secs(6));
        }
        self.kill_all();
        remove_shared_memory(&self.data);
        if !std::thread::panicking() {
            let log = self.log();
            let misuse = misuse::lines(&log);
            assert!(misuse.is_empty(), "Postgres was misused:\n{}", misuse.join("\n"));
        }
    }
}

/// A killed postmaster leaves its System V segment behind, which the next start would remove: its id is the last word
/// of the seventh line of postmaster.pid.
fn remove_shared_memory(data: &Path) {
    let Ok(pid_file) = std::fs::read_to_string(data.join("postmaster.pid")) else {
        return;
    };
    if let Some(id) = pid_file.lines().nth(6).and_then(|line| line.split_whitespace().last()) {
        let _ = Command::new("ipcrm").args(["-m", id]).stderr(Stdio::null()).status();
    }
}
