//! A throwaway Redis server, and functions to read its streams.

use std::collections::BTreeMap;
use std::fs::OpenOptions;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use ::redis::{Connection, ConnectionLike, Value, cmd};
use nix::sys::signal::Signal;
use tempfile::TempDir;

use crate::env;
use crate::port::TakenPort;
use crate::process::{self, tail, wait_exit};
use crate::wait::{LIMIT, eventually};

/// A Redis server on 127.0.0.1 and on a Unix socket; nothing is saved to disk unless its arguments say so. Dropping it
/// kills it and removes its data.
#[derive(Debug)]
pub struct Redis {
    child: Option<Child>,
    port: TakenPort,
    /// The TLS port, if any.
    tls_port: Option<TakenPort>,
    args: Vec<String>,
    password: Option<String>,
    dir: TempDir,
}

impl Redis {
    pub fn start() -> Self {
        Self::with(&[])
    }

    /// A server with further arguments, such as `&["--appendonly", "yes"]`. A `--requirepass` is used by
    /// [`conn`](Self::conn) too.
    #[track_caller]
    pub fn with(args: &[&str]) -> Self {
        Self::on(None, args)
    }

    /// The same, with an additional TLS port; the arguments name the certificates.
    #[track_caller]
    pub(crate) fn with_tls_port(args: &[&str]) -> Self {
        Self::on(Some(TakenPort::any()), args)
    }

    #[track_caller]
    fn on(tls_port: Option<TakenPort>, args: &[&str]) -> Self {
        let password = args
            .iter()
            .position(|arg| *arg == "--requirepass")
            .map(|at| args[at + 1].to_string());
        let args = args.iter().map(|arg| arg.to_string()).collect();
        let mut server = Redis {
            child: None,
            port: TakenPort::any(),
            tls_port,
            args,
            password,
            dir: env::server_dir("redis"),
        };
        for _ in 0..20 {
            if server.try_start() {
                return server;
            }
            // Used by another process: nothing reserves a port permanently.
            server.port = TakenPort::any();
            server.tls_port = server.tls_port.take().map(|_| TakenPort::any());
        }
        panic!("found no port for redis-server:\n{}", tail(&server.log(), 20));
    }

    /// Starts a stopped server on the same port, with its saved data.
    #[track_caller]
    pub fn start_again(&mut self) {
        assert!(
            self.try_start(),
            "cannot start redis-server again:\n{}",
            tail(&self.log(), 20)
        );
    }

    /// `false` when another program has the port.
    #[track_caller]
    fn try_start(&mut self) -> bool {
        assert!(self.child.is_none(), "this server runs already");
        let mark = self.log().len();
        let log = OpenOptions::new()
            .create(true)
            .append(true)
            .open(self.log_path())
            .expect("cannot open the log");
        let mut command = Command::new(env::redis_server());
        if let Some(port) = &self.tls_port {
            command.args(["--tls-port", &port.number.to_string()]);
        }
        let child = command
            .args([
                "--port",
                &self.port().to_string(),
                "--bind",
                "127.0.0.1",
                "--protected-mode",
                "no",
            ])
            .args(["--unixsocketperm", "777", "--unixsocket"])
            .arg(self.socket())
            .args(["--save", "", "--daemonize", "no", "--dir"])
            .arg(self.dir.path())
            .args(&self.args)
            .current_dir(self.dir.path())
            .stdin(Stdio::null())
            .stdout(log.try_clone().expect("cannot duplicate the log's handle"))
            .stderr(log)
            .spawn()
            .expect("cannot run redis-server");
        self.child = Some(child);
        eventually("redis-server to answer PING", LIMIT, || {
            if let Some(status) = self.child.as_mut().and_then(|child| child.try_wait().expect("wait")) {
                self.child = None;
                let log = self.log();
                let said = &log[mark..];
                assert!(
                    said.contains("Address already in use") || said.contains("Failed listening"),
                    "redis-server ended while starting, {status}:\n{}",
                    tail(said, 20)
                );
                return Some(false);
            }
            let pong = self.try_conn().ok().is_some_and(|mut conn| conn.check_connection());
            pong.then_some(true)
        })
    }

    pub fn port(&self) -> u16 {
        self.port.number
    }

    /// The TLS port; see [`crate::tls`].
    #[track_caller]
    pub fn tls_port(&self) -> u16 {
        self.tls_port.as_ref().expect("it was started without TLS").number
    }

    pub fn socket(&self) -> PathBuf {
        self.dir.path().join("redis.sock")
    }

    /// The directory of its files.
    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    pub fn password(&self) -> Option<&str> {
        self.password.as_deref()
    }

    /// A TCP connection with a timeout of [`LIMIT`].
    #[track_caller]
    pub fn conn(&self) -> Connection {
        self.try_conn()
            .unwrap_or_else(|error| panic!("cannot connect to Redis: {error}"))
    }

    pub(crate) fn try_conn(&self) -> ::redis::RedisResult<Connection> {
        let user = self
            .password
            .as_ref()
            .map(|password| format!(":{password}@"))
            .unwrap_or_default();
        let client = ::redis::Client::open(format!("redis://{user}127.0.0.1:{}", self.port()))?;
        let conn = client.get_connection_with_timeout(Duration::from_secs(2))?;
        conn.set_read_timeout(Some(LIMIT))?;
        Ok(conn)
    }

    /// One command on a separate connection: `redis.call(&["CONFIG", "SET", "maxmemory", "1mb"])`.
    #[track_caller]
    pub fn call(&self, words: &[&str]) -> Value {
        tell(&mut self.conn(), words)
    }

    /// All entries of a stream; see [`entries`].
    #[track_caller]
    pub fn entries(&self, stream: &str) -> Vec<Entry> {
        entries(&mut self.conn(), stream)
    }

    #[track_caller]
    pub fn xlen(&self, stream: &str) -> usize {
        xlen(&mut self.conn(), stream)
    }

    /// Waits until a stream has `count` entries or more, and returns all of them.
    #[track_caller]
    pub fn wait_entries(&self, stream: &str, count: usize) -> Vec<Entry> {
        let mut conn = self.conn();
        let mut last = 0;
        let deadline = std::time::Instant::now() + LIMIT;
        while std::time::Instant::now() < deadline {
            last = xlen(&mut conn, stream);
            if last >= count {
                return entries(&mut conn, stream);
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        panic!("waited {LIMIT:?} for {count} entries in {stream}; there are {last}");
    }

    /// The longest time between two entries of a stream since `since` (after 1970), by Redis's own clock; `None` if
    /// there are fewer than two.
    #[track_caller]
    pub fn longest_stall(&self, stream: &str, since: Duration) -> Option<Duration> {
        let entries: Vec<(String, Vec<String>)> = cmd("XRANGE")
            .arg(&[stream, &since.as_millis().to_string(), "+"])
            .query(&mut self.conn())
            .expect("a stream");
        let times = entries
            .iter()
            .map(|(id, _)| id.split('-').next().and_then(|ms| ms.parse::<u64>().ok()));
        let times: Vec<u64> = times.map(|ms| ms.expect("an entry id")).collect();
        let longest = times.windows(2).map(|pair| pair[1] - pair[0]).max();
        longest.map(Duration::from_millis)
    }

    /// Whether it computes the lag of consumer groups: Redis does from version 7 on.
    pub fn counts_lag(&self) -> bool {
        let info: String = cmd("INFO").arg("server").query(&mut self.conn()).expect("INFO");
        !info.contains("redis_version:6.")
    }

    pub fn is_running(&self) -> bool {
        self.child.is_some()
    }

    #[track_caller]
    pub fn pid(&self) -> i32 {
        process::pid_of(self.child.as_ref())
    }

    #[track_caller]
    pub fn kill9(&mut self) {
        process::signal(self.pid(), Signal::SIGKILL);
        self.reap();
    }

    /// SHUTDOWN: saves according to its arguments, and exits.
    #[track_caller]
    pub fn shutdown(&mut self) {
        process::signal(self.pid(), Signal::SIGTERM);
        let status = self.child.as_mut().and_then(|child| wait_exit(child, LIMIT));
        assert!(status.is_some(), "redis-server still runs {LIMIT:?} after SIGTERM");
        self.child = None;
    }

    /// Freezes it: the kernel accepts connections and nothing answers.
    #[track_caller]
    pub fn sigstop(&self) {
        process::signal(self.pid(), Signal::SIGSTOP);
    }

    #[track_caller]
    pub fn sigcont(&self) {
        process::signal(self.pid(), Signal::SIGCONT);
    }

    pub fn log(&self) -> String {
        let bytes = std::fs::read(self.log_path()).unwrap_or_default();
        String::from_utf8_lossy(&bytes).into_owned()
    }

    fn log_path(&self) -> PathBuf {
        self.dir.path().join("redis.log")
    }

    fn reap(&mut self) {
        if let Some(mut child) = self.child.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

impl Drop for Redis {
    fn drop(&mut self) {
        self.reap();
    }
}

/// One entry of a stream.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    pub id: String,
    pub fields: Vec<(String, String)>,
}

impl Entry {
    /// The value of the first field of that name.
    pub fn get(&self, name: &str) -> Option<&str> {
        self.fields
            .iter()
            .find(|(field, _)| field == name)
            .map(|(_, value)| value.as_str())
    }

    /// The value of a field that must be there.
    #[track_caller]
    pub fn field(&self, name: &str) -> &str {
        self.get(name).unwrap_or_else(|| panic!("no field {name} in {self:?}"))
    }
}

/// A command of an administrator on a connection that stays open: after `CONFIG SET requirepass` or `maxclients` no new
/// one would be accepted.
#[track_caller]
pub fn tell(conn: &mut impl ConnectionLike, words: &[&str]) -> Value {
    cmd(words[0])
        .arg(&words[1..])
        .query(conn)
        .unwrap_or_else(|error| panic!("{words:?} failed: {error}"))
}

/// All entries of a stream, oldest first; empty if the stream does not exist.
#[track_caller]
pub fn entries(conn: &mut impl ConnectionLike, stream: &str) -> Vec<Entry> {
    let raw: Vec<(String, Vec<String>)> = cmd("XRANGE")
        .arg(stream)
        .arg("-")
        .arg("+")
        .query(conn)
        .unwrap_or_else(|error| panic!("cannot read {stream}: {error}"));
    raw.into_iter()
        .map(|(id, flat)| Entry {
            id,
            fields: flat
                .chunks_exact(2)
                .map(|pair| (pair[0].clone(), pair[1].clone()))
                .collect(),
        })
        .collect()
}

#[track_caller]
pub fn xlen(conn: &mut impl ConnectionLike, stream: &str) -> usize {
    cmd("XLEN")
        .arg(stream)
        .query(conn)
        .unwrap_or_else(|error| panic!("cannot count {stream}: {error}"))
}

/// How often each value of `field` is in a stream: shows duplicates for the ledger.
pub fn counts(entries: &[Entry], field: &str) -> BTreeMap<String, usize> {
    let mut counts = BTreeMap::new();
    for entry in entries {
        *counts.entry(entry.field(field).to_string()).or_default() += 1;
    }
    counts
}
