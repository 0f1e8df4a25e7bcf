//! A backend's settings as its sender needs them: where Redis is and how to log in.

use crate::failure::{Failure, Trouble};
use crate::redis::allowed_hosts::AllowedHosts;
use crate::redis::replicas::Replicas;
use std::fmt;
use std::path::PathBuf;
use std::time::Duration;

/// How to reach one Redis. Two equal destinations need no new connection.
#[derive(Clone, PartialEq, Eq)]
pub struct Destination {
    /// Of the one Redis. Other routes do not use it.
    pub address: Address,
    pub route: Route,
    /// Where it may connect to, here or elsewhere.
    pub allowed_hosts: AllowedHosts,
    /// On TCP alone.
    pub tls: Option<Tls>,
    pub db: i64,
    pub username: Option<String>,
    pub password: Option<Secret>,
    /// Shown by Redis in CLIENT LIST.
    pub client_name: String,
    pub connect_timeout: Duration,
    /// For each write, and for each reply after the one before: for all of it, and again for each further 64 KiB of a
    /// long one.
    pub socket_timeout: Duration,
    pub protocol: Protocol,
}

/// How the node that is written to is found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Route {
    /// It is at the destination's address.
    Direct,
    /// It is the primary of this name, as one of these sentinels says.
    Sentinel { nodes: Vec<Address>, master: String },
    /// It serves this hash slot of the cluster to which these nodes belong.
    Cluster { nodes: Vec<Address>, hash_slot: u16 },
}

/// How batches are appended.
#[derive(Clone, PartialEq, Eq)]
pub enum Protocol {
    /// As plain commands.
    AtLeastOnce { replicas: Option<Replicas> },
    /// In transactions with the guard at this key.
    ExactlyOnce {
        guard: String,
        replicas: Option<Replicas>,
        /// The guard is to be taken over. It is first given this token, so that a busy owner stops appending.
        ousting: Option<String>,
    },
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Address {
    Tcp { host: String, port: u16 },
    Unix(PathBuf),
}

/// How TLS is spoken. Files are read again at each connect.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tls {
    /// Authorities that are trusted; `None`: the system's.
    pub ca_file: Option<PathBuf>,
    pub client: Option<ClientCertificate>,
    /// The server's certificate is not verified.
    pub insecure: bool,
}

/// Our own certificate.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ClientCertificate {
    pub cert_file: PathBuf,
    pub key_file: PathBuf,
}

/// Where the password comes from. It is never shown.
#[derive(Clone, PartialEq, Eq)]
pub enum Secret {
    Text(String),
    /// Read again at each connect; its first line.
    File(PathBuf),
    /// It was set for another destination: nothing is sent to this one.
    Withheld,
    /// It is there, but cannot be opened.
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
                "the backend's password cannot be opened: it was sealed with another key",
            )),
        }
    }
}

impl Address {
    /// From `host:port`, an IPv6 address in brackets.
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

/// Where it is, or who is asked for it.
impl fmt::Display for Route {
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
