//! Finding the node that has a backend's streams: at its address, or as sentinels say.
//!
//! Sources: Redis Sentinel client guidelines (redis.io/docs/latest/develop/reference/sentinel-clients).

use crate::classify::{Class, Failure, Trouble};
use crate::connection::Link;
use crate::destination::{Address, Destination, Route};
use crate::encode::append_command;
use redis::Value;

/// Opens a link to the node that is to be written to. `found` is told its address before it is tried.
pub fn open(destination: &Destination, found: &mut dyn FnMut(&Address)) -> Result<Link, Failure> {
    match &destination.route {
        Route::Direct => {
            found(&destination.address);
            Link::open(destination)
        }
        Route::Sentinel { nodes, master } => by_sentinels(destination, nodes, master, found),
    }
}

/// The primary that a sentinel names, the sentinels taken in order. One that is behind the others names a node that is gone, or a
/// replica: then the next one's word is tried.
fn by_sentinels(
    destination: &Destination,
    nodes: &[Address],
    master: &str,
    found: &mut dyn FnMut(&Address),
) -> Result<Link, Failure> {
    let mut tried: Vec<Address> = Vec::new();
    let (mut of_node, mut unknown, mut silent) = (None, None, None);
    for sentinel in nodes {
        match primary_of(destination, sentinel, master) {
            Ok(Some(address)) if !tried.contains(&address) => {
                found(&address);
                match open_primary(destination, &address) {
                    Ok(link) => return Ok(link),
                    Err(failure) => of_node = Some(failure),
                }
                tried.push(address);
            }
            Ok(Some(_)) => {}
            Ok(None) => {
                let message = format!("sentinel {sentinel} knows no master \"{master}\"");
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
    let failure = of_node.or(unknown).or(silent);
    Err(failure.unwrap_or_else(|| Failure::configuration("there is no sentinel to ask")))
}

/// Where a sentinel says that the primary is; `None`: it knows none of that name.
fn primary_of(destination: &Destination, sentinel: &Address, master: &str) -> Result<Option<Address>, Failure> {
    // A sentinel has users of its own, or none.
    let nobody = Destination {
        username: None,
        password: None,
        db: 0,
        ..destination.clone()
    };
    let link = match Link::open_at(&nobody, sentinel) {
        Err(failure) if failure.message.starts_with("NOAUTH") => {
            let login = Destination {
                db: 0,
                ..destination.clone()
            };
            Link::open_at(&login, sentinel)
        }
        opened => opened,
    };
    let words: [&[u8]; 3] = [b"SENTINEL", b"GET-MASTER-ADDR-BY-NAME", master.as_bytes()];
    primary_in(ask(&mut link?, &words)?)
}

fn primary_in(reply: Value) -> Result<Option<Address>, Failure> {
    match reply {
        Value::Nil => Ok(None),
        Value::Array(parts) => match parts.as_slice() {
            [Value::BulkString(host), Value::BulkString(port)] => {
                let host = String::from_utf8_lossy(host).into_owned();
                let port = std::str::from_utf8(port).ok().and_then(|port| port.parse().ok());
                let port = port.filter(|_| !host.is_empty()).ok_or_else(no_sentinel)?;
                Ok(Some(Address::Tcp { host, port }))
            }
            _ => Err(no_sentinel()),
        },
        _ => Err(no_sentinel()),
    }
}

fn no_sentinel() -> Failure {
    Failure::configuration("unexpected reply, as from no sentinel")
}

/// Only a node that does not say that it is a replica is written to.
fn open_primary(destination: &Destination, address: &Address) -> Result<Link, Failure> {
    let mut link = Link::open_at(destination, address)?;
    // Needs no right that connecting does not need. A server or proxy that does not know HELLO tells by READONLY.
    let is_replica = match ask(&mut link, &[b"HELLO", b"2"]) {
        Ok(reply) => is_replica(&reply),
        Err(failure) if failure.class == Class::Backend => return Err(failure),
        Err(_) => false,
    };
    match is_replica {
        true => Err(Failure::of(
            Trouble::IsReplica,
            "READONLY it is a replica: a failover is not done yet",
        )),
        false => Ok(link),
    }
}

/// Whether the reply to HELLO says so: pairs of a name and a value, one of them `role`.
fn is_replica(reply: &Value) -> bool {
    let Value::Array(items) = reply else { return false };
    let is_role = |pair: &&[Value]| matches!(&pair[0], Value::BulkString(name) if name == b"role");
    let role = items.chunks_exact(2).find(is_role).map(|pair| &pair[1]);
    matches!(role, Some(Value::BulkString(role)) if role != b"master")
}

/// Sends one command; an error reply is a failure, never an event's.
fn ask(link: &mut Link, words: &[&[u8]]) -> Result<Value, Failure> {
    let mut bytes = Vec::new();
    append_command(&mut bytes, words);
    link.send(&bytes)?;
    match link.receive()?.value()? {
        Value::ServerError(error) => Err(crate::classify::reply(&error).not_of_an_event()),
        value => Ok(value),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text(text: &str) -> Value {
        Value::BulkString(text.as_bytes().to_vec())
    }

    #[test]
    fn a_sentinels_word_is_an_address_or_nothing() {
        let there = primary_in(Value::Array(vec![text("::1"), text("6379")])).unwrap();
        assert_eq!(there.map(|a| a.to_string()).as_deref(), Some("[::1]:6379"));
        assert_eq!(primary_in(Value::Nil).unwrap(), None);
        for parts in [
            vec![],
            vec![text("a")],
            vec![text("a"), text("x")],
            vec![text(""), text("1")],
        ] {
            assert!(primary_in(Value::Array(parts)).is_err());
        }
        assert!(primary_in(Value::Int(1)).is_err());
    }

    #[test]
    fn only_who_says_so_is_a_replica() {
        let hello = |role: &str| Value::Array(vec![text("mode"), text("sentinel"), text("role"), text(role)]);
        assert!(is_replica(&hello("slave")) && is_replica(&hello("replica")) && !is_replica(&hello("master")));
        assert!(!is_replica(&Value::Nil) && !is_replica(&Value::Array(vec![text("role")])));
    }
}
