//! Faults of a Redis, and of the network before it.

use std::time::Duration;

use kit::{Redis, Way};
use redis::cmd;

use crate::nemesis::Repair;
use crate::plan::{Failover, Fault};
use crate::site::{Site, Store};

/// The token at which a batch ends.
const EXEC: &[u8] = b"\r\nEXEC\r\n";

type Lasting = Option<(Duration, Repair)>;

pub(crate) fn befall(site: &mut Site, at: usize, fault: Fault) -> Lasting {
    // Plain pipelining cannot find out what Redis has lost.
    let may_lose = site.exactly_once;
    let store = &mut site.stores[at];
    match fault {
        Fault::FreezeRedis(_, time) => {
            store.primary().sigstop();
            return Some((time, Repair::ThawRedis(at)));
        }
        Fault::KillRedis(_) => {
            store.primary_mut().kill9();
            store.primary_mut().start_again();
        }
        Fault::LoseTail(_, bytes) => {
            let most = store.primary().aof_length().saturating_sub(store.kept);
            store
                .primary_mut()
                .crash_losing(if may_lose { bytes.min(most) } else { 0 });
        }
        Fault::Save(_) => store.saved = Some(store.primary().saved()),
        Fault::GoBack(_) if may_lose => {
            let saved = store.saved.clone().expect("saved in warm_up");
            store.primary_mut().crash_back_to(&saved);
        }
        Fault::Failover(_, failover) if may_lose => fail_over(store, failover),
        Fault::GoBack(_) | Fault::Failover(..) => store.proxy.cut(),
        Fault::OutOfMemory(_, left, time) => {
            let limit = used_memory(store.primary()) + left;
            store
                .primary()
                .call(&["CONFIG", "SET", "maxmemory", &limit.to_string()]);
            return Some((time, Repair::GiveMemory(at)));
        }
        Fault::ReadOnly(_, time) => {
            store.primary().lag();
            return Some((time, Repair::Writable(at)));
        }
        Fault::Alone(_, time) => {
            store.primary().call(&["CONFIG", "SET", "min-replicas-to-write", "5"]);
            return Some((time, Repair::NotAlone(at)));
        }
        Fault::Loading(_) => load_again(store.primary()),
        _ => unreachable!("{fault:?} is none of Redis"),
    }
    None
}

pub(crate) fn befall_network(site: &mut Site, at: usize, fault: Fault) -> Lasting {
    let proxy = &site.stores[at].proxy;
    match fault {
        Fault::Delay(_, delay, time) => {
            proxy.delay(delay);
            return Some((time, Repair::Undelay(at)));
        }
        Fault::Cut(_) => proxy.cut(),
        Fault::CutAfter(_, way, bytes) => proxy.cut_after(way, bytes),
        Fault::CutBehindExec(_) => proxy.cut_behind(Way::ToServer, EXEC),
        Fault::LateBehindExec(_, time) => {
            proxy.hold_behind(Way::ToServer, EXEC);
            return Some((time, Repair::LetGo(at)));
        }
        Fault::Late(_, way, time) => {
            proxy.hold(way);
            return Some((time, Repair::LetGo(at)));
        }
        Fault::LateAll(_, way, time) => {
            proxy.hold_all(way);
            return Some((time, Repair::LetGo(at)));
        }
        Fault::Refuse(_, time) => {
            proxy.refuse();
            return Some((time, Repair::Accept(at)));
        }
        _ => unreachable!("{fault:?} is none of the network"),
    }
    None
}

pub(crate) fn repair(site: &mut Site, repair: Repair) {
    match repair {
        Repair::ThawRedis(at) => site.stores[at].primary().sigcont(),
        Repair::GiveMemory(at) => drop(site.stores[at].primary().call(&["CONFIG", "SET", "maxmemory", "0"])),
        Repair::Writable(at) => site.stores[at].primary().promote(),
        Repair::NotAlone(at) => {
            let primary = site.stores[at].primary();
            primary.call(&["CONFIG", "SET", "min-replicas-to-write", "0"]);
        }
        Repair::Undelay(at) => site.stores[at].proxy.delay(Duration::ZERO),
        Repair::Accept(at) => site.stores[at].proxy.accept(),
        Repair::LetGo(at) => site.stores[at].proxy.release(),
        _ => unreachable!("{repair:?} is none of Redis"),
    }
}

/// The replica takes over with the data that it has, and the old primary loses what the replica does not have.
fn fail_over(store: &mut Store, failover: Failover) {
    let (old, new) = (store.primary, 1 - store.primary);
    store.nodes[new].lag();
    std::thread::sleep(failover.lag);
    store.nodes[new].promote();
    store.proxy.point_to(store.nodes[new].port());
    store.primary = new;
    if failover.cut {
        store.proxy.cut();
    }
    std::thread::sleep(failover.zombie);
    store.nodes[old].follow(&store.nodes[new]);
}

/// Redis saves and loads all of its data, and answers LOADING meanwhile.
fn load_again(redis: &Redis) {
    for (name, value) in [
        ("loading-process-events-interval-bytes", "1024"),
        ("key-load-delay", "50000"),
    ] {
        redis.call(&["CONFIG", "SET", name, value]);
    }
    redis.call(&["DEBUG", "RELOAD"]);
    redis.call(&["CONFIG", "SET", "key-load-delay", "0"]);
}

fn used_memory(redis: &Redis) -> u64 {
    let info: String = cmd("INFO")
        .arg("memory")
        .query(&mut redis.conn())
        .expect("INFO of a running Redis");
    let line = info.lines().find_map(|line| line.strip_prefix("used_memory:"));
    line.and_then(|number| number.trim().parse().ok())
        .expect("used_memory is a number")
}
