//! All reading and writing of our tables by SQL. Every function needs a transaction with a snapshot, and raises an ERROR when
//! something is wrong. (Events themselves are read in `rows.rs` and inserted in `publish.rs`, without SQL.)

use crate::care::{self, Kept};
use crate::catalog;
use crate::copies::Original;
use crate::encoding;
use crate::error::internal;
use crate::missing::Index;
use crate::ownership;
use crate::publish::text_datum;
use crate::rights;
use crate::rows;
use crate::secret_key;
use crate::trigger;
use pgrx::datum::DatumWithOid;
use pgrx::pg_sys::{self, PgOid};
use pgrx::spi::{Spi, SpiTupleTable};
use relay::delivery::Cursor;
use relay::reader::{Position, UnderWay};
use relay::seal;
use relay::snapshot::{Snapshot, Tick};
use std::borrow::Cow;
use std::sync::Arc;

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

/// A lane as a column of our tables: its slot, or this where there are none.
const NO_LANE: i32 = -1;

fn lane_number(lane: Option<u16>) -> i32 {
    lane.map_or(NO_LANE, i32::from)
}

/// What is saved of a backend beside its position.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Standing {
    pub state: String,
    pub published_total: i64,
    pub failed_total: i64,
    pub events_per_second: f32,
    pub last_published_at: Option<i64>,
    pub last_error: Option<String>,
    pub last_error_at: Option<i64>,
    pub next_attempt_at: Option<i64>,
    /// How often Redis was found to have lost something.
    pub healings: i64,
    /// How often its guard was claimed.
    pub epoch: i64,
    /// Where it was connected last.
    pub address: Option<String>,
}

/// Reads what is committed now. Takes no transaction id, as SPI's `update` would: looking writes no WAL, and works on a standby.
pub fn query<R>(sql: &str, args: &[DatumWithOid<'_>], each: impl FnMut(&SpiTupleTable<'_>) -> R) -> Vec<R> {
    // SAFETY: within a transaction; popped below, or by its abort. A transaction without an id reads with the active
    // snapshot, which may be older than the invalidations that were taken in.
    unsafe { pg_sys::PushActiveSnapshot(pg_sys::GetLatestSnapshot()) };
    let found = rights::statement(|| {
        Spi::connect(|client| {
            let statement = client.prepare(sql, &types_of(args));
            let statement = statement.unwrap_or_else(|e| internal(e.to_string()));
            let table = rights::execution(|| client.select(&statement, None, args));
            read_all(table.unwrap_or_else(|e| internal(e.to_string())), each)
        })
    });
    // SAFETY: the snapshot pushed above is the active one again.
    unsafe { pg_sys::PopActiveSnapshot() };
    found
}

fn read_all<R>(mut table: SpiTupleTable<'_>, mut each: impl FnMut(&SpiTupleTable<'_>) -> R) -> Vec<R> {
    let mut found = Vec::with_capacity(table.len());
    if !table.is_empty() {
        table = table.first();
        for _ in 0..table.len() {
            found.push(each(&table));
            table.next();
        }
    }
    found
}

/// Writes; returns how many rows.
pub fn run(sql: &str, args: &[DatumWithOid<'_>]) -> u64 {
    rights::statement(|| {
        Spi::connect_mut(|client| {
            let statement = client.prepare_mut(sql, &types_of(args));
            let statement = statement.unwrap_or_else(|e| internal(e.to_string()));
            let table = rights::execution(|| client.update(&statement, None, args));
            table.unwrap_or_else(|e| internal(e.to_string())).len() as u64
        })
    })
}

fn types_of(args: &[DatumWithOid<'_>]) -> Vec<PgOid> {
    args.iter().map(|a| PgOid::from(a.oid())).collect()
}

/// A value of the current row; a value of another type than expected is an internal error.
pub fn value<T: pgrx::IntoDatum + pgrx::FromDatum>(row: &SpiTupleTable<'_>, ordinal: usize) -> Option<T> {
    row.get(ordinal).unwrap_or_else(|e| internal(e.to_string()))
}

/// A text of the current row, in UTF-8 whatever the database's encoding.
pub fn text(row: &SpiTupleTable<'_>, ordinal: usize) -> Option<String> {
    let datum = row
        .get_datum_by_ordinal(ordinal)
        .unwrap_or_else(|e| internal(e.to_string()));
    // SAFETY: a column of type text, in a row that is there.
    datum.map(|d| unsafe { rows::utf8_of(d).into_owned() })
}

/// An array of texts of the current row, likewise.
fn texts(row: &SpiTupleTable<'_>, ordinal: usize) -> Vec<String> {
    let datum = row
        .get_datum_by_ordinal(ordinal)
        .unwrap_or_else(|e| internal(e.to_string()));
    // SAFETY: a column of type text[], in a row that is there.
    datum.map_or_else(Vec::new, |d| unsafe { rows::texts_of_array(d) })
}

/// A text as an argument, in the database's encoding; one that came from there fits.
pub fn argument<'a>(text: &str) -> DatumWithOid<'a> {
    // SAFETY: to_server() gives valid text, which is copied; text has the form of bytea.
    unsafe { DatumWithOid::new(&*encoding::to_server(text), pg_sys::TEXTOID) }
}

/// Several texts as one argument, an array; as [`argument`].
pub fn arguments<'a>(texts: &[&str]) -> DatumWithOid<'a> {
    array_of(texts.iter().map(|text| encoding::to_server(text)))
}

fn array_of<'a, 'b>(texts: impl Iterator<Item = Cow<'b, [u8]>>) -> DatumWithOid<'a> {
    let mut datums: Vec<_> = texts.map(|text| text_datum(&text)).collect();
    // SAFETY: an array of texts of the current memory context, which lives as long as the transaction.
    unsafe {
        let array = pg_sys::construct_array(
            datums.as_mut_ptr(),
            datums.len() as i32,
            pg_sys::TEXTOID,
            -1,
            false,
            pg_sys::TYPALIGN_INT as _,
        );
        DatumWithOid::new(pg_sys::Datum::from(array), pg_sys::TEXTARRAYOID)
    }
}

/// As [`argument`], for words of Redis or of the system: what the database's encoding may not have is left out.
pub fn words<'a>(text: &str) -> DatumWithOid<'a> {
    // SAFETY: valid text, which is copied; text has the form of bytea.
    unsafe { DatumWithOid::new(&*encoding::words_to_server(text), pg_sys::TEXTOID) }
}

/// Several of them as one argument, an array.
pub fn all_words<'a>(texts: &[&str]) -> DatumWithOid<'a> {
    array_of(texts.iter().map(|text| encoding::words_to_server(text)))
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

/// Whether there are restores that a snapshot does not see.
pub fn has_later_restores(seen: &Snapshot) -> bool {
    query(
        "select exists (select from outbox.restores r where not pg_visible_in_snapshot(r.xid, $1::pg_snapshot))",
        &[seen.to_string().into()],
        |row| value(row, 1),
    )
    .pop()
    .flatten()
    .unwrap_or(false)
}

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
pub fn backends(seen: &Snapshot) -> Vec<BackendRow> {
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
            argument(&ownership::here()),
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

/// Slots of which a backend has lanes.
pub fn lanes(number: i32) -> Vec<u16> {
    query(
        "select slot from outbox.cursors where backend_number = $1 and slot >= 0 order by slot",
        &[number.into()],
        |row| value::<i32>(row, 1).unwrap_or_default() as u16,
    )
}

/// The saved position and standing of a backend, or of one lane of it.
pub fn cursor(number: i32, lane: Option<u16>) -> Option<(Cursor, Standing)> {
    query(
        "select from_snapshot::text, from_next_xid::text, from_low_seq, from_high_seq,
            to_snapshot::text, to_next_xid::text, to_low_seq, to_high_seq, last_seq,
            state, published_total, failed_total,
            (extract(epoch from last_published_at) * 1000000)::bigint, last_error,
            (extract(epoch from last_error_at) * 1000000)::bigint, batch_number, healings, epoch, address
        from outbox.cursors where backend_number = $1 and slot = $2",
        &[number.into(), lane_number(lane).into()],
        |row| {
            let from = tick_at(row, 1).unwrap_or_else(|| internal("a cursor of outbox.cursors is not readable"));
            let under_way = tick_at(row, 5).map(|to| UnderWay {
                to,
                last_seq: value(row, 9).unwrap_or_default(),
            });
            let standing = Standing {
                state: value(row, 10).unwrap_or_default(),
                published_total: value(row, 11).unwrap_or_default(),
                failed_total: value(row, 12).unwrap_or_default(),
                last_published_at: value(row, 13),
                last_error: text(row, 14),
                last_error_at: value(row, 15),
                healings: value(row, 17).unwrap_or_default(),
                epoch: value(row, 18).unwrap_or_default(),
                address: text(row, 19),
                ..Standing::default()
            };
            let cursor = Cursor {
                position: Position { from, under_way },
                number: value::<i64>(row, 16).unwrap_or_default() as u64,
            };
            (cursor, standing)
        },
    )
    .pop()
}

/// A tick in four columns: snapshot and next_xid as text, low_seq, high_seq.
fn tick_at(row: &SpiTupleTable<'_>, first: usize) -> Option<Arc<Tick>> {
    let snapshot: Snapshot = value::<String>(row, first)?.parse().ok()?;
    Some(Arc::new(Tick {
        snapshot,
        next_xid: value::<String>(row, first + 1)?.parse().ok()?,
        low_seq: value(row, first + 2)?,
        high_seq: value(row, first + 3)?,
    }))
}

/// Saves position and standing.
pub fn save_cursor(number: i32, lane: Option<u16>, position: &Position, batch_number: u64, standing: &Standing) {
    let (from, to) = (&position.from, position.under_way.as_ref());
    run(
        "insert into outbox.cursors as c (backend_number, from_snapshot, from_next_xid, from_low_seq, from_high_seq,
            to_snapshot, to_next_xid, to_low_seq, to_high_seq, last_seq, saved_at,
            state, published_total, failed_total, events_per_second, last_published_at, last_error, last_error_at, next_attempt_at,
            batch_number, healings, epoch, address, slot)
        values ($1, $2::pg_snapshot, $3::xid8, $4, $5, $6::pg_snapshot, $7::xid8, $8, $9, $10, clock_timestamp(),
            $11, $12, $13, $14, to_timestamp($15 / 1000000.0), $16, to_timestamp($17 / 1000000.0), to_timestamp($18 / 1000000.0),
            $19, $20, $21, $22, $23)
        on conflict (backend_number, slot) do update set
            from_snapshot = excluded.from_snapshot, from_next_xid = excluded.from_next_xid,
            from_low_seq = excluded.from_low_seq, from_high_seq = excluded.from_high_seq,
            to_snapshot = excluded.to_snapshot, to_next_xid = excluded.to_next_xid,
            to_low_seq = excluded.to_low_seq, to_high_seq = excluded.to_high_seq,
            last_seq = excluded.last_seq, saved_at = excluded.saved_at, state = excluded.state,
            published_total = excluded.published_total, failed_total = excluded.failed_total,
            events_per_second = excluded.events_per_second, last_published_at = excluded.last_published_at,
            last_error = excluded.last_error, last_error_at = excluded.last_error_at, next_attempt_at = excluded.next_attempt_at,
            batch_number = excluded.batch_number, healings = excluded.healings, epoch = excluded.epoch,
            address = excluded.address",
        &[
            number.into(),
            from.snapshot.to_string().into(),
            from.next_xid.to_string().into(),
            from.low_seq.into(),
            from.high_seq.into(),
            to.map(|u| u.to.snapshot.to_string()).into(),
            to.map(|u| u.to.next_xid.to_string()).into(),
            to.map(|u| u.to.low_seq).into(),
            to.map(|u| u.to.high_seq).into(),
            to.map_or(0, |u| u.last_seq).into(),
            standing.state.clone().into(),
            standing.published_total.into(),
            standing.failed_total.into(),
            standing.events_per_second.into(),
            standing.last_published_at.into(),
            standing.last_error.as_deref().map_or_else(DatumWithOid::null::<String>, words),
            standing.last_error_at.into(),
            standing.next_attempt_at.into(),
            (batch_number as i64).into(),
            standing.healings.into(),
            standing.epoch.into(),
            standing.address.as_deref().map_or_else(DatumWithOid::null::<String>, words),
            lane_number(lane).into(),
        ],
    );
}

/// A backend was taken over.
pub fn forget_take_over(number: i32) {
    run(
        "delete from outbox.take_overs where backend_number = $1",
        &[number.into()],
    );
}

/// This transaction, of the id `xid`, brings events of a dump. Within the session that restores it.
pub fn note_restore(number: i32, xid: u64) {
    rights::of_owner(|| {
        run(
            "insert into outbox.restores (backend_number, xid) values ($1, $2::text::xid8)",
            &[number.into(), xid.to_string().into()],
        )
    });
}

/// How many events these restores have brought.
pub fn count_restored(restores: &[i64]) -> i64 {
    query(
        "select count(*) from outbox.restores r join outbox.events e on e.xid = r.xid and e.backend_number = r.backend_number
        where r.number = any($1)",
        &[restores.to_vec().into()],
        |row| value(row, 1),
    )
    .pop()
    .flatten()
    .unwrap_or(0)
}

/// What these restores have brought was looked for. Of each backend the latest is remembered; returns that of theirs.
pub fn note_looked_for(restores: &[i64]) -> u64 {
    let latest = query(
        "select max(xid)::text from outbox.restores where number = any($1)",
        &[restores.to_vec().into()],
        |row| text(row, 1).and_then(|xid| xid.parse().ok()),
    );
    run(
        "update outbox.restores set is_looked_for = true where number = any($1)",
        &[restores.to_vec().into()],
    );
    run(
        "delete from outbox.restores r where r.is_looked_for and exists (select from outbox.restores l
            where l.backend_number = r.backend_number and l.is_looked_for and (l.xid, l.number) > (r.xid, r.number))",
        &[],
    );
    latest.into_iter().flatten().next().unwrap_or_default()
}

/// Up to where a backend's events have been purged.
pub fn oldest_tick(number: i32) -> Option<Arc<Tick>> {
    query(
        "select snapshot::text, next_xid::text, low_seq, high_seq from outbox.ticks
        where backend_number = $1 order by reached_at limit 1",
        &[number.into()],
        |row| tick_at(row, 1),
    )
    .pop()
    .flatten()
}

fn uuids<'a>(ids: &[[u8; 16]]) -> DatumWithOid<'a> {
    let ids: Vec<pgrx::Uuid> = ids.iter().map(|id| pgrx::Uuid::from_bytes(*id)).collect();
    ids.into()
}

/// Scheduled events that are due at the time $1, at most $2, but for those that are held ($3). The time is a value, so that the index is
/// read up to there; a clock would be asked again at each row of it.
const DUE: &str = "select d.event_id from outbox.scheduled_events d
    where d.scheduled_at <= $1 and d.event_id <> all($3) order by d.scheduled_at, d.seq limit $2";
/// The same but for those whose rows somebody has locked.
const DUE_AND_FREE: &str = "select d.event_id from outbox.scheduled_events d
    where d.scheduled_at <= $1 and d.event_id <> all($3) order by d.scheduled_at, d.seq limit $2 for update skip locked";

/// Scheduled events that are due at `now_us` (microseconds since 2000), but for those that are `held`: at most `count`.
pub fn due(now_us: i64, count: i64, held: &[[u8; 16]]) -> Vec<[u8; 16]> {
    query(DUE, &[timestamp(now_us), count.into(), uuids(held)], |row| {
        value::<pgrx::Uuid>(row, 1).map(|id| *id.as_bytes())
    })
    .into_iter()
    .flatten()
    .collect()
}

/// Those of these scheduled events whose rows nobody has locked, with those that are there no more. They are locked until the end of the
/// transaction.
pub fn lockable(ids: &[[u8; 16]]) -> Vec<[u8; 16]> {
    let mut free = Vec::new();
    rights::statement(|| {
        Spi::connect_mut(|client| {
            let args = [uuids(ids)];
            let sql = "with free as materialized (
                    select s.event_id from outbox.scheduled_events s where s.event_id = any($1) for update skip locked)
                select event_id from free
                union all
                select g.id from unnest($1) g(id)
                where not exists (select from outbox.scheduled_events s where s.event_id = g.id)";
            let statement = client.prepare_mut(sql, &types_of(&args));
            let statement = statement.unwrap_or_else(|e| internal(e.to_string()));
            let table = rights::execution(|| client.update(&statement, None, &args));
            let table = table.unwrap_or_else(|e| internal(e.to_string()));
            let found = read_all(table, |row| value::<pgrx::Uuid>(row, 1).map(|id| *id.as_bytes()));
            free.extend(found.into_iter().flatten());
        });
    });
    free
}

/// Moves scheduled events that are due at `now_us` into `outbox.events`, at most `count`, but for those that are `held` and those whose
/// rows somebody has locked; returns how many there were. With all that the trigger fills in: it may be off.
pub fn move_due(now_us: i64, count: i64, held: &[[u8; 16]]) -> u64 {
    move_scheduled(DUE_AND_FREE, &[timestamp(now_us), count.into(), uuids(held)])
}

/// The same one by one: what cannot be moved fails alone.
pub fn move_due_one_by_one(now_us: i64, count: i64, held: &[[u8; 16]]) -> u64 {
    let due = due(now_us, count, held);
    for id in &due {
        let id = pgrx::Uuid::from_bytes(*id);
        if let Err(error) = care::tried_new(|| move_scheduled("select $1", &[id.into()])) {
            care::as_much_as_can_be_read(|kept| fail_scheduled(id, &error, kept));
        }
    }
    due.len() as u64
}

/// A scheduled event that cannot be moved.
fn fail_scheduled(id: pgrx::Uuid, error: &str, kept: Kept) -> u64 {
    run(
        "with gone as (delete from outbox.scheduled_events s where s.event_id = $1 returning s.*)
        insert into outbox.failed_events (seq, xid, created_at, event_id, backend_number, event_type, source, backend,
            data, subject, stream, data_schema, publisher_config, max_retries, attempts, last_error)
        select g.seq, g.xid, g.created_at, g.event_id, g.backend_number,
            case when $3 then g.event_type else '(not readable)' end, case when $3 then g.source else '(not readable)' end,
            case when $3 then g.backend else '(not readable)' end, case when $4 then g.data end, case when $3 then g.subject end,
            case when $3 then g.stream end, case when $3 then g.data_schema end, case when $4 then g.publisher_config end,
            g.max_retries, 0, $2
        from gone g
        on conflict (event_id, seq) do nothing",
        &[id.into(), words(error), kept.texts.into(), kept.payload.into()],
    )
}

/// Moves the scheduled events whose ids a query selects.
fn move_scheduled(selected: &str, arguments: &[DatumWithOid<'_>]) -> u64 {
    if catalog::expect_relations().events_id_key == pg_sys::InvalidOid {
        Index::EventId.refuse();
    }
    trigger::moving(|| {
        run(
            &format!(
                "with due as (
                delete from outbox.scheduled_events s
                where s.event_id in ({selected})
                returning s.*
            ), moved as (
                insert into outbox.events (xid, seq, created_at, event_id, backend_number, event_type, source, backend, data,
                    subject, stream, data_schema, publisher_config, max_retries)
                select pg_current_xact_id(), outbox.draw_seq(), d.created_at, d.event_id, d.backend_number, d.event_type,
                    d.source, d.backend, d.data, d.subject, d.stream, d.data_schema, d.publisher_config, d.max_retries
                from (select * from due order by scheduled_at, seq) d
                on conflict (event_id) do nothing
                returning event_id
            ), restored as (
                insert into outbox.restores (backend_number, xid)
                select distinct d.backend_number, pg_current_xact_id() from due d where d.xid = '0'
            ), repeated as (
                insert into outbox.failed_events (seq, xid, created_at, event_id, backend_number, event_type, source, backend,
                    data, subject, stream, data_schema, publisher_config, max_retries, attempts, last_error)
                select d.seq, d.xid, d.created_at, d.event_id, d.backend_number, d.event_type, d.source, d.backend,
                    d.data, d.subject, d.stream, d.data_schema, d.publisher_config, d.max_retries, 0,
                    case when exists (select from outbox.events e where e.event_id = d.event_id)
                        then 'an event with this event_id was already published'
                        else 'a trigger of outbox.events has left it out' end
                from due d where not exists (select from moved m where m.event_id = d.event_id)
                on conflict (event_id, seq) do nothing
            )
            select from due"
            ),
            arguments,
        )
    })
}

/// When the next scheduled event is due that is not `held` (`None`: none is scheduled), and what time it is, in microseconds since 2000.
pub fn next_due(held: &[[u8; 16]]) -> (Option<i64>, i64) {
    let due = query(
        "select s.scheduled_at from outbox.scheduled_events s where s.event_id <> all($1)
        order by s.scheduled_at, s.seq limit 1",
        &[uuids(held)],
        |row| {
            let datum = row.get_datum_by_ordinal(1).unwrap_or_else(|e| internal(e.to_string()));
            datum.map(|d| d.value() as i64)
        },
    );
    // SAFETY: reads the clock.
    (due.into_iter().flatten().next(), unsafe {
        pg_sys::GetCurrentTimestamp()
    })
}

fn timestamp<'a>(us: i64) -> DatumWithOid<'a> {
    // SAFETY: a timestamptz is passed by value, as microseconds since 2000.
    unsafe { DatumWithOid::new(pg_sys::Datum::from(us), pg_sys::TIMESTAMPTZOID) }
}

/// Records that a backend has delivered what a tick sees. The first of a backend is the beginning of time.
pub fn record_tick(number: i32, tick: &Tick) {
    run(
        "insert into outbox.ticks (backend_number, reached_at, snapshot, next_xid, low_seq, high_seq)
        select $1, '-infinity', '3:3:', '3', 0, 0
        where not exists (select from outbox.ticks t where t.backend_number = $1)",
        &[number.into()],
    );
    run(
        "insert into outbox.ticks (backend_number, reached_at, snapshot, next_xid, low_seq, high_seq)
        values ($1, clock_timestamp(), $2::pg_snapshot, $3::xid8, $4, $5) on conflict do nothing",
        &[
            number.into(),
            tick.snapshot.to_string().into(),
            tick.next_xid.to_string().into(),
            tick.low_seq.into(),
            tick.high_seq.into(),
        ],
    );
}

/// What may be purged of a backend: from the tick up to which it has been, to the newest that is old enough.
pub fn purgeable(number: i32, retention_us: i64) -> Option<(Arc<Tick>, Arc<Tick>)> {
    let ticks = query(
        "(select snapshot::text, next_xid::text, low_seq, high_seq from outbox.ticks
            where backend_number = $1 order by reached_at limit 1)
        union all
        (select snapshot::text, next_xid::text, low_seq, high_seq from outbox.ticks
            where backend_number = $1 and reached_at <= clock_timestamp() - $2 * interval '1 microsecond'
                and not exists (select from outbox.refused_events r where r.backend_number = $1 and r.accepted_in is null)
            order by reached_at desc limit 1)",
        &[number.into(), retention_us.into()],
        |row| tick_at(row, 1),
    );
    match ticks.as_slice() {
        [Some(from), Some(to)] if from != to => Some((from.clone(), to.clone())),
        _ => None,
    }
}

/// All up to `tick` has been purged.
pub fn purged(number: i32, tick: &Tick) {
    run(
        "delete from outbox.ticks t where t.backend_number = $1 and t.reached_at < (
            select max(o.reached_at) from outbox.ticks o where o.backend_number = $1 and o.snapshot::text = $2)",
        &[number.into(), tick.snapshot.to_string().into()],
    );
}

/// Whether there are ticks whose events are not purged.
pub fn ticks_wait() -> bool {
    query(
        "select exists (select from outbox.ticks group by backend_number having count(*) > 1)",
        &[],
        |row| value(row, 1),
    )
    .pop()
    .flatten()
    .unwrap_or(false)
}

/// Runs `f`, which deletes events in steps, by a statement that is prepared once.
pub fn delete_events<R>(f: impl FnOnce(&mut dyn FnMut(&[i64])) -> R) -> R {
    let sql = "delete from outbox.events where seq = any($1)";
    rights::statement(|| {
        Spi::connect_mut(|client| {
            let statement = client.prepare_mut(sql, &[PgOid::from(pg_sys::INT8ARRAYOID)]);
            let statement = statement.unwrap_or_else(|e| internal(e.to_string()));
            f(&mut |seqs| {
                let args = [seqs.to_vec().into()];
                let deleted = rights::execution(|| client.update(&statement, None, &args));
                deleted.map(drop).unwrap_or_else(|e| internal(e.to_string()));
            })
        })
    })
}

/// Deletes failed events older than their retention, at most `count`.
pub fn purge_failed(retention_us: i64, count: i64) -> u64 {
    run(
        "delete from outbox.failed_events f where (f.event_id, f.seq) in (select o.event_id, o.seq from outbox.failed_events o
            where o.failed_at <= clock_timestamp() - $1 * interval '1 microsecond' order by o.failed_at limit $2
            for update skip locked)",
        &[retention_us.into(), count.into()],
    )
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
