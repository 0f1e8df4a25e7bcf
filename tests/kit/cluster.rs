//! A Redis Cluster of throwaway servers: three masters, each with a replica.

use std::collections::BTreeSet;
use std::process::Command;
use std::time::Duration;

use ::redis::{Value, cmd};

use crate::redis::{Entry, tell};
use crate::wait::{LIMIT, eventually};
use crate::{Ledger, Postgres, Redis, Verdict};

/// How long a master must be silent before its replica takes its place.
pub const NODE_TIMEOUT: Duration = Duration::from_millis(2_000);

/// Dropping it ends its servers.
#[derive(Debug)]
pub struct Cluster {
    pub nodes: Vec<Redis>,
}

/// A line of CLUSTER NODES, with the fields that tests use.
#[derive(Debug, Clone)]
struct Seen {
    id: String,
    port: u16,
    is_master: bool,
    is_well: bool,
    slots: Vec<(u16, u16)>,
}

impl Redis {
    /// The hash slot of a key, according to this node of a cluster.
    #[track_caller]
    pub fn slot_of(&self, key: &str) -> u16 {
        cmd("CLUSTER")
            .arg(&["KEYSLOT", key])
            .query(&mut self.conn())
            .expect("CLUSTER KEYSLOT")
    }

    /// The name of this node in its cluster.
    #[track_caller]
    pub fn node_id(&self) -> String {
        cmd("CLUSTER")
            .arg("MYID")
            .query(&mut self.conn())
            .expect("CLUSTER MYID")
    }
}

impl Cluster {
    /// Three masters and `replicas` of each.
    #[track_caller]
    pub fn start(replicas: usize) -> Self {
        let timeout = NODE_TIMEOUT.as_millis().to_string();
        let args = [
            "--cluster-enabled",
            "yes",
            "--cluster-node-timeout",
            &timeout,
            "--repl-diskless-sync-delay",
            "0",
        ];
        let count = 3 * (1 + replicas);
        let nodes: Vec<Redis> = (0..count).map(|_| Redis::with(&args)).collect();
        let cluster = Cluster { nodes };
        let addresses: Vec<String> = cluster.nodes.iter().map(at).collect();
        let mut words: Vec<&str> = vec!["create"];
        words.extend(addresses.iter().map(String::as_str));
        let replicas = replicas.to_string();
        words.extend(["--cluster-replicas", &replicas, "--cluster-yes"]);
        manage(&words);
        cluster.wait_well(count);
        cluster
    }

    /// Waits until every node sees `count` healthy nodes, and all slots are served.
    #[track_caller]
    pub fn wait_well(&self, count: usize) {
        eventually("a cluster that is well", 3 * LIMIT, || {
            let is_well = |node: &Redis| {
                let seen = seen_by(node);
                let served: u32 = seen
                    .iter()
                    .flat_map(|n| &n.slots)
                    .map(|(a, b)| u32::from(b - a) + 1)
                    .sum();
                let info: String = cmd("CLUSTER")
                    .arg("INFO")
                    .query(&mut node.conn())
                    .expect("CLUSTER INFO");
                let follows = node.replication("role").as_deref() == Some("master")
                    || node.replication("master_link_status").as_deref() == Some("up");
                served == 16_384
                    && follows
                    && seen.iter().filter(|n| n.is_well).count() == count
                    && info.contains("cluster_state:ok")
            };
            let running: Vec<&Redis> = self.nodes.iter().filter(|n| n.is_running()).collect();
            running.into_iter().all(is_well).then_some(())
        });
    }

    /// The value for `outbox.backends.nodes`.
    pub fn addresses(&self) -> String {
        let nodes: Vec<String> = self.nodes.iter().map(at).collect();
        format!("{{{}}}", nodes.join(","))
    }

    fn seen(&self) -> Vec<Seen> {
        let node = self.nodes.iter().find(|node| node.is_running());
        seen_by(node.expect("a node that runs"))
    }

    /// The index of the node that serves a stream's slot, according to most nodes.
    #[track_caller]
    pub fn master_of(&self, stream: &str) -> usize {
        let slot = self.slot_of(stream);
        eventually("a master of a slot", LIMIT, || {
            let seen = self.seen();
            let serves = |n: &&Seen| n.is_master && n.is_well && n.slots.iter().any(|(a, b)| (*a..=*b).contains(&slot));
            let port = seen.iter().find(serves)?.port;
            self.nodes
                .iter()
                .position(|node| node.port() == port && node.is_running())
        })
    }

    /// The hash slot of a key, according to a server.
    #[track_caller]
    pub fn slot_of(&self, key: &str) -> u16 {
        let node = self
            .nodes
            .iter()
            .find(|node| node.is_running())
            .expect("a node that runs");
        node.slot_of(key)
    }

    /// Names of streams, each in a hash slot of its own.
    #[track_caller]
    pub fn streams(&self, count: usize) -> Vec<String> {
        let mut slots = BTreeSet::new();
        let names = (0..).map(|n| format!("s{n}"));
        names
            .filter(|name| slots.insert(self.slot_of(name)))
            .take(count)
            .collect()
    }

    /// All entries of a stream, from the node that serves it.
    #[track_caller]
    pub fn entries(&self, stream: &str) -> Vec<Entry> {
        self.nodes[self.master_of(stream)].entries(stream)
    }

    #[track_caller]
    pub fn wait_entries(&self, stream: &str, count: usize) -> Vec<Entry> {
        self.nodes[self.master_of(stream)].wait_entries(stream, count)
    }

    /// One command to the node that serves a stream.
    #[track_caller]
    pub fn call(&self, stream: &str, words: &[&str]) -> Value {
        tell(&mut self.nodes[self.master_of(stream)].conn(), words)
    }

    /// Moves `count` slots from the master of one index to that of another, key by key.
    #[track_caller]
    pub fn reshard(&self, from: usize, to: usize, count: usize) {
        let seen = self.seen();
        let id = |index: usize| {
            let found = seen.iter().find(|n| n.port == self.nodes[index].port());
            found.expect("a node that is known").id.clone()
        };
        let (from_id, to_id, count) = (id(from), id(to), count.to_string());
        manage(&[
            "reshard",
            &at(&self.nodes[from]),
            "--cluster-from",
            &from_id,
            "--cluster-to",
            &to_id,
            "--cluster-slots",
            &count,
            "--cluster-yes",
        ]);
    }

    /// Waits until another node serves the slots of this one; returns its index.
    #[track_caller]
    pub fn wait_replaced(&self, killed: usize, stream: &str) -> usize {
        eventually("a replica to take its master's place", 3 * LIMIT, || {
            let master = Some(self.master_of(stream)).filter(|master| *master != killed)?;
            let info: String = cmd("CLUSTER")
                .arg("INFO")
                .query(&mut self.nodes[master].conn())
                .expect("CLUSTER INFO");
            info.contains("cluster_state:ok").then_some(master)
        })
    }

    /// Compares the ledger with these streams of a backend.
    #[track_caller]
    pub fn verdict(&self, pg: &Postgres, backend: &str, streams: &[String]) -> Verdict {
        let read = |stream: &str| {
            let entries = self.entries(stream);
            entries
                .iter()
                .map(|entry| entry.field("event_id").to_string())
                .collect()
        };
        Ledger::verdict_of(pg, backend, streams, read)
    }
}

fn at(node: &Redis) -> String {
    format!("127.0.0.1:{}", node.port())
}

#[track_caller]
fn manage(words: &[&str]) {
    let output = Command::new("redis-cli")
        .arg("--cluster")
        .args(words)
        .output()
        .expect("cannot run redis-cli");
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "redis-cli --cluster {words:?}:\n{said}");
}

fn seen_by(node: &Redis) -> Vec<Seen> {
    let text: String = cmd("CLUSTER")
        .arg("NODES")
        .query(&mut node.conn())
        .expect("CLUSTER NODES");
    text.lines().filter_map(seen_in).collect()
}

/// `id host:port@bus flags master ping pong epoch link slot slot-slot ...`
fn seen_in(line: &str) -> Option<Seen> {
    let words: Vec<&str> = line.split_whitespace().collect();
    let port = words.get(1)?.split('@').next()?.rsplit(':').next()?.parse().ok()?;
    let slots = words[8..]
        .iter()
        .filter(|word| !word.starts_with('['))
        .filter_map(|word| {
            let (first, last) = word.split_once('-').unwrap_or((word, word));
            Some((first.parse().ok()?, last.parse().ok()?))
        });
    Some(Seen {
        id: words[0].to_string(),
        port,
        is_master: words[2].contains("master"),
        is_well: !words[2].contains("fail") && !words[2].contains("handshake") && words[7] == "connected",
        slots: slots.collect(),
    })
}
