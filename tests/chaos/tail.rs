//! Reads along: remembers every event that was ever in a stream of any Redis, even if that Redis lost it later.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use redis::{Connection, RedisResult, cmd};

use crate::site::{STREAMS, Site, place_of};

/// What XREAD gives: streams with entries of fields and values.
type Read = Option<Vec<(String, Vec<(String, Vec<String>)>)>>;

pub(crate) struct Tail {
    stop: Arc<AtomicBool>,
    threads: Vec<JoinHandle<HashSet<String>>>,
}

impl Tail {
    /// Starts a reader for each node of each store. They do not go through the proxies.
    pub(crate) fn start(site: &Site) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let ports = site
            .stores
            .iter()
            .flat_map(|store| &store.nodes)
            .map(|node| node.port());
        let threads = ports
            .map(|port| {
                let stop = Arc::clone(&stop);
                std::thread::spawn(move || follow(port, &stop))
            })
            .collect();
        Tail { stop, threads }
    }

    /// Returns the event_ids that were in a stream at any time (as far as a reader sees them that is disconnected now
    /// and then).
    pub(crate) fn stop(self) -> HashSet<String> {
        self.stop.store(true, Ordering::Relaxed);
        let mut seen = HashSet::new();
        for thread in self.threads {
            seen.extend(thread.join().expect("a reader panicked"));
        }
        seen
    }
}

fn follow(port: u16, stop: &AtomicBool) -> HashSet<String> {
    let mut seen = HashSet::new();
    let mut last: HashMap<&str, String> = STREAMS.iter().map(|stream| (*stream, "0".to_string())).collect();
    while !stop.load(Ordering::Relaxed) {
        // Redis is down, frozen or loading: again later.
        let _ = connect(port).and_then(|mut conn| read_on(&mut conn, &mut last, &mut seen, stop));
        // After a loss, ids may be smaller than before.
        for id in last.values_mut() {
            let ms: u64 = id.split('-').next().and_then(|ms| ms.parse().ok()).unwrap_or(0);
            *id = format!("{}-0", ms.saturating_sub(10_000));
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    seen
}

pub(crate) fn connect(port: u16) -> RedisResult<Connection> {
    let client = redis::Client::open(format!("redis://127.0.0.1:{port}"))?;
    let conn = client.get_connection_with_timeout(Duration::from_secs(1))?;
    conn.set_read_timeout(Some(Duration::from_secs(2)))?;
    Ok(conn)
}

fn read_on(
    conn: &mut Connection,
    last: &mut HashMap<&str, String>,
    seen: &mut HashSet<String>,
    stop: &AtomicBool,
) -> RedisResult<()> {
    while !stop.load(Ordering::Relaxed) {
        let ids: Vec<&String> = STREAMS.iter().map(|stream| &last[stream]).collect();
        let read: Read = cmd("XREAD")
            .arg(&["COUNT", "500", "BLOCK", "100", "STREAMS"])
            .arg(STREAMS)
            .arg(ids)
            .query(conn)?;
        for (stream, entries) in read.into_iter().flatten() {
            let at = last.get_mut(stream.as_str()).expect("a stream of ours");
            for (id, fields) in entries {
                let event_id = fields.chunks_exact(2).find(|pair| pair[0] == "event_id");
                let unnamed = || format!("(no event_id in {stream} {id})");
                seen.insert(event_id.map_or_else(unnamed, |pair| place_of(&pair[1], &stream)));
                *at = id;
            }
        }
    }
    Ok(())
}
