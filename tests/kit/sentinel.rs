//! Redis sentinels, and a primary with a replica that they watch.

use std::fs::File;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use ::redis::{Connection, Value, cmd};
use tempfile::TempDir;

use crate::port::TakenPort;
use crate::tls::Certificate;
use crate::wait::{LIMIT, eventually};
use crate::{Redis, env};

/// The name by which the sentinels know the primary.
pub const MASTER: &str = "mymaster";

/// How long a primary must be silent before the sentinels begin a failover: a second when figures are measured, and
/// otherwise so long that a busy machine is not taken for a primary that is down.
fn down_after() -> Duration {
    let is_measured = std::env::var_os("OUTBOX_FAILOVERS").is_some();
    Duration::from_secs(if is_measured { 1 } else { 3 })
}

/// One sentinel. Dropping it kills it.
#[derive(Debug)]
pub struct Sentinel {
    child: Option<Child>,
    port: TakenPort,
    tls_port: Option<TakenPort>,
    dir: TempDir,
}

impl Sentinel {
    /// Watches the primary at `port`; `quorum` sentinels must agree that it is down. `more`: further lines of its
    /// configuration.
    #[track_caller]
    pub fn watching(primary: u16, quorum: usize, more: &str) -> Self {
        Self::on(None, primary, quorum, more)
    }

    /// A sentinel that watches the primary over TLS, and also has a TLS port.
    #[track_caller]
    pub fn over_tls(primary: &Redis, certificate: &Certificate, ca_file: &str) -> Self {
        let tls_port = TakenPort::any();
        let more = format!(
            "tls-port {}\ntls-replication yes\ntls-auth-clients no\ntls-cert-file {}\ntls-key-file {}\ntls-ca-cert-file {ca_file}",
            tls_port.number, certificate.cert_file, certificate.key_file
        );
        Self::on(Some(tls_port), primary.tls_port(), 1, &more)
    }

    #[track_caller]
    fn on(tls_port: Option<TakenPort>, primary: u16, quorum: usize, more: &str) -> Self {
        let mut sentinel = Sentinel {
            child: None,
            port: TakenPort::any(),
            tls_port,
            dir: env::server_dir("sentinel"),
        };
        let (port, down_after) = (sentinel.port(), down_after().as_millis());
        let config = format!(
            "port {port}\nbind 127.0.0.1\nprotected-mode no\nsentinel monitor {MASTER} 127.0.0.1 {primary} {quorum}\n\
             sentinel down-after-milliseconds {MASTER} {down_after}\nsentinel failover-timeout {MASTER} 2000\n{more}\n"
        );
        std::fs::write(sentinel.config(), config).expect("cannot write a sentinel's configuration");
        sentinel.start();
        sentinel
    }

    fn config(&self) -> std::path::PathBuf {
        self.dir.path().join("sentinel.conf")
    }

    fn log(&self) -> std::path::PathBuf {
        self.dir.path().join("sentinel.log")
    }

    /// Starts it, or restarts it with the state that it had learnt.
    #[track_caller]
    pub fn start(&mut self) {
        let log = File::create(self.log()).expect("cannot write a log");
        let child = Command::new(env::redis_server())
            .arg(self.config())
            .arg("--sentinel")
            .current_dir(self.dir.path())
            .stdin(Stdio::null())
            .stdout(log.try_clone().expect("cannot duplicate the log's handle"))
            .stderr(log)
            .spawn()
            .expect("cannot run redis-server --sentinel");
        self.child = Some(child);
        eventually("a sentinel to answer", LIMIT, || self.try_conn().ok());
    }

    pub fn port(&self) -> u16 {
        self.port.number
    }

    /// The TLS port.
    #[track_caller]
    pub fn tls_port(&self) -> u16 {
        self.tls_port.as_ref().expect("it was started without TLS").number
    }

    pub fn node(&self) -> String {
        format!("127.0.0.1:{}", self.port())
    }

    fn try_conn(&self) -> ::redis::RedisResult<Connection> {
        let client = ::redis::Client::open(format!("redis://127.0.0.1:{}", self.port()))?;
        let conn = client.get_connection_with_timeout(Duration::from_secs(2))?;
        conn.set_read_timeout(Some(LIMIT))?;
        Ok(conn)
    }

    /// `SENTINEL` with these words.
    pub fn ask(&self, words: &[&str]) -> ::redis::RedisResult<Value> {
        cmd("SENTINEL").arg(words).query(&mut self.try_conn()?)
    }

    /// The port of the primary, according to this sentinel.
    #[track_caller]
    pub fn primary(&self) -> u16 {
        let (_, port): (String, u16) = cmd("SENTINEL")
            .arg(&["GET-MASTER-ADDR-BY-NAME", MASTER])
            .query(&mut self.try_conn().expect("a sentinel runs"))
            .expect("a sentinel knows its primary");
        port
    }

    /// Whether it knows this many other sentinels, and a healthy replica.
    fn knows(&self, others: usize) -> bool {
        let number = |field: &str| -> Option<usize> {
            let fields: Vec<String> = cmd("SENTINEL")
                .arg(&["MASTER", MASTER])
                .query(&mut self.try_conn().ok()?)
                .ok()?;
            let found = fields.chunks_exact(2).find(|pair| pair[0] == field)?;
            found[1].parse().ok()
        };
        number("num-other-sentinels") == Some(others) && number("num-slaves").is_some_and(|n| n >= 1)
    }

    pub fn kill9(&mut self) {
        if let Some(mut child) = self.child.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

impl Drop for Sentinel {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let log = std::fs::read_to_string(self.log()).unwrap_or_default();
            eprintln!("--- the log of {}\n{log}---", self.node());
        }
        self.kill9();
    }
}

/// A primary, its replica, and three sentinels of which two must agree.
#[derive(Debug)]
pub struct Watched {
    pub primary: Redis,
    pub replica: Redis,
    pub sentinels: Vec<Sentinel>,
}

impl Watched {
    #[track_caller]
    pub fn start() -> Self {
        let primary = Redis::with(&["--repl-diskless-sync-delay", "0"]);
        let replica = Redis::replica_with(&primary, &["--repl-diskless-sync-delay", "0"]);
        let sentinels: Vec<Sentinel> = (0..3).map(|_| Sentinel::watching(primary.port(), 2, "")).collect();
        let watched = Watched {
            primary,
            replica,
            sentinels,
        };
        watched.wait_ready();
        watched
    }

    /// Waits until a failover would be possible.
    #[track_caller]
    pub fn wait_ready(&self) {
        eventually("the sentinels to know each other and the replica", LIMIT, || {
            self.sentinels.iter().all(|s| s.knows(2)).then_some(())
        });
    }

    /// The value for `outbox.backends.nodes`.
    pub fn nodes(&self) -> String {
        let nodes: Vec<String> = self.sentinels.iter().map(Sentinel::node).collect();
        format!("{{{}}}", nodes.join(","))
    }

    /// Waits until the replica is the primary: from now on the two have swapped roles. The former primary may be down.
    #[track_caller]
    pub fn wait_failover(&mut self) {
        let port = self.replica.port();
        eventually("a failover", 3 * LIMIT, || {
            let promoted = self.replica.replication("role").as_deref() == Some("master");
            (promoted && self.sentinels.iter().any(|s| s.primary() == port)).then_some(())
        });
        std::mem::swap(&mut self.primary, &mut self.replica);
    }
}
