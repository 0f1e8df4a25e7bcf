//! A Redis Cluster whose slots move and whose masters die, under load: nothing is lost, repeated or out of order.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use kit::{Cluster, Ledger, Load, Postgres, Redis, Stack, UNTRIMMED, eventually, wait_drained, wait_until};

/// How long delivery may stall in addition to the failover itself.
const ALLOWANCE: Duration = Duration::from_secs(2);

const STREAMS: usize = 16;

fn stack(cluster: &Cluster) -> Stack {
    let stack = Stack::of(Postgres::with(&[UNTRIMMED]), Redis::start());
    stack.pg.exec(&format!(
        "update outbox.backends set mode = 'cluster', nodes = '{}', host = null, port = null",
        cluster.addresses()
    ));
    Ledger::create(&stack.pg);
    stack
}

fn streams() -> Vec<String> {
    (0..STREAMS).map(|n| format!("s{n}")).collect()
}

fn load(stack: &Stack) -> Load {
    Load::paced(&stack.pg, 2_000, &format!("'s' || n % {STREAMS}"))
}

fn now() -> Duration {
    SystemTime::now().duration_since(UNIX_EPOCH).expect("after 1970")
}

#[track_caller]
fn assert_well(stack: &Stack, cluster: &Cluster) {
    wait_drained(&stack.pg, "default");
    let verdict = cluster.verdict(&stack.pg, "default", &streams());
    println!("{} events", verdict.committed);
    verdict.assert_exactly_once();
    assert!(!stack.pg.log().contains("CROSSSLOT"), "{}", stack.pg.log());
}

#[test]
fn slots_that_move_under_load_lose_and_repeat_nothing() {
    let cluster = Cluster::start(0);
    let stack = stack(&cluster);
    let load = load(&stack);
    load.wait_more(100);
    let started = now();
    // Nearly all slots of the first node, to both others; and some of them back.
    cluster.reshard(0, 1, 3_000);
    stack.pg.kill_worker();
    cluster.reshard(0, 2, 2_400);
    cluster.reshard(1, 0, 4_000);
    println!("moved slots for {:?}", now() - started);
    load.wait_more(100);
    load.stop();
    assert_well(&stack, &cluster);
}

/// A new stream in a slot that is being moved, and a stream that was moved before its guard: no half of a batch is
/// appended.
#[test]
fn a_slot_that_stands_between_two_nodes_is_waited_for() {
    let cluster = Cluster::start(0);
    let stack = stack(&cluster);
    let (old, fresh) = ("{slot}old", "{slot}fresh");
    let publish = |stream: &str| -> uuid::Uuid {
        stack.pg.one(&format!(
            "select outbox.publish_event('moving', 'kit', stream => '{stream}')"
        ))
    };
    let first = publish(old);
    cluster.wait_entries(old, 1);
    let slot = cluster.slot_of(old).to_string();
    let from = cluster.master_of(old);
    let to = (from + 1) % 3;
    let [from_id, to_id] = [from, to].map(|index| cluster.nodes[index].node_id());
    cluster.nodes[to].call(&["CLUSTER", "SETSLOT", &slot, "IMPORTING", &from_id]);
    cluster.nodes[from].call(&["CLUSTER", "SETSLOT", &slot, "MIGRATING", &to_id]);
    let second = publish(fresh);
    let waits = || -> Option<String> { stack.pg.one("select last_error from outbox.backend_status") };
    wait_until("an ASK", || waits().is_some_and(|error| error.starts_with("ASK")));
    let to_port = cluster.nodes[to].port().to_string();
    cluster.nodes[from].call(&["MIGRATE", "127.0.0.1", &to_port, old, "0", "5000"]);
    let third = publish(old);
    let guard: String = stack.pg.one(&format!("select outbox.guard_key('default', '{old}')"));
    cluster.nodes[from].call(&["MIGRATE", "127.0.0.1", &to_port, &guard, "0", "5000"]);
    std::thread::sleep(Duration::from_millis(1_500));
    for index in [to, from, 3 - from - to] {
        cluster.nodes[index].call(&["CLUSTER", "SETSLOT", &slot, "NODE", &to_id]);
    }
    let arrived = |stream: &str, count| kit::ids(&cluster.nodes[to].wait_entries(stream, count));
    assert_eq!(arrived(old, 2), [first, third]);
    assert_eq!(arrived(fresh, 1), [second]);
    wait_drained(&stack.pg, "default");
}

/// Under 2,000 events a second. OUTBOX_FAILOVERS sets how often; the stalls are printed.
#[test]
fn a_master_that_is_killed_under_load_is_replaced_and_nothing_is_lost() {
    let rounds: usize = std::env::var("OUTBOX_FAILOVERS").map_or(1, |text| text.parse().expect("a number"));
    let mut cluster = Cluster::start(1);
    let stack = stack(&cluster);
    let load = load(&stack);
    let mut stalls = Vec::new();
    for round in 1..=rounds {
        load.wait_more(150);
        cluster.wait_well(6);
        // The master of another shard each time.
        let stream = format!("s{}", round % STREAMS);
        let killed = cluster.master_of(&stream);
        let killed_at = now();
        cluster.nodes[killed].kill9();
        let master = cluster.wait_replaced(killed, &stream);
        let failover = now() - killed_at;
        let node = &cluster.nodes[master];
        let before = node.xlen(&stream);
        eventually("entries in the new master", Duration::from_secs(60), || {
            (node.xlen(&stream) > before + 100).then_some(())
        });
        let of_node = streams().into_iter().filter(|s| cluster.master_of(s) == master);
        let stall = of_node
            .map(|s| {
                node.longest_stall(&s, killed_at - Duration::from_millis(500))
                    .unwrap_or_default()
            })
            .max();
        let stall = stall.expect("a stream");
        println!("failover {round}: it took {failover:?}, the stall was {stall:?}");
        assert!(
            stall <= failover + ALLOWANCE,
            "{stall:?} for a failover of {failover:?}"
        );
        stalls.push(stall);
        cluster.nodes[killed].start_again();
    }
    load.stop();
    assert_well(&stack, &cluster);
    stalls.sort();
    println!("stalls {:?} to {:?}", stalls[0], stalls[stalls.len() - 1]);
}

/// The master keeps its connections and answers nothing, and continues when its replica has taken its place.
#[test]
fn a_master_that_hangs_under_load_is_replaced_by_its_replica() {
    let cluster = Cluster::start(1);
    let stack = stack(&cluster);
    stack.pg.exec("update outbox.backends set socket_timeout = '1s'");
    let load = load(&stack);
    load.wait_more(150);
    // The first node is the one that is asked for the others.
    let (stream, hung) = streams()
        .into_iter()
        .map(|stream| (stream.clone(), cluster.master_of(&stream)))
        .find(|(_, master)| *master != 0)
        .expect("streams on all nodes");
    cluster.nodes[hung].sigstop();
    let master = cluster.wait_replaced(hung, &stream);
    let before = cluster.nodes[master].xlen(&stream);
    eventually("entries in the new master", Duration::from_secs(60), || {
        (cluster.nodes[master].xlen(&stream) > before + 100).then_some(())
    });
    cluster.nodes[hung].sigcont();
    cluster.wait_well(6);
    load.wait_more(150);
    load.stop();
    assert_well(&stack, &cluster);
}
