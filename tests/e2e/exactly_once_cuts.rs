//! The network between relay and Redis breaks at any byte, or delivers late: every event is in its stream once, and in
//! order.

use kit::{
    Postgres, Proxy, QUICK, Redis, Stack, UNTRIMMED, Way, ids, publish_many, standing, wait_drained, wait_eq,
    wait_until,
};
use uuid::Uuid;

/// Only batches are sent on the connection, and the next connection is made at once.
const QUIET: &[(&str, &str)] = &[
    UNTRIMMED,
    ("outbox_relay.poll_interval", "1h"),
    ("outbox_relay.retry_delay", "1ms"),
];

/// A stack with a proxy between the relay and its Redis, which has delivered one event.
struct Line {
    stack: Stack,
    proxy: Proxy,
    published: Vec<Uuid>,
}

impl Line {
    fn open(settings: &[(&str, &str)]) -> Self {
        let postgres = Postgres::with(QUICK).with(QUIET).with(settings);
        let stack = Stack::of(postgres, Redis::start());
        let proxy = stack.through_proxy();
        let mut line = Line {
            stack,
            proxy,
            published: Vec::new(),
        };
        line.publish(1);
        line.wait_all();
        line
    }

    fn publish(&mut self, count: i32) {
        let published = publish_many(&mut self.stack.pg.client(), "default", "", "event", count);
        self.published.extend(published);
    }

    /// Everything is in the stream, once and in order.
    #[track_caller]
    fn wait_all(&self) {
        let found = ids(&self.stack.wait_events(self.published.len()));
        assert!(
            found == self.published,
            "{} of {} events in the stream:\n{found:#?}\n{:#?}",
            found.len(),
            self.published.len(),
            self.published
        );
    }

    /// The same at the end of the test, also according to the saved state.
    #[track_caller]
    fn wait_end(&self) {
        self.proxy.pass();
        wait_drained(&self.stack.pg, "default");
        self.wait_all();
        let published = i64::try_from(self.published.len()).unwrap();
        // A cut may still be pending: then it connects once more.
        wait_eq("its standing", ("idle".to_owned(), published, 0), || {
            let found = standing(&self.stack.pg, "default");
            (found.state, found.published, found.failed)
        });
    }

    /// Publishes in one session, and each time cuts the connection after this many bytes.
    fn cut_at_each(&mut self, way: Way, bytes: impl Iterator<Item = u64>) {
        let mut client = self.stack.pg.client();
        let (mut rounds, mut redis) = (0, self.stack.redis.conn());
        for count in bytes {
            self.proxy.cut_after(way, count);
            self.published
                .extend(publish_many(&mut client, "default", "", "event", 1));
            wait_until("an event in the stream", || {
                kit::xlen(&mut redis, "events") >= self.published.len()
            });
            rounds += 1;
        }
        assert!(
            self.proxy.cuts() > rounds * 9 / 10,
            "{} cuts in {rounds} rounds",
            self.proxy.cuts()
        );
        self.wait_all();
        self.wait_end();
    }

    /// The bytes of one batch of one event in both directions, with the commands that prepare the next batch.
    fn exchange(&mut self) -> [u64; 2] {
        let passed = |line: &Line| [Way::ToServer, Way::ToClient].map(|way| line.proxy.passed(way));
        let before = passed(self);
        self.publish(1);
        self.wait_all();
        // The guard's token comes last: 32 characters of its reply.
        wait_until("the exchange to end", || {
            passed(self)[1] - before[1] > 100 && passed(self)[0] - before[0] > 500
        });
        wait_drained(&self.stack.pg, "default");
        let after = passed(self);
        [after[0] - before[0], after[1] - before[1]]
    }
}

#[test]
fn a_batch_cut_at_any_byte_of_its_way_to_redis_arrives_once() {
    let mut line = Line::open(&[]);
    let [bytes, _] = line.exchange();
    // Within an entry one byte is like another; from the guard on, each is tried.
    let end = bytes.saturating_sub(460);
    line.cut_at_each(Way::ToServer, (0..end).step_by(13).chain(end..bytes + 5));
}

#[test]
fn a_batch_whose_replies_are_cut_at_any_byte_arrives_once() {
    let mut line = Line::open(&[]);
    let [_, bytes] = line.exchange();
    line.cut_at_each(Way::ToClient, 0..bytes + 5);
}

/// The connection of before was cut: now a login, a claim, a check of the last batch or a batch is cut.
#[test]
fn a_claim_cut_at_any_byte_is_made_again() {
    for way in [Way::ToServer, Way::ToClient] {
        let mut line = Line::open(&[]);
        for count in (0..1_600).step_by(13) {
            // The last cut may still be pending: then it is the next connection that is held.
            line.proxy.hold_all(Way::ToClient);
            line.publish(1);
            line.proxy.wait_held(Way::ToClient, 1);
            line.proxy.cut_after(way, count);
            line.proxy.cut();
            line.proxy.release();
            wait_until("an event in the stream", || {
                line.stack.redis.xlen("events") >= line.published.len()
            });
        }
        line.wait_end();
    }
}

/// Redis has executed the batch, and its reply is lost.
#[test]
fn a_batch_whose_reply_is_lost_is_not_repeated() {
    let mut line = Line::open(&[]);
    for _ in 0..20 {
        line.proxy.hold(Way::ToClient);
        line.publish(3);
        wait_eq("entries", line.published.len(), || line.stack.redis.xlen("events"));
        line.proxy.cut();
        line.publish(2);
        line.wait_all();
    }
    line.wait_end();
}

/// No byte of it has arrived at Redis.
#[test]
fn a_batch_that_is_lost_on_its_way_is_sent_again() {
    let mut line = Line::open(&[]);
    for _ in 0..20 {
        line.proxy.hold(Way::ToServer);
        line.publish(3);
        line.proxy.wait_held(Way::ToServer, 1);
        line.proxy.cut();
        line.publish(2);
        line.wait_all();
    }
    line.wait_end();
}

/// The worker is dead, another has appended the batch that was on its way, and then the dead worker's bytes arrive:
/// MULTI, entries and EXEC.
#[test]
fn a_late_write_of_a_dead_worker_changes_nothing() {
    let mut line = Line::open(&[]);
    for round in 0..3 {
        line.proxy.hold(Way::ToServer);
        line.publish(1_000);
        line.proxy.wait_held(Way::ToServer, 30_000);
        line.stack.pg.kill_worker();
        line.wait_all();
        assert_eq!(line.proxy.abandoned(), 1, "round {round}");
        line.late_bytes_change_nothing();
    }
    // The worker lives, and has given up the connection.
    for _ in 0..3 {
        line.proxy.hold(Way::ToServer);
        line.publish(1_000);
        line.wait_all();
        line.late_bytes_change_nothing();
    }
    line.wait_end();
}

impl Line {
    /// Releases the held bytes, and waits until Redis has read them.
    #[track_caller]
    fn late_bytes_change_nothing(&self) {
        wait_drained(&self.stack.pg, "default");
        let guard = self.stack.guard();
        let held = self.proxy.held(Way::ToServer) as u64;
        let passed = self.proxy.passed(Way::ToServer);
        assert!(held > 30_000, "only {held} bytes are held");
        self.proxy.release();
        wait_eq("connections", 1, || self.proxy.connections());
        assert_eq!(self.proxy.passed(Way::ToServer) - passed, held);
        self.wait_all();
        assert_eq!(self.stack.guard(), guard);
    }
}

/// Redis stops in the middle of its work for longer than the relay waits.
#[test]
fn a_redis_that_answers_too_late_gets_nothing_twice() {
    let mut line = Line::open(&[]);
    for _ in 0..3 {
        line.stack.redis.sigstop();
        line.publish(500);
        let accepted = line.proxy.accepted();
        wait_until("further attempts", || line.proxy.accepted() >= accepted + 2);
        line.stack.redis.sigcont();
        line.wait_all();
    }
    line.wait_end();
}
