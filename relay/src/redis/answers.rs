//! Parses what sentinels and the nodes of a cluster answer. Any bytes give either an address or an error.

use crate::failure::Failure;
use crate::redis::destination::Address;
use redis::Value;

/// The reply to SENTINEL GET-MASTER-ADDR-BY-NAME; `None`: the sentinel knows no master of that name.
pub fn primary_in(reply: Value) -> Result<Option<Address>, Failure> {
    match reply {
        Value::Nil => Ok(None),
        Value::Array(parts) => match parts.as_slice() {
            [Value::BulkString(host), Value::BulkString(port)] => {
                let host = host_in(host, host.len() as u64)?;
                let port = std::str::from_utf8(port).ok().and_then(|port| port.parse().ok());
                let port = port.filter(|port| *port > 0).ok_or_else(no_sentinel)?;
                Ok(Some(Address::Tcp { host, port }))
            }
            _ => Err(no_sentinel()),
        },
        _ => Err(no_sentinel()),
    }
}

fn no_sentinel() -> Failure {
    Failure::configuration("unexpected reply: the server is not a sentinel")
}

/// The name or address of a host, as a server reports it with `size` bytes, of which the first were `told`. If it is
/// anything else, the relay neither connects to it nor shows it as an address.
pub(super) fn host_in(told: &[u8], size: u64) -> Result<String, Failure> {
    let is_whole = told.len() as u64 == size;
    let host = std::str::from_utf8(told).ok().filter(|host| is_whole && is_host(host));
    host.map(str::to_owned).ok_or_else(|| {
        let shown: String = String::from_utf8_lossy(&told[..told.len().min(60)]).into_owned();
        let cut = if told.len() > 60 { "..." } else { "" };
        Failure::configuration(format!("it names an invalid host: \"{shown}{cut}\" ({size} bytes)"))
    })
}

/// Letters, digits, and the separators in names and addresses.
fn is_host(host: &str) -> bool {
    const LONGEST: usize = 253;
    let is_part = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'-' | b'_' | b':' | b'%');
    (1..=LONGEST).contains(&host.len()) && host.bytes().all(is_part)
}

/// Whether a reply to HELLO reports a replica. The reply consists of pairs of a name and a value, one of them `role`.
pub fn is_replica(reply: &Value) -> bool {
    let Value::Array(items) = reply else { return false };
    let is_role = |pair: &&[Value]| matches!(&pair[0], Value::BulkString(name) if name == b"role");
    let role = items.chunks_exact(2).find(is_role).map(|pair| &pair[1]);
    matches!(role, Some(Value::BulkString(role)) if role != b"master")
}

/// The hash slot and the address in `MOVED hash-slot host:port`.
pub fn redirect_in(message: &str) -> Option<(u16, Address)> {
    let mut words = message.strip_prefix("MOVED ")?.split_whitespace();
    let slot = words.next()?.parse().ok()?;
    let (host, port) = words.next()?.rsplit_once(':')?;
    let host = host.trim_start_matches('[').trim_end_matches(']').to_owned();
    let port = port.parse().ok().filter(|port| *port > 0)?;
    is_host(&host).then_some((slot, Address::Tcp { host, port }))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text(text: &str) -> Value {
        Value::BulkString(text.as_bytes().to_vec())
    }

    #[test]
    fn a_sentinels_answer_is_an_address_or_nothing() {
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
    fn only_a_node_that_reports_it_is_a_replica() {
        let hello = |role: &str| Value::Array(vec![text("mode"), text("sentinel"), text("role"), text(role)]);
        assert!(is_replica(&hello("slave")) && is_replica(&hello("replica")) && !is_replica(&hello("master")));
        assert!(!is_replica(&Value::Nil) && !is_replica(&Value::Array(vec![text("role")])));
    }

    /// What an address must not do to a log, a view or a terminal, and what is too long.
    #[test]
    fn an_invalid_host_is_not_an_address() {
        let long = "a".repeat(254);
        for host in [
            "",
            " ",
            "a b",
            "a\r\nb",
            "a\x1b[2J",
            "a\0",
            "\u{202e}a",
            "zażółć",
            "a/b",
            "\"",
            &long,
        ] {
            let failure = primary_in(Value::Array(vec![text(host), text("1")])).unwrap_err();
            assert!(failure.message.contains("an invalid host"), "{failure}");
            assert!(!failure.message.chars().any(char::is_control), "{failure}");
            assert_eq!(redirect_in(&format!("MOVED 7 {host}:1")), None, "{host:?}");
        }
        let longest = format!("{}.example", "a".repeat(245));
        for host in ["a", "10.0.0.1", "fe80::1%eth0", "redis_1.internal.", &longest] {
            assert!(primary_in(Value::Array(vec![text(host), text("1")])).is_ok(), "{host}");
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
