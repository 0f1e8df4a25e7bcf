//! Consumer groups, with a ledger of the entries that each has acknowledged.

use std::collections::BTreeSet;

use ::redis::{Connection, ConnectionLike, Value, cmd, pipe};
use uuid::Uuid;

use crate::redis::{entries, tell};
use crate::wait::wait_until;
use crate::{Entry, ids};

/// A group of one stream, and its ledger: the entries that it has not acknowledged yet.
pub struct Group {
    pub stream: String,
    pub name: String,
    /// Entries that it has seen, or that were there when it was created, and that it has not acknowledged.
    pub owed: BTreeSet<String>,
    /// The entries that it has acknowledged, in order.
    pub acknowledged: Vec<Uuid>,
}

/// The arguments of a consumer's read of new entries, such as `COUNT 2`.
pub fn xreadgroup<'w>(group: &'w str, consumer: &'w str, options: &[&'w str], stream: &'w str) -> Vec<&'w str> {
    let before = ["XREADGROUP", "GROUP", group, consumer];
    [&before, options, &["STREAMS", stream, ">"]].concat()
}

type Raw = Vec<(String, Vec<String>)>;

impl Group {
    /// Creates a group that begins with the oldest entry. It must get all entries that are in the stream at that
    /// moment.
    #[track_caller]
    pub fn create(conn: &mut impl ConnectionLike, stream: &str, name: &str) -> Self {
        let (_, there): (String, Raw) = pipe()
            .atomic()
            .cmd("XGROUP")
            .arg(&["CREATE", stream, name, "0", "MKSTREAM"])
            .cmd("XRANGE")
            .arg(&[stream, "-", "+"])
            .query(conn)
            .unwrap_or_else(|error| panic!("cannot make group {name} of {stream}: {error}"));
        Self {
            stream: stream.to_owned(),
            name: name.to_owned(),
            owed: there.into_iter().map(|(id, _)| id).collect(),
            acknowledged: Vec::new(),
        }
    }

    /// Reads up to `count` new entries as a consumer.
    pub fn read(&mut self, conn: &mut impl ConnectionLike, consumer: &str, count: usize) -> Vec<Entry> {
        let read: Option<Vec<(String, Raw)>> = cmd("XREADGROUP")
            .arg(&["GROUP", &self.name, consumer, "COUNT"])
            .arg(count)
            .arg(&["STREAMS", &self.stream, ">"])
            .query(conn)
            .unwrap_or_else(|error| panic!("group {} cannot read {}: {error}", self.name, self.stream));
        let read: Raw = read
            .unwrap_or_default()
            .into_iter()
            .flat_map(|(_, read)| read)
            .collect();
        self.owed.extend(read.iter().map(|(id, _)| id.clone()));
        read.into_iter().map(entry_of).collect()
    }

    /// Takes over the entries that other consumers have not acknowledged.
    pub fn claim(&mut self, conn: &mut impl ConnectionLike, consumer: &str) -> Vec<Entry> {
        let (_, claimed): (String, Vec<(String, Vec<String>)>) = {
            let raw: Vec<Value> = cmd("XAUTOCLAIM")
                .arg(&[&self.stream, &self.name, consumer, "0", "0", "COUNT", "1000"])
                .query(conn)
                .unwrap_or_else(|error| panic!("group {} cannot claim: {error}", self.name));
            let mut raw = raw.into_iter();
            let next = ::redis::from_redis_value(raw.next().expect("a cursor")).expect("a cursor");
            let claimed = ::redis::from_redis_value(raw.next().expect("entries")).expect("entries that are there");
            (next, claimed)
        };
        claimed.into_iter().map(entry_of).collect()
    }

    pub fn acknowledge(&mut self, conn: &mut impl ConnectionLike, read: &[Entry]) {
        if read.is_empty() {
            return;
        }
        let mut ack = cmd("XACK");
        ack.arg(&[&self.stream, &self.name]);
        read.iter().for_each(|entry| {
            ack.arg(&entry.id);
        });
        let _: i64 = ack
            .query(conn)
            .unwrap_or_else(|error| panic!("group {} cannot acknowledge: {error}", self.name));
        for entry in read {
            self.owed.remove(&entry.id);
        }
        self.acknowledged.extend(ids(read));
    }

    /// Reads and acknowledges all that there is.
    pub fn drain(&mut self, conn: &mut impl ConnectionLike) {
        loop {
            let read = self.read(conn, "drainer", 100);
            if read.is_empty() {
                return;
            }
            self.acknowledge(conn, &read);
        }
    }

    /// Reads and acknowledges until it has had this many entries.
    #[track_caller]
    pub fn wait_acknowledged(&mut self, conn: &mut impl ConnectionLike, count: usize) {
        let what = format!("group {} to get {count} entries", self.name);
        wait_until(&what, || {
            self.drain(conn);
            self.acknowledged.len() >= count
        });
    }

    /// Entries that it has not acknowledged and that are gone.
    pub fn missing(&self, conn: &mut Connection) -> Vec<String> {
        let there: BTreeSet<String> = entries(conn, &self.stream).into_iter().map(|entry| entry.id).collect();
        self.owed.difference(&there).cloned().collect()
    }

    #[track_caller]
    pub fn assert_nothing_lost(&self, conn: &mut Connection) {
        let missing = self.missing(conn);
        assert!(
            missing.is_empty(),
            "group {} of {} had not acknowledged what is gone: {missing:?}",
            self.name,
            self.stream
        );
    }

    pub fn destroy(self, conn: &mut impl ConnectionLike) {
        tell(conn, &["XGROUP", "DESTROY", &self.stream, &self.name]);
    }
}

fn entry_of((id, flat): (String, Vec<String>)) -> Entry {
    let pairs = flat.chunks_exact(2);
    Entry {
        id,
        fields: pairs.map(|pair| (pair[0].clone(), pair[1].clone())).collect(),
    }
}
