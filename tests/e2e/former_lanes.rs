//! Lanes of a cluster that were given up, when others do something to them meanwhile: administrators, copies of the
//! database, other servers.

use kit::owners::{PATIENCE, WATCHFUL};
use kit::{
    Cluster, LIMIT, Postgres, QUICK, Redis, Stack, UNTRIMMED, eventually, holds_for, ids, publish_many, standing,
    wait_drained, wait_eq, wait_trouble, wait_until,
};
use uuid::Uuid;

const MOST_LANES: usize = 64;

/// A cluster, and a server whose backend `default` uses it and has given up two of its lanes.
struct Given {
    cluster: Cluster,
    stack: Stack,
    streams: Vec<String>,
}

fn point(stack: &Stack, db: &str, cluster: &Cluster) {
    let sql = format!(
        "update outbox.backends set mode = 'cluster', nodes = '{}', host = null, port = null, on_missing_guard = 'halt'",
        cluster.addresses()
    );
    stack.pg.exec_db(db, &sql);
}

/// Publishes an event to each stream, in one transaction.
fn publish_to_all(pg: &Postgres, db: &str, streams: &[String]) {
    pg.exec_db(
        db,
        &format!(
            "select outbox.publish_event('event', 'kit', stream => s) from unnest('{{{}}}'::text[]) s",
            streams.join(",")
        ),
    );
}

fn publish(pg: &Postgres, stream: &str) -> Vec<Uuid> {
    publish_many(&mut pg.client(), "default", stream, "event", 1)
}

fn take_over(pg: &Postgres) {
    pg.exec("select outbox.take_over('default')");
    wait_taken_over(pg);
}

/// Waits until all lanes but former ones have carried out what was ordered.
#[track_caller]
fn wait_taken_over(pg: &Postgres) {
    wait_eq("take-overs that were asked for", 0i64, || {
        pg.one("select count(*) from outbox.take_overs")
    });
}

impl Given {
    fn up(settings: &[(&str, &str)]) -> Self {
        Self::up_in("postgres", settings)
    }

    fn up_in(db: &str, settings: &[(&str, &str)]) -> Self {
        let cluster = Cluster::start(0);
        let stack = Stack::of(Postgres::with(settings).with(&[UNTRIMMED]), Redis::start());
        if db != "postgres" {
            stack.pg.exec(&format!("create database {db}"));
            stack.pg.exec_db(db, "create extension outbox_relay");
        }
        point(&stack, db, &cluster);
        let streams = cluster.streams(MOST_LANES + 2);
        publish_to_all(&stack.pg, db, &streams);
        for stream in &streams {
            cluster.wait_entries(stream, 1);
        }
        let given = Self {
            cluster,
            stack,
            streams,
        };
        wait_eq("former lanes", 2, || given.former_in(db).len());
        wait_eq("its state", "idle".to_string(), || {
            given.stack.pg.one_db(db, "select state from outbox.backend_status")
        });
        given
    }

    /// The streams of the lanes that were given up.
    fn former_in(&self, db: &str) -> Vec<&String> {
        let slots: Vec<i32> = self
            .stack
            .pg
            .one_db(db, "select coalesce(array_agg(slot), '{}') from outbox.former_lanes");
        let is_former = |stream: &&String| slots.contains(&i32::from(self.cluster.slot_of(stream)));
        self.streams.iter().filter(is_former).collect()
    }

    fn former(&self) -> Vec<&String> {
        self.former_in("postgres")
    }

    /// Streams whose lanes were not given up.
    fn served(&self) -> Vec<&String> {
        let former = self.former();
        self.streams.iter().filter(|stream| !former.contains(stream)).collect()
    }

    /// Waits until all that was published to a stream is there, besides its first event.
    #[track_caller]
    fn wait_arrived(&self, stream: &str, published: &[Uuid]) {
        let arrived = eventually(&format!("entries of {stream}"), LIMIT, || {
            let arrived = ids(&self.cluster.entries(stream));
            (arrived.len() > published.len()).then_some(arrived)
        });
        assert_eq!(&arrived[1..], published, "{stream}");
    }
}

/// The guards of a copied database have other keys. That they are not there is no loss.
#[test]
fn a_copied_database_takes_up_former_lanes_without_a_guard() {
    let given = Given::up_in("shop", QUICK);
    let former = given.former_in("shop")[0].clone();
    let pg = &given.stack.pg;
    pg.exec("create database staging template shop");
    pg.exec_db("staging", "select outbox.take_over('default')");
    publish_to_all(pg, "staging", std::slice::from_ref(&former));
    assert_eq!(given.cluster.wait_entries(&former, 2).len(), 2);
    wait_eq("the copy's state", "idle".to_string(), || {
        pg.one_db("staging", "select state from outbox.backend_status")
    });
}

/// An order to take over counts only where it was given, also for lanes that go on later.
#[test]
fn a_take_over_of_former_lanes_is_not_inherited_by_a_copy() {
    let given = Given::up(WATCHFUL);
    let former = given.former()[0].clone();
    let pg = &given.stack.pg;
    take_over(pg);
    assert_eq!(given.former().len(), 2);
    let clone = pg.base_backup().start();
    publish(&clone, &former);
    holds_for(6 * PATIENCE, "the copy sends nothing", || {
        given.cluster.entries(&former).len() == 1
    });
    let published = publish(pg, &former);
    given.wait_arrived(&former, &published);
}

/// An order that a former lane has not carried out yet ends when somebody else takes over later.
#[test]
fn a_former_lane_does_not_rob_a_later_owner() {
    let given = Given::up(WATCHFUL);
    let former = given.former()[0].clone();
    let pg = &given.stack.pg;
    take_over(pg);
    let clone = pg.base_backup().start();
    clone.exec("select outbox.take_over('default')");
    let its_place = format!("{}#", clone.data_dir().display());
    wait_trouble(pg, "default", "fenced", &its_place);
    let mut published = publish(&clone, &former);
    given.wait_arrived(&former, &published);
    publish(pg, &former);
    holds_for(6 * PATIENCE, "the former owner sends nothing", || {
        given.cluster.entries(&former).len() == 2
    });
    published.extend(publish(&clone, &former));
    given.wait_arrived(&former, &published);
}

/// While one lane cannot carry out an order, a second order counts for those that have carried out the first.
#[test]
fn a_second_take_over_counts_while_a_lane_has_not_carried_out_the_first() {
    let mut given = Given::up(WATCHFUL);
    let served: Vec<String> = given.served().into_iter().cloned().collect();
    let dead = given.cluster.master_of(&served[0]);
    let on_other = served.iter().find(|s| given.cluster.master_of(s) != dead);
    let stream = on_other.expect("a stream of another node").clone();
    let node = given.cluster.master_of(&stream);
    // A cluster serves what it can.
    for node in &given.cluster.nodes {
        node.call(&["CONFIG", "SET", "cluster-require-full-coverage", "no"]);
    }
    given.cluster.nodes[dead].kill9();
    let pg = &given.stack.pg;
    let mut published = Vec::new();
    for _ in 0..2 {
        given.cluster.nodes[node].call(&["FLUSHALL"]);
        wait_until("a missing guard", || {
            pg.one("select count(*) > 0 from outbox.cursors where slot >= 0 and state = 'misconfigured'")
        });
        published = publish(pg, &stream);
        pg.exec("select outbox.take_over('default')");
        let arrived = eventually("the entry", LIMIT, || {
            Some(ids(&given.cluster.nodes[node].entries(&stream))).filter(|arrived| !arrived.is_empty())
        });
        assert_eq!(arrived, published);
    }
    given.cluster.nodes[dead].start_again();
    given.cluster.wait_well(3);
    wait_taken_over(pg);
    wait_drained(pg, "default");
    assert_eq!(ids(&given.cluster.entries(&stream)), published);
}

/// Events that are committed after their backend was deleted fail once, whether their lane was given up or not.
#[test]
fn late_events_of_a_deleted_backend_fail_once_in_former_hash_slots_too() {
    let given = Given::up(QUICK);
    let (former, served) = (given.former()[0].clone(), given.served()[0].clone());
    let pg = &given.stack.pg;
    let mut late = pg.client();
    let mut late = late.transaction().expect("a transaction");
    let mut published = Vec::new();
    for stream in [&former, &served] {
        let row = late
            .query_one("select outbox.publish_event('event', 'kit', stream => $1)", &[stream])
            .expect("published");
        published.push(row.get::<_, Uuid>(0));
    }
    pg.exec("delete from outbox.backends");
    late.commit().expect("committed");
    wait_eq("failed events", 2i64, || {
        pg.one("select count(*) from outbox.failed_events")
    });
    let failed: Vec<Uuid> = pg.one("select array_agg(event_id order by seq) from outbox.failed_events");
    assert_eq!(failed, published);
    wait_eq("cursors and former lanes", 0i64, || {
        pg.one(
            "select (select count(*) from outbox.cursors where slot >= 0) + (select count(*) from outbox.former_lanes)",
        )
    });
    for stream in [&former, &served] {
        assert_eq!(given.cluster.entries(stream).len(), 1, "{stream}");
    }
    assert_eq!(pg.one::<i64>("select count(*) from outbox.failed_events"), 2);
}

/// Columns that somebody has added to our tables, and rows that were removed from them, keep no lane from its turn.
#[test]
fn lanes_take_turns_whatever_was_done_to_their_tables() {
    let given = Given::up(QUICK);
    let pg = &given.stack.pg;
    let acts = [
        "alter table outbox.cursors add column note text",
        "alter table outbox.former_lanes add column note text default 'x'",
        "delete from outbox.former_lanes",
        "truncate outbox.former_lanes",
        "update outbox.former_lanes set batch_number = 0, epoch = 0",
        "update outbox.former_lanes set published_total = 0, last_error = 'x'",
    ];
    let mut count = 1;
    for act in acts {
        pg.exec(act);
        publish_to_all(pg, "postgres", &given.streams);
        count += 1;
        for stream in &given.streams {
            let arrived = given.cluster.wait_entries(stream, count).len();
            assert_eq!(arrived, count, "{stream} after {act}");
        }
        wait_drained(pg, "default");
        assert_eq!(standing(pg, "default").state, "idle", "{act}");
    }
}
