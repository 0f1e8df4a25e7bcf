//! Backends, as `outbox.backends` and the tables beside it describe them.

use crate::server::guc;
use crate::server::place::here;
use crate::tables::copies::Original;
use crate::tables::found_row::FoundRow;
use crate::tables::missing;
use crate::tables::options::{Options, Topology};
use crate::tables::retention::RecordedTicks;
use crate::tables::secret_key;
use crate::tables::sql::{argument, query, query_column, query_kept, query_named, query_value, run};
use crate::tables::stream_names;
use relay::reading::snapshot::{Snapshot, Tick};
use relay::seal;

/// A row of `outbox.backends`, with the related rows of other tables.
#[derive(Clone, PartialEq, Eq)]
pub(crate) struct BackendRow {
    pub number: i32,
    pub name: String,
    pub enabled: bool,
    pub options: Options,
    pub password: Option<String>,
    /// Secrets that were set for another destination.
    pub withheld: Withheld,
    /// A role that may not read the server's files has set where or how the backend connects.
    is_unconfirmed: bool,
    /// When somebody has called `outbox.take_over()` for the backend on this server, in microseconds since 1970.
    pub take_over: Option<i64>,
    /// Rows of `outbox.restores` whose events have to be looked for in the streams.
    pub restores: Vec<i64>,
    /// The latest transaction whose restored events have been looked for. 0: there was none.
    pub last_restore: u64,
    /// Set if this database is a copy and nobody has taken over the backend here.
    pub original: Option<Original>,
}

/// Which secrets must not be sent to the backend's current destination: see `outbox.destination()`.
#[derive(Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Withheld {
    /// The password of `outbox.set_backend_password()`.
    pub password: bool,
    /// That password cannot be decrypted, because the key was replaced.
    pub is_unreadable: bool,
    /// The backend's password file.
    pub file: bool,
    /// The password file of the settings. It is withheld if the backend used TLS before and now trusts other
    /// authorities or does not use TLS. It is also withheld if a role that may not read files has set the destination
    /// and no other backend uses the file in the same way.
    pub common_file: bool,
}

/// Whether a connection is encrypted and which authorities it trusts: `tls`, `tls_insecure` and `tls_ca_file`.
type Privacy<'a> = (bool, bool, Option<&'a str>);

impl BackendRow {
    pub(crate) fn is_cluster(&self) -> bool {
        self.options.mode == Ok(Topology::Cluster)
    }

    /// Whether it connects to the Redis that the settings name. The password file of the settings is used only for that
    /// address, because a role that may write backends may name any host.
    pub(crate) fn is_at_common_address(&self) -> bool {
        let options = &self.options;
        let has_no_other = options.mode == Ok(Topology::Standalone)
            && options.unix_socket.is_none()
            && options.nodes.as_ref().is_ok_and(Vec::is_empty);
        let is_same_host = options
            .host
            .as_ref()
            .is_none_or(|host| *host == guc::text(&guc::REDIS_HOST));
        let common_port = guc::REDIS_PORT.get();
        let is_same_port = matches!(&options.port, Ok(port) if port.is_none_or(|port| i32::from(port) == common_port));
        has_no_other && is_same_host && is_same_port
    }

    fn privacy(&self) -> Option<Privacy<'_>> {
        let options = &self.options;
        let tls = *options.tls.as_ref().ok()?;
        Some((tls, options.tls_insecure, options.tls_ca_file.as_deref()))
    }

    /// The privacy with which the password file of the settings is sent for it, if it is sent.
    fn common_way(&self) -> Option<Privacy<'_>> {
        let withheld = self.withheld;
        let has_own = self.password.is_some() || withheld.password || withheld.is_unreadable;
        let uses_common = self.enabled
            && !has_own
            && self.options.password_file.is_none()
            && !withheld.common_file
            && self.is_at_common_address();
        self.privacy().filter(|_| uses_common)
    }

    /// A backend from a row of the statement in [`all`], except its password.
    fn of(row: &FoundRow<'_>) -> Self {
        Self {
            number: row.value("number").unwrap_or_default(),
            name: row.text("name").unwrap_or_default(),
            enabled: row.value("enabled").unwrap_or_default(),
            options: Options::of(row),
            password: None,
            withheld: Withheld {
                password: row.value("is_password_withheld").unwrap_or_default(),
                is_unreadable: false,
                file: row.value("is_file_withheld").unwrap_or_default(),
                common_file: row.value("is_common_file_withheld").unwrap_or_default(),
            },
            is_unconfirmed: row.value("is_destination_unconfirmed").unwrap_or_default(),
            take_over: row.value("asked_to_take_over_us"),
            restores: row.value("restores_to_compare").unwrap_or_default(),
            last_restore: parsed(row.text("last_compared_restore")).unwrap_or_default(),
            original: row.text("original").map(|words| Original {
                words,
                is_database: row.value("is_original_database").unwrap_or_default(),
            }),
        }
    }
}

fn parsed<T: std::str::FromStr>(text: Option<String>) -> Option<T> {
    text?.parse().ok()
}

/// The installed version of the extension, if it is installed.
pub(crate) fn installed_version() -> Option<String> {
    query_value(
        "select extversion from pg_catalog.pg_extension where extname = 'outbox_relay'",
        &[],
    )
}

/// The installation, as it stands in the keys of guards.
pub(crate) fn installation() -> String {
    query_value("select id::text from outbox.installation", &[]).unwrap_or_else(|| missing::installation())
}

/// How many restores of one backend are read at once.
const RESTORES_AT_ONCE: i32 = 1_000;

/// All columns of a backend `b`, and the stream of backends that have none of their own. A column of type jsonb is read
/// as text.
const OPTIONS: &str = "(select outbox.common_stream()) as common_stream, b.static_fields::text as static_fields, b.*";

/// All backends, each with some of the restores that a snapshot sees. A new option needs no change here, because all
/// columns are selected.
pub(crate) fn all(seen: &Snapshot) -> Vec<BackendRow> {
    let found = query_named(
        &format!("select case when p.destination = d.destination then p.password end as sealed_password,
            coalesce(p.destination <> d.destination, false) as is_password_withheld,
            coalesce(m.destination <> d.destination, false) as is_file_withheld,
            coalesce(m.destination - 'username' <> d.destination - 'username', false) as is_destination_unconfirmed,
            coalesce((m.destination ->> 'tls')::boolean and (b.tls, b.tls_insecure, b.tls_ca_file)
                is distinct from (true, (m.destination ->> 'tls_insecure')::boolean, m.destination ->> 'tls_ca_file'), false)
                as is_common_file_withheld,
            (select (extract(epoch from t.asked_at) * 1000000)::bigint from outbox.take_overs t
                where t.backend_number = b.number and t.asked_of = $here) as asked_to_take_over_us,
            array(select r.number from outbox.restores r
                where r.backend_number = b.number and not r.is_looked_for and pg_visible_in_snapshot(r.xid, $seen::pg_snapshot)
                order by r.number limit $restores) as restores_to_compare,
            (select max(r.xid)::text from outbox.restores r where r.backend_number = b.number and r.is_looked_for)
                as last_compared_restore,
            c.original, c.is_database as is_original_database,
            -- Last: a column that somebody has added does not hide one of those above.
            {OPTIONS}
        from outbox.backends b left join outbox.backend_passwords p on p.backend_number = b.number
            left join outbox.moved_backends m on m.backend_number = b.number
            -- Of thousands of backends few have secrets.
            left join lateral (
                select outbox.destination(b) as destination where p.backend_number is not null or m.backend_number is not null
            ) d on true
            left join outbox.copied_backends c on c.backend_number = b.number
        order by b.number"),
        [
            ("here", argument(&here())),
            ("seen", seen.to_string().into()),
            ("restores", RESTORES_AT_ONCE.into()),
        ],
        |row| (BackendRow::of(row), row.value::<Vec<u8>>("sealed_password")),
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
    let mut found: Vec<BackendRow> = opened.collect();
    withhold_common_file(&mut found);
    found
}

/// Withholds the password file of the settings from a backend that a role without the right to read files has created
/// or moved, unless sending it there reveals the password to nobody new: another backend uses the file in the same way,
/// or without TLS.
fn withhold_common_file(backends: &mut [BackendRow]) {
    if !backends.iter().any(|backend| backend.is_unconfirmed) {
        return;
    }
    let confirmed = backends.iter().filter(|backend| !backend.is_unconfirmed);
    let ways: Vec<_> = confirmed.filter_map(BackendRow::common_way).collect();
    let shows = |backend: &BackendRow| !ways.iter().any(|way| !way.0 || backend.privacy() == Some(*way));
    let withheld: Vec<bool> = backends.iter().map(|b| b.is_unconfirmed && shows(b)).collect();
    for (backend, is_withheld) in backends.iter_mut().zip(withheld) {
        backend.withheld.common_file |= is_withheld;
    }
}

/// Numbers of deleted backends that had a cursor. Transactions that are not committed yet may still bring events for
/// them.
pub(crate) fn deleted_backends() -> Vec<i32> {
    query_column(
        "select distinct c.backend_number from outbox.cursors c
        where c.backend_number > 0 and not exists (select from outbox.backends b where b.number = c.backend_number)
            -- A number that was not given yet is another server's: see outbox.hold_cursor().
            and c.backend_number <= (select s.last_value from outbox.backends_number_seq s)",
        &[],
    )
}

/// Numbers of backends that have a reader of their own or soon will, and of deleted backends whose events are purged by
/// their own ticks.
pub(crate) fn known_numbers() -> Vec<i32> {
    query_column(
        "select number from outbox.backends union select backend_number from outbox.cursors where backend_number > 0
        union select backend_number from outbox.ticks where backend_number > 0",
        &[],
    )
}

/// Whether this is the number of a deleted backend whose cursor has gone.
pub(crate) fn is_forgotten(number: i32) -> bool {
    let found = query_kept(
        "select i.deleted_backends @> $1 as is_forgotten from outbox.installation i",
        &[number.into()],
        |row| row.value("is_forgotten").unwrap_or(false),
    );
    found.contains(&true)
}

/// Of these deleted backends, those that cannot be forgotten: another server reports its cursor for that number, and a
/// subscription applies changes of a cursor only where the row exists.
pub(crate) fn kept_for_others(numbers: &[i32]) -> Vec<i32> {
    query_column(
        "select n from unnest($1) n where exists (select from outbox.held_cursors h where h.backend_number = n)
            or exists (select from outbox.backends b where b.number = n)",
        &[numbers.to_vec().into()],
    )
}

/// Forgets deleted backends except that they existed, in the transaction that saves the cursor of strays. Their events
/// are purged by the given tick, which is the one of their cursors.
pub(crate) fn forget(numbers: &[i32], tick: &Tick) {
    RecordedTicks::by_the_clock().record_last(numbers, tick);
    run(
        "with cursors as (delete from outbox.cursors c where c.backend_number = any($1)),
            former as (delete from outbox.former_lanes f where f.backend_number = any($1)),
            moved as (delete from outbox.moved_backends m where m.backend_number = any($1)),
            copied as (delete from outbox.copied_backends c where c.backend_number = any($1)),
            take_overs as (delete from outbox.take_overs t where t.backend_number = any($1)),
            restores as (delete from outbox.restores r where r.backend_number = any($1)),
            groups as (delete from outbox.consumer_groups g where g.backend_number = any($1))
        update outbox.installation set deleted_backends = deleted_backends
            + (select range_agg(int4range(n, n, '[]')) from unnest($1) n)",
        &[numbers.to_vec().into()],
    );
    // TRUNCATE leaves the password behind. It is only deleted if it is there, because each statement on that table
    // makes all sessions load it again.
    let all = "outbox.backend_passwords p where p.backend_number = any($1)";
    if query_value(
        &format!("select exists (select from {all})"),
        &[numbers.to_vec().into()],
    )
    .unwrap_or(false)
    {
        run(&format!("delete from {all}"), &[numbers.to_vec().into()]);
    }
}

/// Whether a backend with this number was deleted: the number was assigned, and no backend has it now. Do not rely on
/// the worker's own list: a backend's events can be visible before the worker hears of the backend. A dump restores its
/// tables in any order, so restored events wait for their backend for a day.
pub(crate) fn is_deleted(number: i32) -> bool {
    query_value(
        "select $1 <= s.last_value
            and not exists (select from outbox.backends b where b.number = $1)
            and not exists (select from outbox.restores r
                where r.backend_number = $1 and r.restored_at > now() - '1 day'::interval)
        from outbox.backends_number_seq s",
        &[number.into()],
    )
    .unwrap_or(false)
}

/// The stream of a backend's events whose rows name no stream.
pub(crate) fn own_stream(number: i32) -> String {
    query(
        "select b.own_stream from outbox.backends b where b.number = $1",
        &[number.into()],
        |row| row.text("own_stream"),
    )
    .pop()
    .flatten()
    .unwrap_or_default()
}

/// Remembers the stream of the settings, for a time when the setting is a template.
pub(crate) fn note_common_stream() {
    if let Some(stream) = stream_names::plain_setting() {
        run(
            "update outbox.installation set common_stream = $1 where common_stream <> $1",
            &[argument(&stream)],
        );
    }
}

/// The options of a backend; found by its name if no backend has the number.
pub(crate) fn options(number: i32, name: &str) -> Option<Options> {
    query(
        &format!("select {OPTIONS} from outbox.backends b where b.number = $1 or b.name = $2 order by (b.number = $1) desc limit 1"),
        &[number.into(), argument(name)],
        Options::of,
    )
    .pop()
}

/// Deletes the order to take over a backend, after it was carried out. A later order stays.
pub(crate) fn forget_take_over(number: i32, asked_us: i64) {
    run(
        "delete from outbox.take_overs t
        where t.backend_number = $1 and (extract(epoch from t.asked_at) * 1000000)::bigint = $2",
        &[number.into(), asked_us.into()],
    );
}

/// Whether events of a backend are scheduled or wait for a retry.
pub(crate) fn waits_elsewhere(number: i32) -> bool {
    query_value(
        "select exists (select from outbox.scheduled_events where backend_number = $1)
            or exists (select from outbox.refused_events where backend_number = $1 and accepted_in is null)",
        &[number.into()],
    )
    .unwrap_or(false)
}
