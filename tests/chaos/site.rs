//! The servers of a run: Postgres, and two Redis stores, each behind a proxy whose address never changes.

use std::num::NonZeroU32;

use kit::{Entry, Postgres, Proxy, Redis, Saved, wait_until};
use relay::event::stream_name::part_of;

use crate::groups;

pub(crate) struct Backend {
    pub name: &'static str,
    /// The index of its store.
    pub store: usize,
    pub streams: Streams,
}

/// Where events of a backend go that name no stream.
#[derive(Clone, Copy)]
pub(crate) enum Streams {
    One(&'static str),
    /// By a template: into one of three streams, by a hash of the subject.
    BySubject,
    /// By a template: into the stream of the event's type. The events are rows of an attached table.
    ByTypeOfRow,
}

pub(crate) const BACKENDS: &[Backend] = &[
    Backend {
        name: "default",
        store: 0,
        streams: Streams::One("events"),
    },
    Backend {
        name: "second",
        store: 0,
        streams: Streams::One("second"),
    },
    Backend {
        name: "third",
        store: 1,
        streams: Streams::One("third"),
    },
    Backend {
        name: "templated",
        store: 1,
        streams: Streams::BySubject,
    },
    Backend {
        name: "rows",
        store: 0,
        streams: Streams::ByTypeOfRow,
    },
];

impl Backend {
    fn stream_name(&self) -> &'static str {
        match self.streams {
            Streams::One(stream) => stream,
            Streams::BySubject => "part{subject|3}",
            Streams::ByTypeOfRow => "rows.{event_type}",
        }
    }

    /// Returns the stream of an event that names none.
    pub(crate) fn stream_of(&self, event_type: &str, subject: Option<&str>) -> String {
        match self.streams {
            Streams::One(stream) => stream.to_owned(),
            Streams::BySubject => {
                let parts = NonZeroU32::new(3).expect("not zero");
                format!("part{}", part_of(subject.expect("a subject"), parts))
            }
            Streams::ByTypeOfRow => format!("rows.{event_type}"),
        }
    }

    /// The stream of all its events, if there is one.
    pub(crate) fn own_stream(&self) -> Option<&'static str> {
        match self.streams {
            Streams::One(stream) => Some(stream),
            Streams::BySubject | Streams::ByTypeOfRow => None,
        }
    }

    /// The streams of events that name none.
    pub(crate) fn all_streams(&self) -> Vec<&'static str> {
        match self.streams {
            Streams::One(stream) => vec![stream],
            Streams::BySubject => vec!["part0", "part1", "part2"],
            Streams::ByTypeOfRow => vec!["rows.item.insert", "rows.item.update", "rows.item.delete"],
        }
    }

    pub(crate) fn takes_rows(&self) -> bool {
        matches!(self.streams, Streams::ByTypeOfRow)
    }
}

/// A stream that publishers name themselves, with any backend.
pub(crate) const NAMED: &str = "named";

/// A key that holds no stream: Redis refuses each event for it, and all of them become failed events.
pub(crate) const CURSED: &str = "cursed";

pub(crate) const STREAMS: &[&str] = &[
    "events",
    "second",
    "third",
    "part0",
    "part1",
    "part2",
    "rows.item.insert",
    "rows.item.update",
    "rows.item.delete",
    "routed",
    "routed0",
    "routed1",
    NAMED,
];

/// Where routes send events of some types, with the stores.
pub(crate) const ROUTED: [(usize, &str); 3] = [(0, "routed"), (1, "routed0"), (1, "routed1")];

const ROUTES: &str = "insert into outbox.routes (event_type, backend, stream)
    values ('routed.*', 'second', 'routed'), ('routed.*', 'third', 'routed{subject|2}')";

/// The name of an event in a stream in the ledger: its id, and the stream if routes send it to several.
pub(crate) fn place_of(event_id: &str, stream: &str) -> String {
    match ROUTED.iter().any(|(_, routed)| *routed == stream) {
        true => format!("{event_id}@{stream}"),
        false => event_id.to_owned(),
    }
}

/// One Redis as its clients see it.
pub(crate) struct Store {
    /// Two servers: a primary and its replica.
    pub nodes: Vec<Redis>,
    /// The node that the proxy leads to.
    pub primary: usize,
    pub proxy: Proxy,
    /// Its data at an earlier time.
    pub saved: Option<Saved>,
    /// This much of an append-only file is never lost: nobody can heal entries that are lost together with their guard.
    pub kept: u64,
}

impl Store {
    fn of(nodes: Vec<Redis>) -> Self {
        let proxy = Proxy::to(nodes[0].port());
        for node in &nodes {
            node.call(&["SET", CURSED, "no stream"]);
        }
        Store {
            nodes,
            primary: 0,
            proxy,
            saved: None,
            kept: 0,
        }
    }

    /// A primary and a replica without append-only files; data are lost by going back to an older RDB file, and in
    /// failovers.
    fn pair() -> Self {
        let args = ["--enable-debug-command", "yes", "--repl-diskless-sync-delay", "0"];
        let primary = Redis::with(&args);
        primary.call(&["SET", CURSED, "no stream"]);
        let replica = Redis::replica_with(&primary, &args);
        let mut store = Store::of(vec![primary]);
        store.nodes.push(replica);
        store
    }

    /// A server with an append-only file, whose end it may lose.
    fn logged() -> Self {
        let store = Store::of(vec![Redis::with(&[
            "--enable-debug-command",
            "yes",
            "--appendonly",
            "yes",
            "--appendfsync",
            "everysec",
            "--auto-aof-rewrite-percentage",
            "0",
        ])]);
        // The end of the append-only file does not include its base file, which therefore keeps the key that holds no
        // stream.
        store.nodes[0].call(&["BGREWRITEAOF"]);
        wait_until("the append-only file to be rewritten", || {
            let info = format!("{:?}", store.nodes[0].call(&["INFO", "persistence"]));
            info.contains("aof_rewrite_in_progress:0") && info.contains("aof_rewrite_scheduled:0")
        });
        store
    }

    pub(crate) fn primary(&self) -> &Redis {
        &self.nodes[self.primary]
    }

    pub(crate) fn primary_mut(&mut self) -> &mut Redis {
        &mut self.nodes[self.primary]
    }

    pub(crate) fn has_replica(&self) -> bool {
        self.nodes.len() > 1
    }
}

pub(crate) struct Site {
    pub pg: Postgres,
    pub stores: Vec<Store>,
    /// Whether the library has fault points.
    pub faults: bool,
    pub exactly_once: bool,
    /// Whether streams are trimmed to what their groups have acknowledged.
    pub groups: bool,
}

const SETTINGS: &[(&str, &str)] = &[
    ("outbox_relay.redis_max_len", "0"),
    ("outbox_relay.poll_interval", "200ms"),
    ("outbox_relay.batch_size", "20"),
    ("outbox_relay.retry_delay", "50ms"),
    ("outbox_relay.retry_max_delay", "500ms"),
    ("outbox_relay.redis_connect_timeout", "400ms"),
    ("outbox_relay.redis_socket_timeout", "400ms"),
    ("max_connections", "60"),
    ("max_prepared_transactions", "40"),
    ("deadlock_timeout", "50ms"),
    ("checkpoint_timeout", "30s"),
];

impl Site {
    /// `mutation`: the fault to put into the library, if any; it needs `faults`.
    pub(crate) fn start(faults: bool, mutation: Option<&str>, at_least_once: bool, groups: bool) -> Self {
        let builder = Postgres::with(SETTINGS);
        let mut pg = if faults { builder.faults() } else { builder }.stopped();
        if let Some(name) = mutation {
            pg.mutation(name);
        }
        pg.start_again();
        pg.extension();
        let stores = vec![Store::pair(), Store::logged()];
        let delivery = if at_least_once { "at_least_once" } else { "exactly_once" };
        for backend in BACKENDS {
            let port = stores[backend.store].proxy.port();
            // The row `default` is there already.
            if backend.name != "default" {
                pg.exec(&format!(
                    "insert into outbox.backends (name, enabled) values ('{}', false)",
                    backend.name
                ));
            }
            let sql = format!(
                "update outbox.backends set enabled = true, host = '127.0.0.1', port = {port}, stream_name = '{}', delivery = '{delivery}' \
                 where name = '{}'",
                backend.stream_name(),
                backend.name
            );
            pg.exec(&sql);
        }
        pg.exec(ROUTES);
        pg.exec(include_str!("schema.sql"));
        let site = Site {
            pg,
            stores,
            faults,
            exactly_once: !at_least_once,
            groups,
        };
        if groups {
            groups::prepare(&site);
        }
        site
    }

    /// All entries that were in a stream of a store and that its Redis has not lost.
    pub(crate) fn entries(&self, store: &Store, stream: &str) -> Vec<Entry> {
        match self.groups {
            true => groups::entries(store.primary(), stream),
            false => store.primary().entries(stream),
        }
    }

    /// How many entries have arrived; with groups, how many the keeper has acknowledged.
    pub(crate) fn arrived(&self, store: &Store, stream: &str) -> usize {
        match self.groups {
            true => groups::archived(store.primary(), stream),
            false => store.primary().xlen(stream),
        }
    }

    /// Each backend sends something, so that its guard is part of whatever Redis keeps.
    pub(crate) fn warm_up(&mut self) {
        for backend in BACKENDS {
            let how = if backend.takes_rows() { "row" } else { "call" };
            self.pg.exec(&format!(
                "select chaos.publish('warm-up', 1, true, 'k0', 1, '{}', null, '{how}', 0, null)",
                backend.name
            ));
            let stream = backend.stream_of("item.insert", Some("k0"));
            self.stores[backend.store].primary().wait_entries(&stream, 1);
        }
        for store in &mut self.stores {
            if store.has_replica() {
                store.nodes[1].wait_caught_up(&store.nodes[0]);
                store.saved = Some(store.primary().saved());
            } else {
                store.kept = store.primary().aof_length();
            }
        }
    }
}
