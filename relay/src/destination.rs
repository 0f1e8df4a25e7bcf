//! A backend's settings as its sender needs them: where Redis is and how to log in.

use crate::conversation::Replicas;
use std::fmt;
use std::path::PathBuf;
use std::time::Duration;

/// How to reach one Redis. Two equal destinations need no new connection.
#[derive(Clone, PartialEq, Eq)]
pub struct Destination {
    pub address: Address,
    pub db: i64,
    pub username: Option<String>,
    pub password: Option<Secret>,
    /// Shown by Redis in CLIENT LIST.
    pub client_name: String,
    pub connect_timeout: Duration,
    /// For each write, and for the first byte of each reply after the one before.
    pub socket_timeout: Duration,
    pub delivery: Delivery,
}

/// How batches are appended.
#[derive(Clone, PartialEq, Eq)]
pub enum Delivery {
    /// As plain commands.
    AtLeastOnce { replicas: Option<Replicas> },
    /// In transactions with the guard at this key.
    ExactlyOnce { guard: String, replicas: Option<Replicas> },
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Address {
    Tcp { host: String, port: u16 },
    Unix(PathBuf),
}

/// Where the password comes from. It is never shown.
#[derive(Clone, PartialEq, Eq)]
pub enum Secret {
    Text(String),
    /// Read again at each connect; its first line.
    File(PathBuf),
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
