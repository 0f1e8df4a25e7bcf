//! `wait_replicas`: a batch counts as delivered once replicas have it, and is not repeated because of the wait.

use kit::{
    Postgres, QUICK, Redis, Stack, UNTRIMMED, ids, publish_many, standing, wait_drained, wait_eq, wait_trouble,
    wait_until,
};
use uuid::Uuid;

const TOO_FEW: &str = "NOREPLICAS only 0 of 1 replicas have the batch";

/// A stack whose backend waits for the only replica.
struct Pair {
    stack: Stack,
    replica: Redis,
    published: Vec<Uuid>,
}

impl Pair {
    fn start(delivery: &str) -> Self {
        let redis = Redis::start();
        let replica = Redis::replica_of(&redis);
        // A refresh of the guard waits for replicas like a batch, and would be before it.
        let postgres = Postgres::with(QUICK).with(&[UNTRIMMED, ("outbox_relay.poll_interval", "1h")]);
        let stack = Stack::of(postgres, redis);
        stack.pg.exec(&format!(
            "update outbox.backends set wait_replicas = 1, delivery = '{delivery}'"
        ));
        Pair {
            stack,
            replica,
            published: Vec::new(),
        }
    }

    /// Ten events are delivered, and ten more wait for the replica, which is stopped.
    fn stuck(delivery: &str) -> Self {
        let mut pair = Self::start(delivery);
        pair.publish(10);
        pair.wait_delivered();
        pair.replica.sigstop();
        pair.publish(10);
        pair.wait_stuck(10);
        pair
    }

    fn publish(&mut self, count: i32) {
        let published = publish_many(&mut self.stack.pg.client(), "default", "", "event", count);
        self.published.extend(published);
    }

    /// All of it is in the stream once and in order, on both servers, and nothing is pending.
    #[track_caller]
    fn wait_delivered(&self) {
        wait_drained(&self.stack.pg, "default");
        assert_eq!(ids(&self.stack.events()), self.published);
        assert_eq!(ids(&self.replica.entries("events")), self.published);
        wait_eq("the state", "idle".to_string(), || {
            standing(&self.stack.pg, "default").state
        });
    }

    /// The primary has it, the replica has not, so it is not delivered.
    #[track_caller]
    fn wait_stuck(&self, pending: i64) {
        assert_eq!(ids(&self.stack.wait_events(self.published.len())), self.published);
        let found = wait_trouble(&self.stack.pg, "default", "backoff", TOO_FEW);
        assert_eq!((found.pending, found.failed), (pending, 0), "{found:?}");
    }

    /// The number of WAITs that Redis has received.
    fn waits(&self) -> u64 {
        let info: String = redis::cmd("INFO")
            .arg("commandstats")
            .query(&mut self.stack.redis.conn())
            .expect("INFO");
        let line = info.lines().find(|line| line.starts_with("cmdstat_wait:"));
        let calls = line.and_then(|line| line.split_once("calls=")?.1.split(',').next()?.parse().ok());
        calls.unwrap_or(0)
    }
}

/// The ids of the relay's connections.
fn connections(redis: &Redis) -> Vec<u64> {
    let clients: String = redis::cmd("CLIENT")
        .arg("LIST")
        .query(&mut redis.conn())
        .expect("CLIENT LIST");
    let ours = clients.lines().filter(|line| line.contains("name=outbox_relay"));
    let id = |line: &str| line.strip_prefix("id=")?.split(' ').next()?.parse().ok();
    ours.filter_map(id).collect()
}

#[test]
fn batches_are_delivered_when_a_replica_has_them() {
    for delivery in ["exactly_once", "at_least_once"] {
        let mut pair = Pair::start(delivery);
        for _ in 0..5 {
            pair.publish(3);
        }
        pair.publish(500);
        pair.wait_delivered();
        assert!(pair.waits() > 2, "{delivery}");
        assert_eq!(standing(&pair.stack.pg, "default").published, 515);
    }
}

/// Its primary continues without it, and the relay waits for it.
#[test]
fn a_stopped_replica_delays_the_next_batch_and_repeats_nothing() {
    for delivery in ["exactly_once", "at_least_once"] {
        let mut pair = Pair::stuck(delivery);
        // It repeats the WAIT, and sends nothing meanwhile.
        let waits = pair.waits();
        wait_until("further WAITs", || pair.waits() >= waits + 3);
        assert_eq!(pair.stack.redis.xlen("events"), 20, "{delivery}");
        let more = publish_many(&mut pair.stack.pg.client(), "default", "", "more", 10);
        wait_eq("pending events", 20, || standing(&pair.stack.pg, "default").pending);
        pair.published.extend(more);
        pair.replica.sigcont();
        pair.wait_delivered();
        assert!(pair.stack.pg.log().contains(TOO_FEW));
    }
}

/// The batch is in the stream and in the guard: a new worker finds it there, and waits for the replica too.
#[test]
fn a_worker_that_is_killed_while_it_waits_still_waits_for_the_replica() {
    let mut pair = Pair::stuck("exactly_once");
    for end in [Postgres::kill_worker, |pg: &Postgres| {
        pg.exec("select pg_terminate_backend(pid) from pg_stat_activity where backend_type = 'outbox_relay worker'");
    }] {
        let old = pair.stack.pg.wait_worker("postgres");
        end(&pair.stack.pg);
        pair.stack.pg.wait_new_worker(old);
        let waits = pair.waits();
        wait_until("further WAITs", || pair.waits() >= waits + 3);
        pair.wait_stuck(10);
    }
    pair.replica.sigcont();
    pair.wait_delivered();
    pair.publish(10);
    pair.wait_delivered();
}

#[test]
fn wait_replicas_zero_ends_the_wait() {
    for delivery in ["exactly_once", "at_least_once"] {
        let mut pair = Pair::start(delivery);
        pair.publish(10);
        pair.wait_delivered();
        pair.replica.sigstop();
        if delivery == "exactly_once" {
            pair.publish(10);
            pair.wait_stuck(10);
        }
        pair.stack.pg.exec("update outbox.backends set wait_replicas = 0");
        pair.publish(10);
        wait_drained(&pair.stack.pg, "default");
        assert_eq!(ids(&pair.stack.events()), pair.published, "{delivery}");
        // And back again.
        pair.stack.pg.exec("update outbox.backends set wait_replicas = 1");
        let before = pair.published.len();
        pair.publish(10);
        let found = wait_trouble(&pair.stack.pg, "default", "backoff", TOO_FEW);
        assert_eq!((found.pending, found.failed), (10, 0), "{found:?}");
        if delivery == "exactly_once" {
            // The claim of the new connection is the first that the replica must have.
            assert_eq!(pair.stack.redis.xlen("events"), before);
        }
        pair.replica.sigcont();
        pair.wait_delivered();
    }
}

/// Each change of settings begins a new connection; the old one ends, however long the replica is away.
#[test]
fn a_replaced_connection_does_not_keep_waiting() {
    for delivery in ["exactly_once", "at_least_once"] {
        let pair = Pair::stuck(delivery);
        for timeout_ms in [700, 800, 900] {
            let before = connections(&pair.stack.redis);
            let timeout = format!("update outbox.backends set socket_timeout = '{timeout_ms} ms'");
            pair.stack.pg.exec(&timeout);
            wait_until("a new connection, alone", || {
                let now = connections(&pair.stack.redis);
                now.len() == 1 && now != before
            });
        }
        pair.replica.sigcont();
        wait_drained(&pair.stack.pg, "default");
    }
}

/// There is one replica, and two are required.
#[test]
fn with_too_few_replicas_all_events_wait() {
    let mut pair = Pair::start("exactly_once");
    pair.stack.pg.exec("update outbox.backends set wait_replicas = 2");
    pair.publish(5);
    let found = wait_trouble(
        &pair.stack.pg,
        "default",
        "backoff",
        "NOREPLICAS only 1 of 2 replicas have the batch",
    );
    assert_eq!(found.pending, 5);
    let second = Redis::replica_of(&pair.stack.redis);
    pair.wait_delivered();
    assert_eq!(ids(&second.entries("events")), pair.published);
}

/// Everything that counted as delivered exists after a failover: nothing needs healing.
#[test]
fn a_failover_to_a_replica_that_was_waited_for_loses_nothing() {
    let mut pair = Pair::start("exactly_once");
    for _ in 0..5 {
        pair.publish(20);
    }
    pair.wait_delivered();
    pair.stack.redis.kill9();
    pair.replica.promote();
    pair.stack.pg.exec("update outbox.backends set wait_replicas = 0");
    pair.stack.point("default", &pair.replica);
    pair.publish(20);
    assert_eq!(ids(&pair.replica.wait_entries("events", 120)), pair.published);
    wait_drained(&pair.stack.pg, "default");
    assert_eq!(
        pair.stack.pg.one::<i64>("select healings from outbox.backend_status"),
        0
    );
}
