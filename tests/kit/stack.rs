//! Postgres with the extension, and the Redis that it relays to.

use uuid::Uuid;

use crate::postgres::builder::Builder;
use crate::{
    Entry, Postgres, Proxy, Redis, ids, publish_many, standing, wait_drained, wait_eq, wait_trouble, wait_until,
};

/// The stream of the backend `default`.
pub const STREAM: &str = "events";

/// The error of a backend as users see it.
pub struct Trouble<'a> {
    pub state: &'a str,
    /// A part of last_error.
    pub error: &'a str,
    /// How the hint in the log begins.
    pub hint: &'a str,
}

/// Redis or the network to it is not ready.
pub fn backoff<'a>(error: &'a str, hint: &'a str) -> Trouble<'a> {
    Trouble {
        state: "backoff",
        error,
        hint,
    }
}

/// Somebody must correct a setting.
pub fn misconfigured<'a>(error: &'a str, hint: &'a str) -> Trouble<'a> {
    Trouble {
        state: "misconfigured",
        error,
        hint,
    }
}

/// Both servers, the extension created in the database `postgres`, its `default` backend pointed at `redis`.
#[derive(Debug)]
pub struct Stack {
    // Stopped first: otherwise it would log that Redis is gone.
    pub pg: Postgres,
    pub redis: Redis,
}

impl Stack {
    #[track_caller]
    pub fn start() -> Self {
        Self::with(&[])
    }

    /// With these settings in postgresql.conf.
    #[track_caller]
    pub fn with(settings: &[(&str, &str)]) -> Self {
        Self::of(Postgres::with(settings), Redis::start())
    }

    #[track_caller]
    pub fn of(postgres: Builder, redis: Redis) -> Self {
        let stack = Stack {
            pg: postgres.start(),
            redis,
        };
        stack.pg.extension();
        stack.point("default", &stack.redis);
        stack
    }

    /// Points a backend at a Redis server's TCP port.
    #[track_caller]
    pub fn point(&self, backend: &str, redis: &Redis) {
        self.point_at(backend, "127.0.0.1", redis.port());
    }

    #[track_caller]
    pub fn point_at(&self, backend: &str, host: &str, port: u16) {
        let port = i32::from(port);
        let changed = self
            .pg
            .client()
            .execute(
                "update outbox.backends set host = $1, port = $2 where name = $3",
                &[&host, &port, &backend],
            )
            .unwrap_or_else(|error| panic!("cannot point {backend} at {host}:{port}: {error:?}"));
        assert_eq!(changed, 1, "there is no backend {backend}");
    }

    /// A proxy between the relay and its Redis, through which the backend `default` is connected when this returns.
    #[track_caller]
    pub fn through_proxy(&self) -> Proxy {
        let proxy = Proxy::to(self.redis.port());
        self.point_at("default", "127.0.0.1", proxy.port());
        wait_until("the relay to come by the proxy", || proxy.connections() == 1);
        proxy
    }

    /// Publishes one event of this type, with `{"type": event_type}` as its data, in a separate transaction.
    #[track_caller]
    pub fn publish(&self, event_type: &str) -> Uuid {
        self.pg
            .client()
            .query_one(
                "select outbox.publish_event($1, 'kit', pg_catalog.jsonb_build_object('type', $1::text))",
                &[&event_type],
            )
            .unwrap_or_else(|error| panic!("cannot publish {event_type}: {error:?}"))
            .get(0)
    }

    /// Publishes events of these types that Redis refuses, into the stream "wrong" and to this backend, and waits until
    /// they have failed.
    #[track_caller]
    pub fn fail(&self, backend: &str, event_types: &[&str]) {
        self.redis.call(&["SET", "wrong", "no stream"]);
        let failed = || self.pg.one::<i64>("select count(*) from outbox.failed_events");
        let expected = failed() + event_types.len() as i64;
        for event_type in event_types {
            self.pg.exec(&format!(
                "select outbox.publish_event('{event_type}', 'kit', backend => '{backend}', stream => 'wrong', max_retries => 1)"
            ));
        }
        wait_eq("failed events", expected, failed);
    }

    /// Publishes this many events to the backend `default`, and waits until it is in this state with an error that
    /// contains `error`, and until the log has the hint: they all wait, and none has failed.
    #[track_caller]
    pub fn publish_into(&self, trouble: &Trouble<'_>, count: i32) -> Vec<Uuid> {
        let published = publish_many(&mut self.pg.client(), "default", "", "waits", count);
        let found = wait_trouble(&self.pg, "default", trouble.state, trouble.error);
        assert_eq!((found.pending, found.failed), (i64::from(count), 0), "{found:?}");
        self.pg.wait_log(&format!("HINT:  {}", trouble.hint));
        published
    }

    /// Waits until exactly the published events are in the stream of the backend `default` in this Redis, in order, and
    /// nothing has failed.
    #[track_caller]
    pub fn assert_mended(&self, redis: &Redis, published: &[Uuid]) {
        redis.wait_entries(STREAM, published.len());
        wait_drained(&self.pg, "default");
        assert_eq!(ids(&redis.entries(STREAM)), published);
        let kept: i64 = self
            .pg
            .one("select (select count(*) from outbox.failed_events) + (select count(*) from outbox.refused_events)");
        assert_eq!((standing(&self.pg, "default").failed, kept), (0, 0));
        wait_eq("the state", "idle".to_string(), || standing(&self.pg, "default").state);
    }

    /// All entries in the stream of the backend `default`.
    #[track_caller]
    pub fn events(&self) -> Vec<Entry> {
        self.redis.entries(STREAM)
    }

    /// The same, once it has `count` entries or more.
    #[track_caller]
    pub fn wait_events(&self, count: usize) -> Vec<Entry> {
        self.redis.wait_entries(STREAM, count)
    }
}
