//! What `outbox.backends` and its companions say.

use crate::server::place::here;
use crate::tables::copies::Original;
use crate::tables::secret_key;
use crate::tables::sql::{argument, query, run, text, texts, value};
use pgrx::spi::SpiTupleTable;
use relay::reading::snapshot::Snapshot;
use relay::seal;

/// A row of `outbox.backends`, with its password.
#[derive(Clone, PartialEq, Eq)]
pub struct BackendRow {
    pub number: i32,
    pub name: String,
    pub enabled: bool,
    pub mode: String,
    pub nodes: Vec<String>,
    pub sentinel_master: Option<String>,
    pub host: Option<String>,
    pub port: Option<i32>,
    pub db: Option<i32>,
    pub username: Option<String>,
    pub stream_name: Option<String>,
    pub max_len: Option<i64>,
    pub connect_timeout_ms: Option<i64>,
    pub socket_timeout_ms: Option<i64>,
    pub unix_socket: Option<String>,
    pub password_file: Option<String>,
    pub password: Option<String>,
    /// Which of its secrets were set for another destination.
    pub withheld: Withheld,
    pub delivery: String,
    pub on_missing_guard: String,
    pub wait_replicas: i32,
    pub tls: bool,
    pub tls_ca_file: Option<String>,
    pub tls_cert_file: Option<String>,
    pub tls_key_file: Option<String>,
    pub tls_insecure: bool,
    /// Somebody has asked for it, see `outbox.take_over()`.
    pub take_over: bool,
    /// Rows of `outbox.restores`: events of a dump have come.
    pub restores: Vec<i64>,
    /// The latest transaction that has brought such events which were looked for; 0: none has.
    pub last_restore: u64,
    /// This database is a copy, and nobody has said that it is to send the backend's events.
    pub original: Option<Original>,
}

/// Secrets that are not sent to where a backend connects now: see `outbox.destination()`.
#[derive(Clone, Copy, Default, PartialEq, Eq)]
pub struct Withheld {
    /// That of `outbox.set_backend_password()`.
    pub password: bool,
    /// It cannot be opened: the key is another one.
    pub is_unreadable: bool,
    /// Its own file.
    pub file: bool,
    /// The file of the settings: of a backend that was to speak TLS, and now trusts others or none.
    pub common_file: bool,
}

impl BackendRow {
    pub fn is_cluster(&self) -> bool {
        self.mode == "cluster"
    }
}

/// The installed version of the extension, if it is there.
pub fn installed_version() -> Option<String> {
    query(
        "select extversion from pg_catalog.pg_extension where extname = 'outbox_relay'",
        &[],
        |row| value(row, 1),
    )
    .pop()
    .flatten()
}

/// The name of this installation in the keys of guards.
pub fn installation() -> String {
    query("select id::text from outbox.installation", &[], |row| value(row, 1))
        .pop()
        .flatten()
        .unwrap_or_default()
}

/// Restores of one backend that are looked at at once.
const RESTORES_AT_ONCE: i32 = 1_000;

/// A row of the statement below, but for its password.
fn backend_row(row: &SpiTupleTable<'_>) -> BackendRow {
    BackendRow {
        number: value(row, 1).unwrap_or_default(),
        name: text(row, 2).unwrap_or_default(),
        enabled: value(row, 3).unwrap_or_default(),
        host: text(row, 4),
        port: value(row, 5),
        db: value(row, 6),
        username: text(row, 7),
        stream_name: text(row, 8),
        max_len: value(row, 9),
        connect_timeout_ms: value(row, 10),
        socket_timeout_ms: value(row, 11),
        unix_socket: text(row, 12),
        password_file: text(row, 13),
        password: None,
        delivery: value(row, 15).unwrap_or_default(),
        on_missing_guard: value(row, 16).unwrap_or_default(),
        wait_replicas: value(row, 17).unwrap_or_default(),
        take_over: value(row, 18).unwrap_or_default(),
        restores: value(row, 19).unwrap_or_default(),
        mode: value(row, 20).unwrap_or_default(),
        nodes: texts(row, 21),
        sentinel_master: text(row, 22),
        tls: value(row, 23).unwrap_or_default(),
        tls_ca_file: text(row, 24),
        tls_cert_file: text(row, 25),
        tls_key_file: text(row, 26),
        tls_insecure: value(row, 27).unwrap_or_default(),
        original: text(row, 28).map(|words| Original {
            words,
            is_database: value(row, 29).unwrap_or_default(),
        }),
        withheld: Withheld {
            password: value(row, 30).unwrap_or_default(),
            is_unreadable: false,
            file: value(row, 31).unwrap_or_default(),
            common_file: value(row, 32).unwrap_or_default(),
        },
        last_restore: text(row, 33).and_then(|xid| xid.parse().ok()).unwrap_or_default(),
    }
}

/// All backends, with those restores that a snapshot sees, some of them.
pub fn all(seen: &Snapshot) -> Vec<BackendRow> {
    let found = query(
        "select b.number, b.name, b.enabled, b.host, b.port, b.db, b.username, b.stream_name, b.max_len,
            (extract(epoch from b.connect_timeout) * 1000)::bigint, (extract(epoch from b.socket_timeout) * 1000)::bigint,
            b.unix_socket, b.password_file, case when p.destination = d.destination then p.password end, b.delivery, b.on_missing_guard, b.wait_replicas,
            exists (select from outbox.take_overs t where t.backend_number = b.number and t.asked_of = $1),
            array(select r.number from outbox.restores r
                where r.backend_number = b.number and not r.is_looked_for and pg_visible_in_snapshot(r.xid, $2::pg_snapshot)
                order by r.number limit $3),
            b.mode, coalesce(b.nodes, '{}'), b.sentinel_master,
            b.tls, b.tls_ca_file, b.tls_cert_file, b.tls_key_file, b.tls_insecure, c.original, c.is_database,
            coalesce(p.destination <> d.destination, false), coalesce(m.destination <> d.destination, false),
            coalesce((m.destination ->> 'tls')::boolean and (b.tls, b.tls_insecure, b.tls_ca_file)
                is distinct from (true, (m.destination ->> 'tls_insecure')::boolean, m.destination ->> 'tls_ca_file'), false),
            (select max(r.xid)::text from outbox.restores r where r.backend_number = b.number and r.is_looked_for)
        from outbox.backends b left join outbox.backend_passwords p on p.backend_number = b.number
            left join outbox.moved_backends m on m.backend_number = b.number
            -- Of thousands of backends few have secrets.
            left join lateral (
                select outbox.destination(b) as destination where p.backend_number is not null or m.backend_number is not null
            ) d on true
            left join outbox.copied_backends c on c.backend_number = b.number
        order by b.number",
        &[
            argument(&here()),
            seen.to_string().into(),
            RESTORES_AT_ONCE.into(),
        ],
        |row| (backend_row(row), value::<Vec<u8>>(row, 14)),
    );
    let mut key = None;
    let opened = found.into_iter().map(|(mut backend, sealed)| {
        if let Some(sealed) = sealed {
            let key = key.get_or_insert_with(secret_key::key);
            backend.password = key.and_then(|key| seal::open(&key, backend.number, &sealed));
            backend.withheld.is_unreadable = backend.password.is_none();
        }
        backend
    });
    opened.collect()
}

/// Numbers of backends that were deleted but had a cursor: uncommitted events of theirs may still come.
pub fn deleted_backends() -> Vec<i32> {
    query(
        "select distinct c.backend_number from outbox.cursors c
        where c.backend_number > 0 and not exists (select from outbox.backends b where b.number = c.backend_number)
            -- A number that was not given yet is another server's: see outbox.hold_cursor().
            and c.backend_number <= (select s.last_value from outbox.backends_number_seq s)",
        &[],
        |row| value(row, 1).unwrap_or_default(),
    )
}

/// Numbers that have a reader of their own, or are about to.
pub fn known_numbers() -> Vec<i32> {
    query(
        "select number from outbox.backends union select backend_number from outbox.cursors where backend_number > 0",
        &[],
        |row| value(row, 1).unwrap_or_default(),
    )
}

/// Whether a backend of this number was deleted: the number was given, and nobody has it as of now. (Whether the worker knows it is
/// another matter: a backend's events may be seen before the news of it has come.) A dump brings its tables in any order: for a day,
/// restored events wait for their backend.
pub fn is_deleted(number: i32) -> bool {
    query(
        "select $1 <= s.last_value
            and not exists (select from outbox.backends b where b.number = $1)
            and not exists (select from outbox.restores r
                where r.backend_number = $1 and r.restored_at > now() - '1 day'::interval)
        from outbox.backends_number_seq s",
        &[number.into()],
        |row| value(row, 1),
    )
    .pop()
    .flatten()
    .unwrap_or(false)
}

/// The stream of a backend's events that name none.
pub fn own_stream(number: i32) -> String {
    query(
        "select coalesce(b.stream_name, '') from outbox.backends b where b.number = $1",
        &[number.into()],
        |row| text(row, 1),
    )
    .pop()
    .flatten()
    .unwrap_or_default()
}

/// A backend was taken over.
pub fn forget_take_over(number: i32) {
    run(
        "delete from outbox.take_overs where backend_number = $1",
        &[number.into()],
    );
}

/// Whether events of a backend are scheduled or being tried again.
pub fn waits_elsewhere(number: i32) -> bool {
    query(
        "select exists (select from outbox.scheduled_events where backend_number = $1)
            or exists (select from outbox.refused_events where backend_number = $1 and accepted_in is null)",
        &[number.into()],
        |row| value(row, 1),
    )
    .pop()
    .flatten()
    .unwrap_or(false)
}
