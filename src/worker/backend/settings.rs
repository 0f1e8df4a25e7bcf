//! The settings of a backend as its sender needs them: its row of `outbox.backends`, and `outbox_relay.redis_*` where that has none.

use crate::server::guc;
use crate::tables::backends::BackendRow;
use relay::delivery::Guarantee;
use relay::redis::destination::{Address, ClientCertificate, Destination, Protocol, Route, Secret, Tls};
use relay::redis::hash_slot::tag_of;
use relay::redis::replicas::Replicas;
use std::path::PathBuf;
use std::rc::Rc;
use std::time::Duration;

/// What backends need to know of their database.
#[derive(Clone, Default)]
pub struct Home {
    pub name: String,
    /// A guard's key begins with it: it names the installation and the database.
    pub guard_prefix: String,
}

/// The settings of a backend, with `outbox_relay.redis_*` where its row has none.
/// `lane`: the hash slot that is served, in a cluster.
pub fn settings(row: Option<&BackendRow>, home: &Home, lane: Option<u16>) -> (Destination, Rc<str>, i64) {
    let or_setting = |value: Option<&String>, setting: &_| value.cloned().unwrap_or_else(|| guc::text(setting));
    let field = |get: fn(&BackendRow) -> Option<&String>| row.and_then(get);
    let millis = |own: Option<i64>, setting: &_| {
        own.map_or_else(|| guc::millis(setting), |ms| Duration::from_millis(ms.max(1) as u64))
    };
    let address = match field(|r| r.unix_socket.as_ref()) {
        Some(path) => Address::Unix(PathBuf::from(path)),
        None => Address::Tcp {
            host: or_setting(field(|r| r.host.as_ref()), &guc::REDIS_HOST),
            port: row.and_then(|r| r.port).unwrap_or_else(|| guc::REDIS_PORT.get()) as u16,
        },
    };
    let socket_timeout = millis(row.and_then(|r| r.socket_timeout_ms), &guc::REDIS_SOCKET_TIMEOUT_MS);
    let replicas = row.filter(|r| r.wait_replicas > 0).map(|r| Replicas {
        count: r.wait_replicas as u32,
        // The reply must come before the connection counts as dead.
        wait_ms: (socket_timeout / 2).as_millis().max(1) as u64,
    });
    let protocol = match row {
        Some(row) if row.delivery == "exactly_once" => Protocol::ExactlyOnce {
            guard: guard_key(home, row.number, lane),
            replicas,
            ousting: None,
        },
        _ => Protocol::AtLeastOnce { replicas },
    };
    let password = secret(row, &address);
    let destination = Destination {
        address,
        route: row.map_or(Route::Direct, |row| route(row, lane)),
        allowed_hosts: guc::allowed_hosts(),
        tls: row.filter(|r| r.tls).map(tls),
        // A cluster has no other.
        db: match row {
            Some(row) if row.is_cluster() => 0,
            row => i64::from(row.and_then(|r| r.db).unwrap_or_else(|| guc::REDIS_DB.get())),
        },
        username: Some(or_setting(field(|r| r.username.as_ref()), &guc::REDIS_USERNAME)).filter(|u| !u.is_empty()),
        password,
        client_name: client_name(&home.name, row.map_or("", |r| &r.name)),
        connect_timeout: millis(row.and_then(|r| r.connect_timeout_ms), &guc::REDIS_CONNECT_TIMEOUT_MS),
        socket_timeout,
        protocol,
    };
    let stream = Rc::from(or_setting(field(|r| r.stream_name.as_ref()), &guc::REDIS_STREAM_NAME));
    let max_len = row
        .and_then(|r| r.max_len)
        .unwrap_or_else(|| i64::from(guc::REDIS_MAX_LEN.get()));
    (destination, stream, max_len)
}

/// What the backend logs in with, where it connects now.
fn secret(row: Option<&BackendRow>, address: &Address) -> Option<Secret> {
    let file = |path: String, is_withheld| match is_withheld {
        true => Secret::Withheld,
        false => Secret::File(PathBuf::from(path)),
    };
    let withheld = row.map(|row| row.withheld).unwrap_or_default();
    if withheld.password {
        return Some(Secret::Withheld);
    }
    if withheld.is_unreadable {
        return Some(Secret::Unreadable);
    }
    if let Some(password) = row.and_then(|row| row.password.clone()) {
        return Some(Secret::Text(password));
    }
    if let Some(path) = row.and_then(|row| row.password_file.clone()) {
        return Some(file(path, withheld.file));
    }
    // Whoever may write backends may name any host: the file of the settings is for that of the settings.
    let common = Address::Tcp {
        host: guc::text(&guc::REDIS_HOST),
        port: guc::REDIS_PORT.get() as u16,
    };
    let is_common = *address == common && row.is_none_or(|row| row.nodes.is_empty());
    let path = guc::text(&guc::REDIS_PASSWORD_FILE);
    (is_common && !path.is_empty()).then(|| file(path, withheld.common_file))
}

/// In a cluster each hash slot has a guard of its own, with a tag that puts it beside the streams, whatever they are called.
fn guard_key(home: &Home, number: i32, lane: Option<u16>) -> String {
    let prefix = &home.guard_prefix;
    match lane {
        Some(hash_slot) => format!("{prefix}{number}:{{{}}}", tag_of(hash_slot)),
        None => format!("{prefix}{number}"),
    }
}

/// How its node is found. The row's constraints have seen to what belongs together.
fn route(row: &BackendRow, lane: Option<u16>) -> Route {
    let nodes = row.nodes.iter().filter_map(|node| Address::of_node(node)).collect();
    match (row.mode.as_str(), &row.sentinel_master) {
        // What is no lane connects nowhere.
        ("cluster", _) => Route::Cluster {
            nodes,
            hash_slot: lane.unwrap_or_default(),
        },
        ("sentinel", Some(master)) => Route::Sentinel {
            nodes,
            master: master.clone(),
        },
        _ => Route::Direct,
    }
}

fn tls(row: &BackendRow) -> Tls {
    let path = |column: &Option<String>| column.as_ref().map(PathBuf::from);
    Tls {
        ca_file: path(&row.tls_ca_file),
        client: path(&row.tls_cert_file)
            .zip(path(&row.tls_key_file))
            .map(|(cert_file, key_file)| ClientCertificate { cert_file, key_file }),
        insecure: row.tls_insecure,
    }
}

pub fn guarantee_of(destination: &Destination) -> Guarantee {
    match destination.protocol {
        Protocol::AtLeastOnce { .. } => Guarantee::AtLeastOnce,
        Protocol::ExactlyOnce { .. } => Guarantee::ExactlyOnce,
    }
}

/// Redis allows no spaces or control characters in a client's name.
fn client_name(database: &str, backend: &str) -> String {
    format!("outbox_relay:{database}:{backend}")
        .chars()
        .map(|c| if c.is_ascii_graphic() { c } else { '_' })
        .collect()
}
