//! A backend's settings as its sender needs them: where Redis is and how to log in.

use crate::failure::{Failure, Trouble};
use crate::redis::allowed_hosts::AllowedHosts;
use crate::redis::replicas::Replicas;
use std::fmt;
use std::path::PathBuf;
use std::time::Duration;

/// How to reach one Redis. If two destinations are equal, no new connection is needed.
#[derive(Clone, PartialEq, Eq)]
pub struct Destination {
    /// The address for a direct route. Other routes do not use it.
    pub address: Address,
    pub route: NodeRoute,
    /// The hosts that it may connect to, on any route.
    pub allowed_hosts: AllowedHosts,
    /// Only on TCP.
    pub tls: Option<Tls>,
    pub db: i64,
    pub username: Option<String>,
    pub password: Option<Secret>,
    /// Redis shows it in CLIENT LIST.
    pub client_name: String,
    pub connect_timeout: Duration,
    /// The timeout for each write, and for each reply after the previous one. It is for the whole reply, and again for
    /// each further 64 KiB of a long one.
    pub socket_timeout: Duration,
    pub protocol: Protocol,
}

impl Destination {
    /// Shortens what is waited for longer than this.
    pub fn wait_at_most(&mut self, patience: Duration) {
        self.connect_timeout = self.connect_timeout.min(patience);
        self.socket_timeout = self.socket_timeout.min(patience);
        let (Protocol::AtLeastOnce { replicas } | Protocol::ExactlyOnce { replicas, .. }) = &mut self.protocol;
        if let Some(replicas) = replicas {
            // The reply must come before the connection counts as lost.
            let half = (self.socket_timeout / 2).as_millis().max(1);
            replicas.wait_ms = replicas.wait_ms.min(u64::try_from(half).unwrap_or(u64::MAX));
        }
    }
}

/// How the node to write to is found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum NodeRoute {
    /// It is at the destination's address.
    Direct,
    /// It is the primary of this name, according to one of these sentinels.
    Sentinel { nodes: Vec<Address>, master: String },
    /// It serves this hash slot in the cluster of these nodes.
    Cluster { nodes: Vec<Address>, hash_slot: u16 },
}

/// How batches are appended.
#[derive(Clone, PartialEq, Eq)]
pub enum Protocol {
    /// As plain commands.
    AtLeastOnce { replicas: Option<Replicas> },
    /// In transactions with the guard that has this key.
    ExactlyOnce {
        guard: String,
        replicas: Option<Replicas>,
        /// Set if the guard is to be taken over. It first gets this token, so that a busy owner stops appending.
        ousting: Option<String>,
    },
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Address {
    Tcp { host: String, port: u16 },
    Unix(PathBuf),
}

/// How TLS is used. Files are read again for each connection.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tls {
    /// The trusted authorities; `None`: those of the operating system.
    pub ca_file: Option<PathBuf>,
    pub client: Option<ClientCertificate>,
    /// The server's certificate is not verified.
    pub insecure: bool,
}

/// The client's certificate.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ClientCertificate {
    pub cert_file: PathBuf,
    pub key_file: PathBuf,
}

/// Where the password comes from. It is never shown.
#[derive(Clone, PartialEq, Eq)]
pub enum Secret {
    Text(String),
    /// The first line of this file, read again for each connection.
    File(PathBuf),
    /// It was set for another destination and must not be sent to this one.
    Withheld,
    /// It exists but cannot be decrypted.
    Unreadable,
}

impl Secret {
    /// Why no connection may be opened.
    pub fn refusal(&self) -> Option<Failure> {
        match self {
            Self::Text(_) | Self::File(_) => None,
            Self::Withheld => Some(Failure::of(
                Trouble::Withheld,
                "the backend's password was set for another destination",
            )),
            Self::Unreadable => Some(Failure::of(
                Trouble::Unreadable,
                "the backend's password cannot be decrypted: it was sealed with another key",
            )),
        }
    }
}

impl Address {
    /// Parses `host:port`, with an IPv6 address in brackets.
    pub fn of_node(text: &str) -> Option<Self> {
        let (host, port) = text.rsplit_once(':')?;
        let bare = host.strip_prefix('[').and_then(|h| h.strip_suffix(']'));
        let host = match bare {
            Some(host) => host,
            None if host.contains([':', '[', ']']) => return None,
            None => host,
        };
        let port = port.parse().ok().filter(|port| *port > 0)?;
        (!host.is_empty()).then(|| Self::Tcp {
            host: host.to_owned(),
            port,
        })
    }
}

/// Shows where the node is, or which nodes are asked for it.
impl fmt::Display for NodeRoute {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let nodes = match self {
            Self::Direct => return Ok(()),
            Self::Sentinel { nodes, master } => {
                write!(f, "master \"{master}\" of the sentinels ")?;
                nodes
            }
            Self::Cluster { nodes, .. } => {
                write!(f, "the cluster of ")?;
                nodes
            }
        };
        for (index, node) in nodes.iter().enumerate() {
            write!(f, "{}{node}", if index > 0 { ", " } else { "" })?;
        }
        Ok(())
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp { host, port } if host.contains(':') => write!(f, "[{host}]:{port}"),
            Self::Tcp { host, port } => write!(f, "{host}:{port}"),
            Self::Unix(path) => write!(f, "{}", path.display()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nodes_are_a_host_and_a_port() {
        for (text, shown) in [
            ("a:1", "a:1"),
            ("10.0.0.1:65535", "10.0.0.1:65535"),
            ("[::1]:6379", "[::1]:6379"),
        ] {
            assert_eq!(Address::of_node(text).map(|a| a.to_string()).as_deref(), Some(shown));
        }
        for text in [
            "", "a", ":1", "a:", "a:0", "a:65536", "::1:6379", "[::1]", "[]:1", "a:b",
        ] {
            assert_eq!(Address::of_node(text), None, "{text:?}");
        }
    }
}
