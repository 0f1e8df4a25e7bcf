//! Consumer groups under chaos, with `trim = 'read'`: they are created and destroyed, and their consumers read,
//! acknowledge and die. No entry may be trimmed that a group has not acknowledged.
//!
//! Each stream has a group `keeper` that archives what it acknowledges, in the same Redis and the same step
//! (`deeds.lua`). A failover or a crash sets back the stream, its groups and the archive together. The verdict compares
//! the ledger with the archive and what is left of the stream, so an entry that went unread is lost, and one that was
//! appended twice is in the archive twice.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use kit::{Dice, Entry, Redis};
use redis::{Connection, RedisResult, Value, cmd};

use crate::site::{BACKENDS, NAMED, ROUTED, Site};
use crate::tail::connect;

const KEEPER: &str = "keeper";
const MOST_PASSING: usize = 4;
/// How long trimming may take once all is acknowledged.
const TRIM_LIMIT: Duration = Duration::from_secs(20);
/// The limits at which backends wait. In a second, a stream receives about half of the smallest limit.
const LIMITS: &[u64] = &[2_000, 0, 4_000, 4_000, 2_000];

/// What XREADGROUP gives: streams with entries of fields and values.
type Read = Option<Vec<(String, Vec<(String, Vec<String>)>)>>;

/// Switches the backends to `trim = 'read'`, and makes the groups that are always there.
pub(crate) fn prepare(site: &Site) {
    for (backend, limit) in BACKENDS.iter().zip(LIMITS) {
        site.pg.exec(&format!(
            "update outbox.backends set trim = 'read', max_len = {limit} where name = '{}'",
            backend.name
        ));
    }
    for (store, stream) in places() {
        let mut conn = site.stores[store].primary().conn();
        deed(&mut conn, stream, "make", KEEPER, &[]).unwrap_or_else(|error| panic!("cannot make a group: {error}"));
    }
}

/// Each stream, with the store that it is in.
fn places() -> impl Iterator<Item = (usize, &'static str)> {
    let own = BACKENDS
        .iter()
        .flat_map(|backend| backend.all_streams().into_iter().map(|stream| (backend.store, stream)));
    own.chain(ROUTED).chain([(0, NAMED), (1, NAMED)])
}

/// All entries that were in a stream, according to that Redis: the archive, and what is still in the stream.
pub(crate) fn entries(redis: &Redis, stream: &str) -> Vec<Entry> {
    let archive: Vec<(String, String)> = cmd("HGETALL")
        .arg(archive(stream))
        .query(&mut redis.conn())
        .unwrap_or_else(|error| panic!("cannot read the archive of {stream}: {error}"));
    let archived = archive.into_iter().map(|(id, fields)| {
        let flat: Vec<String> =
            serde_json::from_str(&fields).unwrap_or_else(|error| panic!("{id} of the archive is no list: {error}"));
        let pairs = flat.chunks_exact(2);
        let fields = pairs.map(|pair| (pair[0].clone(), pair[1].clone())).collect();
        Entry { id, fields }
    });
    let all = archived.chain(redis.entries(stream));
    let ordered: BTreeMap<(u64, u64), Entry> = all.map(|entry| (place(&entry.id), entry)).collect();
    ordered.into_values().collect()
}

/// How many entries were acknowledged by the keeper.
pub(crate) fn archived(redis: &Redis, stream: &str) -> usize {
    cmd("HLEN")
        .arg(archive(stream))
        .query(&mut redis.conn())
        .unwrap_or_else(|error| panic!("cannot count the archive of {stream}: {error}"))
}

fn archive(stream: &str) -> String {
    format!("archive:{stream}")
}

fn place(id: &str) -> (u64, u64) {
    let (ms, seq) = id.split_once('-').unwrap_or((id, "0"));
    (ms.parse().unwrap_or(0), seq.parse().unwrap_or(0))
}

#[derive(Debug, Default)]
struct Tally {
    made: AtomicU64,
    destroyed: AtomicU64,
    died: AtomicU64,
    claimed: AtomicU64,
    /// Entries that are gone, and the groups that had not acknowledged them.
    gone: Mutex<Vec<String>>,
}

/// The consumers of all streams, a thread each.
pub(crate) struct Groups {
    finish: Arc<AtomicBool>,
    stop: Arc<AtomicBool>,
    tally: Arc<Tally>,
    threads: Vec<JoinHandle<()>>,
}

impl Groups {
    pub(crate) fn start(site: &Site, seed: u64) -> Self {
        let (finish, stop) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicBool::new(false)));
        let tally = Arc::new(Tally::default());
        let threads = places().enumerate().map(|(number, (store, stream))| {
            let mut readers = Readers {
                stream,
                ports: site.stores[store].nodes.iter().map(Redis::port).collect(),
                dice: Dice::of(seed, 1_000 + number as u64),
                passing: Vec::new(),
                tally: Arc::clone(&tally),
                finish: Arc::clone(&finish),
            };
            let stop = Arc::clone(&stop);
            std::thread::spawn(move || readers.live(&stop))
        });
        Groups {
            threads: threads.collect(),
            finish,
            stop,
            tally,
        }
    }

    /// From now on only the keepers read, and no consumer dies.
    pub(crate) fn finish(&self) {
        self.finish.store(true, Ordering::Relaxed);
    }

    /// Waits until what was acknowledged is trimmed, and ends. Returns a sentence on what they did, and the violations
    /// by name.
    pub(crate) fn stop(self, site: &Site) -> (String, Vec<(&'static str, Vec<String>)>) {
        let untrimmed = wait_trimmed(site);
        self.stop.store(true, Ordering::Relaxed);
        for thread in self.threads {
            thread.join().expect("a consumer panicked");
        }
        let n = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        let places = || places().map(|(store, stream)| (site.stores[store].primary(), stream));
        let acknowledged: usize = places().map(|(redis, stream)| archived(redis, stream)).sum();
        let left: usize = places().map(|(redis, stream)| redis.xlen(stream)).sum();
        let told = format!(
            "{} groups made, {} destroyed, {} consumers died, {} entries claimed from them; of {acknowledged} entries {} are trimmed",
            n(&self.tally.made),
            n(&self.tally.destroyed),
            n(&self.tally.died),
            n(&self.tally.claimed),
            acknowledged.saturating_sub(left)
        );
        let gone = std::mem::take(&mut *self.tally.gone.lock().expect("nobody panics while counting"));
        (told, vec![("gone unacknowledged", gone), ("untrimmed", untrimmed)])
    }
}

/// Waits until each stream keeps only the entry that was delivered last.
fn wait_trimmed(site: &Site) -> Vec<String> {
    let deadline = Instant::now() + TRIM_LIMIT;
    loop {
        let lengths = places().map(|(store, stream)| (store, stream, site.stores[store].primary().xlen(stream)));
        let left: Vec<String> = lengths
            .filter(|(_, _, length)| *length > 1)
            .map(|(store, stream, length)| format!("{stream} of store {store} still has {length} entries"))
            .collect();
        if left.is_empty() || Instant::now() >= deadline {
            return left;
        }
        std::thread::sleep(Duration::from_millis(100));
    }
}

/// The consumers of one stream.
struct Readers {
    stream: &'static str,
    ports: Vec<u16>,
    dice: Dice,
    /// Groups beside the keeper, oldest first.
    passing: Vec<String>,
    tally: Arc<Tally>,
    finish: Arc<AtomicBool>,
}

impl Readers {
    fn live(&mut self, stop: &AtomicBool) {
        while !stop.load(Ordering::Relaxed) {
            // Redis is down, frozen, loading, full, read-only or without replicas: again later, with the primary of
            // that time.
            let _ = self.connected(stop);
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    fn connected(&mut self, stop: &AtomicBool) -> RedisResult<()> {
        let port = *self.dice.pick(&self.ports);
        let mut conn = connect(port)?;
        let role: Vec<Value> = cmd("ROLE").query(&mut conn)?;
        if role.first() != Some(&Value::BulkString(b"master".to_vec())) {
            return Ok(());
        }
        // The groups according to this Redis.
        let groups: Vec<BTreeMap<String, Value>> = cmd("XINFO").arg(&["GROUPS", self.stream]).query(&mut conn)?;
        let names = groups.iter().filter_map(|group| match group.get("name") {
            Some(Value::BulkString(name)) => String::from_utf8(name.clone()).ok(),
            _ => None,
        });
        self.passing = names.filter(|name| name != KEEPER).collect();
        while !stop.load(Ordering::Relaxed) {
            match self.finish.load(Ordering::Relaxed) {
                false => self.act(&mut conn)?,
                true => self.finish(&mut conn)?,
            }
            std::thread::sleep(self.dice.millis(1, 40));
        }
        Ok(())
    }

    fn act(&mut self, conn: &mut Connection) -> RedisResult<()> {
        let group = match self.passing.len() as u64 {
            0 => KEEPER.to_owned(),
            more => match self.dice.below(more + 1) {
                0 => KEEPER.to_owned(),
                n => self.passing[n as usize - 1].clone(),
            },
        };
        match self.dice.below(12) {
            0 if self.passing.len() < MOST_PASSING => self.make(conn),
            1 if !self.passing.is_empty() => self.leave(conn),
            2 => {
                // A consumer that dies without acknowledging what it has read.
                let consumer = format!("victim{}", self.dice.below(5));
                let read = self.read(conn, &group, &consumer)?;
                self.tally
                    .died
                    .fetch_add(u64::from(!read.is_empty()), Ordering::Relaxed);
                Ok(())
            }
            3 => self.claim(conn, &group),
            _ => self.read_some(conn, &group),
        }
    }

    fn finish(&mut self, conn: &mut Connection) -> RedisResult<()> {
        while !self.passing.is_empty() {
            self.leave(conn)?;
        }
        self.claim(conn, KEEPER)?;
        let read = self.read(conn, KEEPER, "last")?;
        self.acknowledge(conn, KEEPER, &read)
    }

    fn make(&mut self, conn: &mut Connection) -> RedisResult<()> {
        let name = format!("passing{}", self.dice.number());
        deed(conn, self.stream, "make", &name, &[])?;
        self.passing.push(name);
        self.tally.made.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }

    fn leave(&mut self, conn: &mut Connection) -> RedisResult<()> {
        let name = self.passing.remove(0);
        let gone = deed(conn, self.stream, "leave", &name, &[])?;
        self.note_gone(&name, &gone);
        self.tally.destroyed.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }

    /// Reads, and acknowledges all of it or a part.
    fn read_some(&mut self, conn: &mut Connection, group: &str) -> RedisResult<()> {
        let read = self.read(conn, group, "reader")?;
        let some = match self.dice.one_in(4) {
            true => read.len() * self.dice.between(0, 4) as usize / 4,
            false => read.len(),
        };
        self.acknowledge(conn, group, &read[..some])
    }

    fn read(&mut self, conn: &mut Connection, group: &str, consumer: &str) -> RedisResult<Vec<String>> {
        let read: Read = cmd("XREADGROUP")
            .arg(&["GROUP", group, consumer, "COUNT", "200", "STREAMS", self.stream, ">"])
            .query(conn)?;
        let entries = read.into_iter().flatten().flat_map(|(_, entries)| entries);
        Ok(entries.map(|(id, _)| id).collect())
    }

    /// Takes over what dead consumers have left.
    fn claim(&mut self, conn: &mut Connection, group: &str) -> RedisResult<()> {
        // With JUSTID, Redis would not say which entries are gone.
        let claimed: Vec<Value> = cmd("XAUTOCLAIM")
            .arg(&[self.stream, group, "heir", "0", "0", "COUNT", "500"])
            .query(conn)?;
        let entries: Vec<Option<(String, Vec<String>)>> = match claimed.get(1) {
            Some(entries) => redis::from_redis_value(entries.clone())?,
            None => Vec::new(),
        };
        // Since Redis 7, deleted entries are listed separately; before, they are nil.
        let mut gone: Vec<String> = match claimed.get(2) {
            Some(ids) => redis::from_redis_value(ids.clone())?,
            None => Vec::new(),
        };
        gone.extend(entries.iter().filter(|entry| entry.is_none()).map(|_| "?".to_owned()));
        self.note_gone(group, &gone);
        let ids: Vec<String> = entries.into_iter().flatten().map(|(id, _)| id).collect();
        self.tally.claimed.fetch_add(ids.len() as u64, Ordering::Relaxed);
        self.acknowledge(conn, group, &ids)
    }

    fn acknowledge(&mut self, conn: &mut Connection, group: &str, ids: &[String]) -> RedisResult<()> {
        if !ids.is_empty() {
            let gone = deed(conn, self.stream, "acknowledge", group, ids)?;
            self.note_gone(group, &gone);
        }
        Ok(())
    }

    fn note_gone(&self, group: &str, ids: &[String]) {
        let cases = ids
            .iter()
            .map(|id| format!("{} {id}, which group {group} was owed", self.stream));
        let mut gone = self.tally.gone.lock().expect("nobody panics while counting");
        gone.extend(cases);
    }
}

/// Runs one of the actions in `deeds.lua`. Returns the entries that are gone.
fn deed(conn: &mut Connection, stream: &str, what: &str, group: &str, ids: &[String]) -> RedisResult<Vec<String>> {
    cmd("EVAL")
        .arg(&[include_str!("deeds.lua"), "1", stream, what, group])
        .arg(ids)
        .query(conn)
}
