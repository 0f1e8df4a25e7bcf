//! What sentinels and the nodes of a cluster answer. Whatever the bytes: an address, or an error.

use crate::classify::{Failure, Trouble};
use crate::destination::Address;
use redis::Value;

/// The reply to SENTINEL GET-MASTER-ADDR-BY-NAME; `None`: it knows none of that name.
pub fn primary_in(reply: Value) -> Result<Option<Address>, Failure> {
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

/// Whether the reply to HELLO says so: pairs of a name and a value, one of them `role`.
pub fn is_replica(reply: &Value) -> bool {
    let Value::Array(items) = reply else { return false };
    let is_role = |pair: &&[Value]| matches!(&pair[0], Value::BulkString(name) if name == b"role");
    let role = items.chunks_exact(2).find(is_role).map(|pair| &pair[1]);
    matches!(role, Some(Value::BulkString(role)) if role != b"master")
}

/// `MOVED slot host:port`.
pub fn redirect_in(message: &str) -> Option<(u16, Address)> {
    let mut words = message.strip_prefix("MOVED ")?.split_whitespace();
    let slot = words.next()?.parse().ok()?;
    let (host, port) = words.next()?.rsplit_once(':')?;
    let host = host.trim_start_matches('[').trim_end_matches(']').to_owned();
    let port = port.parse().ok().filter(|port| *port > 0)?;
    (!host.is_empty()).then_some((slot, Address::Tcp { host, port }))
}

/// Slots that one master serves.
pub struct Range {
    pub slots: std::ops::RangeInclusive<u16>,
    pub master: Address,
}

/// The reply to CLUSTER SLOTS: ranges, each `[first, last, [host, port, ...] of the master, ...]`. A host that is not told is the
/// one that was asked.
pub fn ranges_in(reply: &Value, asked: &Address) -> Result<Vec<Range>, Failure> {
    let no_cluster = || Failure::of(Trouble::NodeRefuses, "unexpected reply, as from no node of a cluster");
    let Value::Array(ranges) = reply else {
        return Err(no_cluster());
    };
    let mut found = Vec::with_capacity(ranges.len());
    for range in ranges {
        let Value::Array(parts) = range else {
            return Err(no_cluster());
        };
        let [Value::Int(first), Value::Int(last), Value::Array(master), ..] = parts.as_slice() else {
            return Err(no_cluster());
        };
        let [host, Value::Int(port), ..] = master.as_slice() else {
            return Err(no_cluster());
        };
        let slot = |number: &i64| u16::try_from(*number).map_err(|_| no_cluster());
        let host = match host {
            Value::BulkString(host) => String::from_utf8_lossy(host).into_owned(),
            Value::Nil => String::new(),
            _ => return Err(no_cluster()),
        };
        let host = match (host.as_str(), asked) {
            ("" | "?", Address::Tcp { host, .. }) => host.clone(),
            _ => host,
        };
        let port = u16::try_from(*port).map_err(|_| no_cluster())?;
        found.push(Range {
            slots: slot(first)?..=slot(last)?,
            master: Address::Tcp { host, port },
        });
    }
    Ok(found)
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

    #[test]
    fn ranges_have_masters_whose_host_may_be_the_one_asked() {
        let node = |host: Value, port| Value::Array(vec![host, Value::Int(port), text("id"), Value::Array(vec![])]);
        let range = |first, last, host, port| {
            let replica = node(text("10.0.0.9"), 1);
            Value::Array(vec![Value::Int(first), Value::Int(last), node(host, port), replica])
        };
        let asked = Address::of_node("here:7").unwrap();
        let reply = Value::Array(vec![
            range(0, 5, text("10.0.0.1"), 1),
            range(6, 6, Value::Nil, 2),
            range(7, 16_383, text("?"), 3),
        ]);
        let ranges = ranges_in(&reply, &asked).unwrap();
        let found: Vec<_> = ranges.iter().map(|r| (*r.slots.end(), r.master.to_string())).collect();
        let expected = [(5, "10.0.0.1:1"), (6, "here:2"), (16_383, "here:3")].map(|(end, m)| (end, m.to_owned()));
        assert_eq!(found, expected);
        for nonsense in [
            Value::Nil,
            Value::Array(vec![Value::Int(1)]),
            Value::Array(vec![Value::Array(vec![Value::Int(1)])]),
            Value::Array(vec![range(-1, 5, text("a"), 1)]),
            Value::Array(vec![range(0, 5, text("a"), 70_000)]),
            Value::Array(vec![range(0, 5, Value::Int(1), 1)]),
        ] {
            assert!(ranges_in(&nonsense, &asked).is_err(), "{nonsense:?}");
        }
    }

    #[test]
    fn a_redirect_names_a_slot_and_an_address() {
        let there = |message| redirect_in(message).map(|(slot, address)| (slot, address.to_string()));
        assert_eq!(there("MOVED 7 10.0.0.1:6379"), Some((7, "10.0.0.1:6379".to_owned())));
        assert_eq!(there("MOVED 7 ::1:6379"), Some((7, "[::1]:6379".to_owned())));
        for message in [
            "MOVED 7 :6379",
            "MOVED 7",
            "MOVED x a:1",
            "ASK 7 a:1",
            "MOVED 7 a:0",
            "MOVED 70000 a:1",
        ] {
            assert_eq!(there(message), None, "{message}");
        }
    }
}
