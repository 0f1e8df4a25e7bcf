//! The hosts that the relay may connect to: the setting `outbox_relay.allowed_hosts`, a list of names, addresses,
//! networks and paths of sockets.
//!
//! A listed name may resolve to any address: listing it means to trust its DNS. For any other name, each address that
//! it resolves to must be allowed.

use ipnet::IpNet;
use std::net::IpAddr;
use std::path::{Component, Path};
use std::str::FromStr;
use wildmatch::WildMatch;

/// Lists are equal if their texts are equal.
#[derive(Clone, Debug, Default)]
pub struct AllowedHosts {
    text: String,
    rules: Vec<Rule>,
}

#[derive(Clone, Debug)]
enum Rule {
    /// `*`
    Everywhere,
    /// A glob pattern in lower case.
    Name(WildMatch),
    Network(IpNet),
    /// A glob pattern for the path of a unix socket.
    Path(WildMatch),
}

impl AllowedHosts {
    /// Whether the relay may connect to a host whatever its name resolves to.
    pub fn allows_name(&self, host: &str) -> bool {
        // An address is not treated as a name. Otherwise "10.*" would match addresses.
        let name = Some(plain(host)).filter(|name| name.parse::<IpAddr>().is_err());
        self.rules.iter().any(|rule| match (rule, &name) {
            (Rule::Everywhere, _) => true,
            (Rule::Name(glob), Some(name)) => glob.matches(name),
            _ => false,
        })
    }

    pub fn allows_address(&self, address: IpAddr) -> bool {
        let address = address.to_canonical();
        self.rules.iter().any(|rule| match rule {
            Rule::Everywhere => true,
            Rule::Network(network) => network.contains(&address),
            Rule::Name(_) | Rule::Path(_) => false,
        })
    }

    /// Whether any address may be allowed. If not, names need not be resolved.
    pub fn has_addresses(&self) -> bool {
        let is_one = |rule: &Rule| matches!(rule, Rule::Everywhere | Rule::Network(_));
        self.rules.iter().any(is_one)
    }

    /// A path with `..` is never allowed, because it could leave the directory of the glob pattern.
    pub fn allows_path(&self, path: &Path) -> bool {
        let is_straight = !path.components().any(|part| part == Component::ParentDir);
        self.rules.iter().any(|rule| match rule {
            Rule::Everywhere => true,
            Rule::Path(glob) => is_straight && path.to_str().is_some_and(|path| glob.matches(path)),
            Rule::Name(_) | Rule::Network(_) => false,
        })
    }
}

impl PartialEq for AllowedHosts {
    fn eq(&self, other: &Self) -> bool {
        self.text == other.text
    }
}

impl Eq for AllowedHosts {}

impl FromStr for AllowedHosts {
    /// What is wrong, as a sentence.
    type Err = String;

    /// An empty text allows no hosts.
    fn from_str(text: &str) -> Result<Self, String> {
        let rules = match text.trim() {
            "" => Vec::new(),
            list => list.split(',').map(|e| rule(e.trim())).collect::<Result<_, _>>()?,
        };
        let text = text.to_owned();
        Ok(Self { text, rules })
    }
}

fn rule(text: &str) -> Result<Rule, String> {
    if text.is_empty() {
        return Err("A rule is empty.".to_owned());
    }
    if text == "*" {
        return Ok(Rule::Everywhere);
    }
    if text.starts_with('/') {
        return Ok(Rule::Path(WildMatch::new(text)));
    }
    if text.contains('/') {
        let network = text
            .parse()
            .map_err(|_| format!("\"{text}\" is not a network such as 10.0.0.0/8."))?;
        return Ok(Rule::Network(network));
    }
    let bare = text.strip_prefix('[').and_then(|t| t.strip_suffix(']')).unwrap_or(text);
    if let Ok(address) = bare.parse::<IpAddr>() {
        return Ok(Rule::Network(address.to_canonical().into()));
    }
    if text.contains(':') {
        return Err(format!("\"{text}\" is not an address; ports cannot be listed."));
    }
    if !text.chars().all(|c| c.is_ascii_alphanumeric() || "-_.*?".contains(c)) {
        return Err(format!("\"{text}\" is not a host name."));
    }
    // A pattern without letters must not be a name, because it could match addresses.
    if !text.chars().any(|c| c.is_ascii_alphabetic()) {
        return Err(format!(
            "\"{text}\" is neither a name nor an address; write networks as 10.0.0.0/8."
        ));
    }
    Ok(Rule::Name(WildMatch::new(&plain(text))))
}

/// A name in the form that is compared: in lower case, without a trailing dot.
fn plain(host: &str) -> String {
    host.strip_suffix('.').unwrap_or(host).to_ascii_lowercase()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn list(text: &str) -> AllowedHosts {
        text.parse().unwrap_or_else(|error| panic!("{text}: {error}"))
    }

    fn allows(text: &str, host: &str) -> bool {
        let list = list(text);
        list.allows_name(host) || host.parse().is_ok_and(|address| list.allows_address(address))
    }

    #[test]
    fn names_addresses_and_networks() {
        for (text, allowed, others) in [
            ("*", vec!["redis", "10.0.0.1", "::1"], vec![]),
            ("", vec![], vec!["redis", "127.0.0.1"]),
            (
                "redis",
                vec!["redis", "Redis", "redis."],
                vec!["redis.evil", "xredis", "127.0.0.1"],
            ),
            ("Redis.Example., other", vec!["redis.example", "other"], vec!["example"]),
            (
                "*.internal",
                vec!["a.internal", "a.b.internal"],
                vec!["internal", "a.internal.evil", "10.0.0.1"],
            ),
            ("redis-?.x", vec!["redis-1.x"], vec!["redis-12.x"]),
            (
                "10.0.0.0/8",
                vec!["10.1.2.3", "::ffff:10.1.2.3"],
                vec!["11.0.0.1", "redis", "10.evil", "::1"],
            ),
            ("10.1.2.3", vec!["10.1.2.3"], vec!["10.1.2.4"]),
            ("fd00::/8, [::1]", vec!["fd00::5", "::1"], vec!["fe80::1", "127.0.0.1"]),
            ("::ffff:127.0.0.1", vec!["127.0.0.1"], vec!["127.0.0.2"]),
            // The resolver treats these as addresses, so they must not be allowed as names.
            ("*.example", vec![], vec!["127.1", "2130706433", "0x7f000001"]),
        ] {
            for host in allowed {
                assert!(allows(text, host), "{text} allows {host}");
            }
            for host in others {
                assert!(!allows(text, host), "{text} does not allow {host}");
            }
        }
    }

    #[test]
    fn paths() {
        let allows = |text: &str, path: &str| list(text).allows_path(Path::new(path));
        assert!(allows("*", "/tmp/redis.sock"));
        assert!(allows("/run/redis/*", "/run/redis/redis.sock"));
        assert!(allows("localhost, /run/redis.sock", "/run/redis.sock"));
        assert!(!allows("/run/redis/*", "/run/redis/../evil.sock"));
        assert!(!allows("/run/redis.sock", "/run/redis.sock2"));
        assert!(!allows("localhost, *.sock, 0.0.0.0/0", "/run/redis.sock"));
    }

    #[test]
    fn malformed_lists() {
        for text in [
            ",",
            "a,,b",
            "a,",
            "10.0.0.0/33",
            "10.0.0/8",
            "redis/8",
            "redis:6379",
            "[::1]:6379",
            "10.*",
            "*.*",
            "?",
            "1.2.3",
            "a b",
            "red\u{e9}",
            "http://x",
            "user@host",
            "!redis",
        ] {
            assert!(text.parse::<AllowedHosts>().is_err(), "{text}");
        }
    }
}
