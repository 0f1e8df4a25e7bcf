//! Finds the node that has a backend's streams: at its address, through sentinels, or through the nodes of a cluster.
//!
//! Sources: Redis Sentinel client guidelines (redis.io/docs/latest/develop/reference/sentinel-clients); Redis cluster
//! specification.

use crate::failure::{Class, Failure, Trouble};
use crate::redis::answers::{is_replica, primary_in, redirect_in};
use crate::redis::connection::RedisConnection;
use crate::redis::destination::{Address, Destination, NodeRoute, Secret};
use crate::redis::ranges::{Range, Ranges};
use crate::redis::step::{self, Step};
use crate::resp::bounds::Bounds;
use crate::resp::read::{Piece, Reply};
use crate::resp::write::append_command;
use redis::Value;
use std::collections::HashMap;
use std::sync::{LazyLock, Mutex, PoisonError};

/// How many clusters are remembered, and how many nodes of each.
const REMEMBERED_CLUSTERS: usize = 100;
const REMEMBERED_NODES: usize = 100;

/// What the connections of this process have learnt from the nodes of a cluster. It is never locked while a connection
/// waits for the network.
#[derive(Default)]
struct Learnt {
    /// The masters in the last answer. They are needed when all nodes of the settings are gone.
    masters: Vec<Address>,
    /// Where a node has redirected us for a hash slot. Used once.
    moved: HashMap<u16, Address>,
}

static LEARNT: LazyLock<Mutex<HashMap<Vec<Address>, Learnt>>> = LazyLock::new(Mutex::default);

fn with_learnt<R>(nodes: &[Address], f: impl FnOnce(&mut Learnt) -> R) -> R {
    let mut learnt = LEARNT.lock().unwrap_or_else(PoisonError::into_inner);
    if learnt.len() >= REMEMBERED_CLUSTERS && !learnt.contains_key(nodes) {
        learnt.clear();
    }
    f(learnt.entry(nodes.to_vec()).or_default())
}

/// Opens a connection to the node to write to. `found` is told its address before the connection is tried.
pub fn open(destination: &Destination, found: &mut dyn FnMut(&Address)) -> Result<RedisConnection, Failure> {
    step::at(Step::Auth);
    if let Some(refusal) = destination.password.as_ref().and_then(Secret::refusal) {
        // No connection is opened: the role that has changed the destination would get events, which are as secret as
        // the password.
        return Err(refusal);
    }
    step::at(Step::FindNode);
    match &destination.route {
        NodeRoute::Direct => {
            found(&destination.address);
            RedisConnection::open(destination)
        }
        NodeRoute::Sentinel { nodes, master } => by_sentinels(destination, nodes, master, found),
        NodeRoute::Cluster { nodes, hash_slot } => in_cluster(destination, nodes, *hash_slot, found),
    }
}

/// Connects to the primary that a sentinel names. Sentinels are asked in order: one that is behind the others may name
/// a lost node or a replica, and then the next one is asked.
fn by_sentinels(
    destination: &Destination,
    nodes: &[Address],
    master: &str,
    found: &mut dyn FnMut(&Address),
) -> Result<RedisConnection, Failure> {
    let mut tried: Vec<Address> = Vec::new();
    let (mut of_node, mut unknown, mut silent) = (None, None, None);
    for sentinel in nodes {
        match primary_of(destination, sentinel, master) {
            Ok(Some(address)) if !tried.contains(&address) => {
                found(&address);
                match open_primary(destination, &address) {
                    Ok(connection) => return Ok(connection),
                    Err(failure) => of_node = Some(failure),
                }
                tried.push(address);
            }
            Ok(Some(_)) => {}
            Ok(None) => {
                let message = format!("sentinel {sentinel} does not know the master \"{master}\"");
                unknown = Some(Failure::of(Trouble::NoSuchMaster, message));
            }
            Err(failure) => {
                let message = format!("sentinel {sentinel}: {}", failure.message);
                let trouble = match failure.class {
                    Class::Configuration => Trouble::SentinelRefuses,
                    _ => Trouble::NoSentinel,
                };
                silent = Some(Failure::of(trouble, message));
            }
        }
    }
    if of_node.is_none() && unknown.is_some() {
        step::at(Step::FindNode);
    }
    let failure = of_node.or(unknown).or(silent);
    Err(failure.unwrap_or_else(|| Failure::configuration("there is no sentinel to ask")))
}

/// Where a sentinel says that the primary is; `None`: it knows no master of that name.
fn primary_of(destination: &Destination, sentinel: &Address, master: &str) -> Result<Option<Address>, Failure> {
    // A sentinel has its own users, or none.
    let nobody = Destination {
        username: None,
        password: None,
        db: 0,
        ..destination.clone()
    };
    let connection = match RedisConnection::open_at(&nobody, sentinel) {
        Err(failure) if failure.message.starts_with("NOAUTH") => {
            let login = Destination {
                db: 0,
                ..destination.clone()
            };
            RedisConnection::open_at(&login, sentinel)
        }
        opened => opened,
    };
    let words: [&[u8]; 3] = [b"SENTINEL", b"GET-MASTER-ADDR-BY-NAME", master.as_bytes()];
    primary_in(ask(&mut connection?, &words, &Bounds::MASTER)?)
}

/// Connects to a node, unless it reports that it is a replica.
fn open_primary(destination: &Destination, address: &Address) -> Result<RedisConnection, Failure> {
    let mut connection = RedisConnection::open_at(destination, address)?;
    // HELLO needs no further right. If a server or proxy does not know it and is a replica, the first write fails with
    // READONLY.
    let is_replica = match ask(&mut connection, &[b"HELLO", b"2"], &Bounds::HELLO) {
        Ok(reply) => is_replica(&reply),
        Err(failure) if failure.class == Class::Backend => return Err(failure),
        Err(_) => false,
    };
    match is_replica {
        true => Err(Failure::of(
            Trouble::IsReplica,
            "READONLY it is a replica: a failover is in progress",
        )),
        false => Ok(connection),
    }
}

/// Connects to the node that serves a hash slot, according to any node of the cluster. During a failover some nodes are
/// behind the others; then the next one is asked.
fn in_cluster(
    destination: &Destination,
    nodes: &[Address],
    hash_slot: u16,
    found: &mut dyn FnMut(&Address),
) -> Result<RedisConnection, Failure> {
    let (moved, masters) = with_learnt(nodes, |learnt| {
        (learnt.moved.remove(&hash_slot), learnt.masters.clone())
    });
    let mut tried: Vec<Address> = Vec::new();
    let (mut of_node, mut unserved, mut silent) = (None, None, None);
    if let Some(address) = moved {
        found(&address);
        match RedisConnection::open_at(destination, &address) {
            Ok(connection) => return Ok(connection),
            Err(failure) => of_node = Some(failure),
        }
        tried.push(address);
    }
    let others = masters.iter().filter(|master| !nodes.contains(master));
    for node in nodes.iter().chain(others) {
        let (connection, told) = match ranges_of(destination, node, hash_slot) {
            Ok(answer) => answer,
            Err(failure) => {
                let message = format!("node {node}: {}", failure.message);
                silent = Some(match failure.class {
                    Class::Configuration => Failure::of(Trouble::NodeRefuses, message),
                    class => Failure {
                        message,
                        class,
                        ..failure
                    },
                });
                continue;
            }
        };
        with_learnt(nodes, |learnt| learnt.masters = told.masters);
        match told.serves {
            None => {
                let message = format!("CLUSTERDOWN node {node} knows no master for hash slot {hash_slot}");
                unserved = Some(Failure::of(Trouble::ClusterDown, message));
            }
            Some(address) if address == *node => {
                found(&address);
                return Ok(connection);
            }
            Some(address) if !tried.contains(&address) => {
                drop(connection);
                found(&address);
                match RedisConnection::open_at(destination, &address) {
                    Ok(connection) => return Ok(connection),
                    Err(failure) => of_node = Some(failure),
                }
                tried.push(address);
            }
            Some(_) => {}
        }
    }
    if of_node.is_none() && unserved.is_some() {
        step::at(Step::FindNode);
    }
    let failure = of_node.or(unserved).or(silent);
    Err(failure.unwrap_or_else(|| Failure::configuration("there is no node to ask")))
}

/// Processes the failure of a connection. If it tells where a hash slot is, the next connection goes there first.
pub fn heard(destination: &Destination, failure: Failure) -> Failure {
    let NodeRoute::Cluster { nodes, hash_slot } = &destination.route else {
        return failure;
    };
    if let Some((moved, address)) = redirect_in(&failure.message)
        && moved == *hash_slot
    {
        with_learnt(nodes, |learnt| learnt.moved.insert(moved, address));
    }
    failure.of_cluster()
}

/// What a node reports about its cluster.
struct Told {
    /// The node that serves the requested hash slot.
    serves: Option<Address>,
    /// Some of all masters.
    masters: Vec<Address>,
}

impl Told {
    fn hear(&mut self, range: Range, hash_slot: u16) -> Result<(), Failure> {
        let is_asked_for = self.serves.is_none() && range.hash_slots.contains(&hash_slot);
        match range.master {
            Err(failure) if is_asked_for => return Err(failure),
            // This range belongs to a hash slot that another lane serves.
            Err(_) => {}
            Ok(master) => {
                if self.masters.len() < REMEMBERED_NODES && !self.masters.contains(&master) {
                    self.masters.push(master.clone());
                }
                if is_asked_for {
                    self.serves = Some(master);
                }
            }
        }
        Ok(())
    }
}

fn ranges_of(destination: &Destination, node: &Address, hash_slot: u16) -> Result<(RedisConnection, Told), Failure> {
    let mut connection = RedisConnection::open_at(destination, node)?;
    let mut told = Told {
        serves: None,
        masters: Vec::new(),
    };
    send(&mut connection, &[b"CLUSTER", b"SLOTS"])?;
    let mut ranges = Ranges::of(node);
    while !ranges.is_over() {
        for piece in connection.receive(&Bounds::SLOTS)?.pieces() {
            if let Piece::Line(line @ [b'-', ..]) = piece
                && let Value::ServerError(error) = Reply::new(line).value()?
            {
                return Err(crate::failure::reply(&error).not_of_an_event());
            }
            if let Some(range) = ranges.take(piece)? {
                told.hear(range, hash_slot)?;
            }
        }
    }
    Ok((connection, told))
}

fn send(connection: &mut RedisConnection, words: &[&[u8]]) -> Result<(), Failure> {
    let mut bytes = Vec::new();
    append_command(&mut bytes, words);
    connection.send(&bytes)
}

/// Sends one command. An error reply is a failure of the backend, never of an event.
pub(super) fn ask(connection: &mut RedisConnection, words: &[&[u8]], bounds: &Bounds) -> Result<Value, Failure> {
    send(connection, words)?;
    match connection.receive(bounds)?.value()? {
        Value::ServerError(error) => Err(crate::failure::reply(&error).not_of_an_event()),
        value => Ok(value),
    }
}
