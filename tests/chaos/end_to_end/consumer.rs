//! The consumers: a process for each stream, as it would be deployed. It first handles what it has read and not
//! acknowledged, in order, and reads more when there is none. The effects and consume_once() are in one transaction,
//! and XACK follows its commit.

use std::process::{Child, Command, Stdio};
use std::time::Duration;

use kit::Dice;
use kit::postgres::{DB, USER};
use kit::process;
use nix::sys::signal::Signal;
use postgres::{Client, Config, NoTls};
use redis::{Connection, cmd};
use uuid::Uuid;

use super::{STREAMS, Site};

/// The table of effects can hold an event twice, so that a repeat is seen. `last` shows at once when an event arrives
/// in another order.
pub(super) const SCHEMA: &str = "
create table effects (position bigint generated always as identity, event_id uuid not null, stream text not null,
    key text not null, version bigint not null);
create table last (key text primary key, version bigint not null default 0);
insert into last select 'k' || n from generate_series(0, 23) n;
create table disorder (event_id uuid, key text, version bigint, expected bigint);
create function apply(event_id uuid, stream text, key text, version bigint) returns void language plpgsql as $$
declare
    expected bigint;
begin
    update last l set version = greatest(l.version, apply.version) where l.key = apply.key returning l.version into strict expected;
    if not exists (select from effects e where e.key = apply.key and e.version = apply.version - 1) and apply.version > 1
        or expected > apply.version then
        insert into disorder values (event_id, key, version, expected);
    end if;
    insert into effects (event_id, stream, key, version) values (event_id, stream, key, version);
end
$$;
create index on effects (key, version);
create role consumer login;
grant select, insert, update on effects, last, disorder to consumer;
select outbox.grant_consumer('consumer', '{group-*}');";

/// How the processes are started: `chaos CONSUMER socket-directory redis-port stream seed careless`.
pub(crate) const WORD: &str = "end-to-end-consumer";

pub(super) struct Consumers {
    host: String,
    port: String,
    dice: Dice,
    careless: bool,
    /// One process for each stream, and those that were frozen and replaced meanwhile.
    children: Vec<Child>,
    frozen: Vec<Child>,
}

impl Consumers {
    pub(super) fn start(site: &Site, seed: u64, careless: bool) -> Self {
        for stream in STREAMS {
            site.redis.call(&["XGROUP", "CREATE", stream, "group", "0", "MKSTREAM"]);
        }
        let mut consumers = Consumers {
            host: site.second.host().display().to_string(),
            port: site.redis.port().to_string(),
            dice: Dice::of(seed, 1_000),
            careless,
            children: Vec::new(),
            frozen: Vec::new(),
        };
        consumers.children = (0..STREAMS.len()).map(|index| consumers.spawn(index)).collect();
        consumers
    }

    fn spawn(&mut self, index: usize) -> Child {
        let program = std::env::current_exe().expect("this program has a path");
        Command::new(program)
            .args([
                WORD,
                &self.host,
                &self.port,
                STREAMS[index],
                &self.dice.number().to_string(),
            ])
            .arg(self.careless.to_string())
            .stdin(Stdio::null())
            .spawn()
            .expect("a consumer starts")
    }

    /// SIGKILL, at any point of its work; another process takes its place.
    pub(super) fn kill(&mut self, index: usize) {
        let next = self.spawn(index);
        let mut old = std::mem::replace(&mut self.children[index], next);
        let _ = old.kill();
        let _ = old.wait();
    }

    /// The process is stopped and replaced, as by a supervisor that takes it for dead.
    pub(super) fn freeze(&mut self, index: usize) {
        process::signal(self.children[index].id() as i32, Signal::SIGSTOP);
        let next = self.spawn(index);
        let old = std::mem::replace(&mut self.children[index], next);
        self.frozen.push(old);
    }

    /// The processes that were taken for dead go on for a moment, beside their replacements.
    pub(super) fn thaw(&mut self) {
        for child in &self.frozen {
            process::signal(child.id() as i32, Signal::SIGCONT);
        }
    }

    /// Ends these processes.
    pub(super) fn end_frozen(&mut self) {
        for mut child in self.frozen.drain(..) {
            let _ = child.kill();
            let _ = child.wait();
        }
    }

    /// Starts consumers again that have ended by themselves.
    pub(super) fn revive(&mut self) {
        for index in 0..self.children.len() {
            if self.children[index].try_wait().expect("a child of ours").is_some() {
                self.children[index] = self.spawn(index);
            }
        }
    }
}

impl Drop for Consumers {
    fn drop(&mut self) {
        self.end_frozen();
        for child in &mut self.children {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// The process of a consumer.
pub(crate) fn main(words: &[String]) -> ! {
    let [host, port, stream, seed, careless] = words else {
        panic!("a consumer needs five words");
    };
    let mut config = Config::new();
    config
        .host_path(host)
        .user("consumer")
        .dbname(DB)
        .connect_timeout(Duration::from_secs(2));
    assert_ne!(USER, "consumer");
    let url = format!("redis://127.0.0.1:{port}");
    let mut consumer = Consumer {
        stream,
        name: format!("group-{stream}"),
        dice: Dice::new(seed.parse().expect("a number")),
        careless: careless == "true",
    };
    // Whatever fails, the consumer begins again, with the entries that it had not acknowledged.
    loop {
        if let (Ok(mut db), Ok(mut redis)) = (config.connect(NoTls), connect(&url)) {
            let _ = consumer.consume(&mut db, &mut redis);
        }
        std::thread::sleep(Duration::from_millis(50));
    }
}

type Failure = Box<dyn std::error::Error>;

fn connect(url: &str) -> Result<Connection, Failure> {
    let connection = redis::Client::open(url)?.get_connection_with_timeout(Duration::from_secs(2))?;
    connection.set_read_timeout(Some(Duration::from_secs(2)))?;
    Ok(connection)
}

struct Consumer<'a> {
    stream: &'a str,
    /// With the inbox.
    name: String,
    dice: Dice,
    /// Without the inbox, to see the test fail.
    careless: bool,
}

struct Event {
    entry: String,
    id: Uuid,
    key: String,
    version: i64,
}

impl Consumer<'_> {
    fn consume(&mut self, db: &mut Client, redis: &mut Connection) -> Result<(), Failure> {
        loop {
            // All entries that were given to this name and are not acknowledged, in the order of the stream. They
            // include what `>` has just brought, and what was given to another process of this name, even a moment ago,
            // whether that one is dead or stopped.
            let events = self.read(redis, "0")?;
            if events.is_empty() {
                self.read(redis, ">")?;
                continue;
            }
            let mut rest = &events[..];
            while !rest.is_empty() {
                // One by one, or several in a transaction.
                let count = match self.dice.one_in(2) {
                    true => 1,
                    false => self.dice.between(1, rest.len() as u64) as usize,
                };
                let (now, later) = rest.split_at(count);
                self.handle(db, now)?;
                for event in now {
                    let _: i64 = cmd("XACK").arg(&[self.stream, "group", &event.entry]).query(redis)?;
                }
                rest = later;
            }
        }
    }

    fn read(&self, redis: &mut Connection, after: &str) -> Result<Vec<Event>, Failure> {
        type Streams = Vec<(String, Vec<(String, Vec<String>)>)>;
        let streams: Option<Streams> = cmd("XREADGROUP")
            .arg(&[
                "GROUP",
                "group",
                "one",
                "COUNT",
                "40",
                "BLOCK",
                "500",
                "STREAMS",
                self.stream,
                after,
            ])
            .query(redis)?;
        let entries = streams.into_iter().flatten().flat_map(|(_, entries)| entries);
        Ok(entries.map(|(entry, fields)| event_of(entry, &fields)).collect())
    }

    fn handle(&mut self, db: &mut Client, events: &[Event]) -> Result<(), Failure> {
        let level = *self
            .dice
            .pick(&["read committed", "read committed", "repeatable read", "serializable"]);
        let mut transaction = db.transaction()?;
        transaction.batch_execute(&format!("set transaction isolation level {level}"))?;
        let new: Vec<Uuid> = match events {
            _ if self.careless => events.iter().map(|event| event.id).collect(),
            [event] => {
                let row = transaction.query_one("select outbox.consume_once($1, $2)", &[&self.name, &event.id])?;
                if row.get(0) { vec![event.id] } else { Vec::new() }
            }
            _ => {
                let ids: Vec<Uuid> = events.iter().map(|event| event.id).collect();
                let rows = transaction.query("select outbox.consume_once($1, $2::uuid[])", &[&self.name, &ids])?;
                rows.iter().map(|row| row.get(0)).collect()
            }
        };
        for id in new {
            let event = events
                .iter()
                .find(|event| event.id == id)
                .ok_or("an id that it was not asked for")?;
            transaction.execute(
                "select apply($1, $2, $3, $4)",
                &[&event.id, &self.stream, &event.key, &event.version],
            )?;
        }
        transaction.commit()?;
        Ok(())
    }
}

fn event_of(entry: String, fields: &[String]) -> Event {
    let get = |name: &str| {
        let pair = fields.chunks_exact(2).find(|pair| pair[0] == name);
        pair.unwrap_or_else(|| panic!("no field {name}"))[1].as_str()
    };
    let cloud_event: serde_json::Value = serde_json::from_str(get("cloud_event")).expect("JSON");
    let data = &cloud_event["data"];
    Event {
        entry,
        id: get("event_id").parse().expect("an id"),
        key: data["key"].as_str().expect("a key").to_owned(),
        version: data["version"].as_i64().expect("a version"),
    }
}
