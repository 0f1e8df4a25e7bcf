//! Redis servers that replicate another, fall behind, and take its place.

use ::redis::cmd;

use crate::Redis;
use crate::redis::tell;
use crate::wait::{LIMIT, eventually};

/// Nothing listens on this port.
const NOBODY: &str = "1";

impl Redis {
    /// A replica of this server, in sync with it.
    #[track_caller]
    pub fn replica_of(primary: &Redis) -> Self {
        Self::replica_with(primary, &[])
    }

    /// The same with further arguments.
    #[track_caller]
    pub fn replica_with(primary: &Redis, args: &[&str]) -> Self {
        let mut words = Vec::new();
        if let Some(password) = primary.password() {
            words.extend(["--requirepass", password, "--masterauth", password]);
        }
        words.extend(args);
        let replica = Redis::with(&words);
        replica.follow(primary);
        replica
    }

    /// Makes this server a replica of `primary`, and waits until it has all of its data. Data that only this server had
    /// are lost.
    #[track_caller]
    pub fn follow(&self, primary: &Redis) {
        // Otherwise it would wait for further replicas first, for five seconds.
        tell(&mut primary.conn(), &["CONFIG", "SET", "repl-diskless-sync-delay", "0"]);
        tell(
            &mut self.conn(),
            &["REPLICAOF", "127.0.0.1", &primary.port().to_string()],
        );
        self.wait_caught_up(primary);
    }

    /// Lets this replica fall behind: it keeps its data, stays read-only, and receives nothing any more until
    /// [`follow`](Self::follow) or [`promote`](Self::promote).
    #[track_caller]
    pub fn lag(&self) {
        tell(&mut self.conn(), &["REPLICAOF", "127.0.0.1", NOBODY]);
    }

    /// Makes this replica a primary, with its present data.
    #[track_caller]
    pub fn promote(&self) {
        tell(&mut self.conn(), &["REPLICAOF", "NO", "ONE"]);
        eventually("a promotion", LIMIT, || {
            (self.replication("role").as_deref() == Some("master")).then_some(())
        });
    }

    /// Promotes this replica, and makes its old primary its replica: a switch of roles, as Sentinel does it. Data that
    /// only the old primary has are lost.
    #[track_caller]
    pub fn take_over_from(&self, primary: &Redis) {
        self.promote();
        primary.follow(self);
    }

    /// Waits until this replica has everything that `primary` has now.
    #[track_caller]
    pub fn wait_caught_up(&self, primary: &Redis) {
        let goal = primary
            .replication("master_repl_offset")
            .and_then(|text| text.parse().ok());
        let goal: u64 = goal.expect("a primary has an offset");
        eventually("a replica to catch up", LIMIT, || {
            let up = self.replication("master_link_status").as_deref() == Some("up");
            let offset: u64 = self.replication("slave_repl_offset")?.parse().ok()?;
            (up && offset >= goal).then_some(())
        });
    }

    /// A line of INFO replication; `None` also while it disconnects its clients, as it does when its role changes.
    pub fn replication(&self, name: &str) -> Option<String> {
        let mut conn = self.try_conn().ok()?;
        let info: String = cmd("INFO").arg("replication").query(&mut conn).ok()?;
        let value = info.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
        value.map(|value| value.trim().to_string())
    }
}
