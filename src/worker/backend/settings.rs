//! The settings of a backend as its sender needs them: its row of `outbox.backends`, and `outbox_relay.redis_*` for
//! options that the row leaves NULL.

use crate::server::guc;
use crate::tables::backends::BackendRow;
use crate::tables::options::{Known, Options, Topology, Trimming, Unusable};
use crate::tables::stream_names::{self, DEFAULT_STREAM, Unnamed};
use relay::delivery::Guarantee;
use relay::event::format::Encoder;
use relay::redis::destination::{Address, ClientCertificate, Destination, NodeRoute, Protocol, Secret, Tls};
use relay::redis::hash_slot::{hash_slot_of, tag_of};
use relay::redis::replicas::Replicas;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::path::PathBuf;
use std::rc::Rc;
use std::time::Duration;

/// What backends need to know about their database.
#[derive(Clone, Default)]
pub(crate) struct Home {
    pub name: String,
    /// The beginning of a guard's key: it names the installation and the database.
    pub guard_prefix: String,
}

impl Home {
    /// Distinguishes this installation from others in the same database.
    pub(super) fn installation_hash(&self) -> u64 {
        let mut hasher = DefaultHasher::new();
        self.guard_prefix.hash(&mut hasher);
        hasher.finish()
    }
}

/// Where and how the events of a backend are sent. `lane`: the hash slot, in a cluster. An option of the row that
/// cannot be used is never replaced by another value: then there is no destination.
pub(super) fn destination(row: &BackendRow, home: &Home, lane: Option<u16>) -> Known<Destination> {
    let options = &row.options;
    let text = |own: &Option<String>, setting: &_| own.clone().unwrap_or_else(|| guc::text(setting));
    let time = |own: Option<Duration>, setting: &_| own.unwrap_or_else(|| guc::millis(setting));
    if let Some(unusable) = options.unusable() {
        return Err(unusable.clone());
    }
    if let (Ok(None), Some(fault)) = (&options.stream_name, stream_names::fault_of_setting()) {
        let problem = format!("is NULL, and outbox_relay.redis_stream_name {fault}");
        return Err(Unusable::new("stream_name", problem));
    }
    let port = options.port.clone()?;
    let address = match &options.unix_socket {
        Some(path) => Address::Unix(PathBuf::from(path)),
        None => Address::Tcp {
            host: text(&options.host, &guc::REDIS_HOST),
            port: port.unwrap_or_else(|| guc::REDIS_PORT.get() as u16),
        },
    };
    let socket_timeout = time(options.socket_timeout, &guc::REDIS_SOCKET_TIMEOUT_MS);
    let replicas = Some(options.wait_replicas.clone()?)
        .filter(|count| *count > 0)
        .map(|count| Replicas {
            count,
            // The reply must come before the connection counts as lost.
            wait_ms: (socket_timeout / 2).as_millis().max(1) as u64,
        });
    let protocol = match options.delivery.clone()? {
        Guarantee::ExactlyOnce => Protocol::ExactlyOnce {
            guard: guard_key(home, row.number, lane),
            replicas,
            ousting: None,
        },
        Guarantee::AtLeastOnce => Protocol::AtLeastOnce { replicas },
    };
    let password = secret(row);
    Ok(Destination {
        address,
        route: route(options, lane)?,
        allowed_hosts: guc::allowed_hosts(),
        tls: options.tls.clone()?.then(|| tls(options)),
        // A cluster has only database 0.
        db: match row.is_cluster() {
            true => 0,
            false => i64::from(options.db.unwrap_or_else(|| guc::REDIS_DB.get())),
        },
        username: Some(text(&options.username, &guc::REDIS_USERNAME)).filter(|u| !u.is_empty()),
        password,
        client_name: client_name(&home.name, &row.name),
        connect_timeout: time(options.connect_timeout, &guc::REDIS_CONNECT_TIMEOUT_MS),
        socket_timeout,
        protocol,
    })
}

/// As [`destination`], for a separate login; in a cluster, to the node of the backend's own stream.
pub(crate) fn destination_to_test(row: &BackendRow, home: &Home, stream: &str) -> Known<Destination> {
    let lane = row.is_cluster().then(|| hash_slot_of(stream.as_bytes()));
    destination(row, home, lane)
}

/// The stream of events whose rows name none.
pub(super) fn stream(options: Option<&Options>) -> Rc<str> {
    let plain = options.and_then(|options| options.stream_name.as_ref().ok()?.as_ref()?.plain());
    let own = plain.or_else(|| options.and_then(|options| options.own_stream.as_deref()));
    if let Some(own) = own {
        return own.into();
    }
    let noted = || options.and_then(|options| options.common_stream.clone());
    let common = stream_names::plain_setting().or_else(noted);
    common.as_deref().unwrap_or(DEFAULT_STREAM).into()
}

/// Whether events store their streams because `stream_name` is a template. Then hardly any are in the backend's own
/// stream.
pub(super) fn has_template(options: &Options) -> bool {
    match &options.stream_name {
        Ok(Some(name)) => name.plain().is_none(),
        Ok(None) => matches!(Unnamed::of_setting(), Unnamed::Template(_)),
        Err(_) => false,
    }
}

/// The length to which each XADD trims; 0: it does not trim.
pub(super) fn trimmed_to(options: Option<&Options>) -> i64 {
    match options.map(|options| &options.trim) {
        Some(Ok(Trimming::Read)) => 0,
        _ => max_len(options),
    }
}

/// The maximum length of streams; 0: unlimited.
pub(super) fn max_len(options: Option<&Options>) -> i64 {
    let own = options.and_then(|options| options.max_len.clone().ok().flatten());
    own.unwrap_or_else(|| i64::from(guc::REDIS_MAX_LEN.get()))
}

/// The encoder of entries. With unusable options nothing is sent, so their values do not matter here.
pub(super) fn encoder(options: Option<&Options>) -> Encoder {
    let format = options.and_then(|options| options.format.clone().ok());
    let fields = options.and_then(|options| options.static_fields.clone().ok());
    let encoder = Encoder::new(format.unwrap_or_default(), fields.unwrap_or_default());
    match options.map(|options| &options.include_lsn) {
        Some(Ok(true)) => encoder.with_lsn(),
        _ => encoder,
    }
}

/// The password that the backend logs in with at its present destination.
fn secret(row: &BackendRow) -> Option<Secret> {
    let file = |path: String, is_withheld| match is_withheld {
        true => Secret::Withheld,
        false => Secret::File(PathBuf::from(path)),
    };
    let withheld = row.withheld;
    if withheld.password {
        return Some(Secret::Withheld);
    }
    if withheld.is_unreadable {
        return Some(Secret::Unreadable);
    }
    if let Some(password) = row.password.clone() {
        return Some(Secret::Text(password));
    }
    if let Some(path) = row.options.password_file.clone() {
        return Some(file(path, withheld.file));
    }
    let path = guc::text(&guc::REDIS_PASSWORD_FILE);
    (row.is_at_common_address() && !path.is_empty()).then(|| file(path, withheld.common_file))
}

/// In a cluster, each hash slot has a guard of its own. A hash tag puts the guard into the hash slot of the streams,
/// whatever their names are.
fn guard_key(home: &Home, number: i32, lane: Option<u16>) -> String {
    let prefix = &home.guard_prefix;
    match lane {
        Some(hash_slot) => format!("{prefix}{number}:{{{}}}", tag_of(hash_slot)),
        None => format!("{prefix}{number}"),
    }
}

/// How its node is found.
fn route(options: &Options, lane: Option<u16>) -> Known<NodeRoute> {
    let nodes = || match options.nodes.clone()? {
        nodes if nodes.is_empty() => Err(Unusable::null("nodes")),
        nodes => Ok(nodes),
    };
    Ok(match options.mode.clone()? {
        Topology::Standalone => NodeRoute::Direct,
        Topology::Sentinel => NodeRoute::Sentinel {
            nodes: nodes()?,
            master: options
                .sentinel_master
                .clone()
                .ok_or_else(|| Unusable::null("sentinel_master"))?,
        },
        // Without a lane it never connects, so this value does not matter.
        Topology::Cluster => NodeRoute::Cluster {
            nodes: nodes()?,
            hash_slot: lane.unwrap_or_default(),
        },
    })
}

fn tls(options: &Options) -> Tls {
    let path = |column: &Option<String>| column.as_ref().map(PathBuf::from);
    Tls {
        ca_file: path(&options.tls_ca_file),
        client: path(&options.tls_cert_file)
            .zip(path(&options.tls_key_file))
            .map(|(cert_file, key_file)| ClientCertificate { cert_file, key_file }),
        insecure: options.tls_insecure,
    }
}

/// Redis allows no spaces or control characters in a client's name.
fn client_name(database: &str, backend: &str) -> String {
    format!("outbox_relay:{database}:{backend}")
        .chars()
        .map(|c| if c.is_ascii_graphic() { c } else { '_' })
        .collect()
}
