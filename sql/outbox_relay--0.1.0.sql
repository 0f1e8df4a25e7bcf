\echo Use "create extension outbox_relay" to load this file. \quit

-- The public face of outbox_relay, in schema outbox. Written by hand; src/ holds what is LANGUAGE c.
-- Contents: backends, events and the tables beside it, publishing, looking, acting, dump, privileges.

set local search_path = pg_catalog, pg_temp;

-- Whoever owns the schema could put other functions beside ours, and whatever is there already might be meant instead
-- of ours.
do $$
declare
    n pg_catalog.pg_namespace;
begin
    select * into strict n from pg_catalog.pg_namespace s where s.nspname = 'outbox';
    if exists (select from pg_catalog.aclexplode(n.nspacl) a where a.privilege_type = 'CREATE' and a.grantee <> n.nspowner) then
        raise exception using errcode = 'object_not_in_prerequisite_state',
            message = 'schema "outbox" exists, and others than its owner may create objects in it',
            detail = 'Calls of the extension''s functions could reach functions of theirs.',
            hint = 'Drop that schema: the extension makes its own. Or revoke CREATE on it from all others.';
    end if;
    if not (select r.rolsuper from pg_catalog.pg_roles r where r.oid = n.nspowner)
        or exists (select from pg_catalog.pg_depend d
            where d.refclassid = 'pg_catalog.pg_namespace'::regclass and d.refobjid = n.oid
                and d.classid <> 'pg_catalog.pg_extension'::regclass) then
        raise exception using errcode = 'object_not_in_prerequisite_state',
            message = 'schema "outbox" exists, and is not an empty one of a superuser',
            detail = format('It belongs to "%s".', pg_get_userbyid(n.nspowner)),
            hint = 'Drop or rename that schema: the extension makes its own.';
    end if;
end
$$;

----------------------------------------------------------------------------------------------------------------------
-- Backends: named Redis destinations
----------------------------------------------------------------------------------------------------------------------

create table outbox.backends (
    name            text primary key check (length(name) between 1 and 63),
    number          integer generated always as identity unique check (number > 0),
    enabled         boolean not null default true,
    mode            text not null default 'standalone' check (mode in ('standalone', 'sentinel', 'cluster')),
    host            text check (host <> ''),
    port            integer check (port between 1 and 65535),
    db              integer check (db between 0 and 65535),
    username        text check (username <> ''),
    stream_name     text check (stream_name <> ''),
    max_len         bigint check (max_len >= 0),
    connect_timeout interval check (connect_timeout > interval '0' and connect_timeout <= interval '1 hour'),
    socket_timeout  interval check (socket_timeout > interval '0' and socket_timeout <= interval '1 hour'),
    unix_socket     text check (unix_socket like '/%'),
    nodes           text[] check (cardinality(nodes) between 1 and 32 and array_position(nodes, null) is null),
    sentinel_master text check (sentinel_master <> ''),
    password_file   text check (password_file like '/%'),
    allowed_streams text[] not null default '{*}' check (array_position(allowed_streams, null) is null),
    delivery        text not null default 'exactly_once' check (delivery in ('exactly_once', 'at_least_once')),
    on_missing_guard text not null default 'continue' check (on_missing_guard in ('continue', 'halt', 'replay')),
    wait_replicas   integer not null default 0 check (wait_replicas between 0 and 100),
    tls             boolean not null default false,
    tls_ca_file     text check (tls_ca_file like '/%'),
    tls_cert_file   text check (tls_cert_file like '/%'),
    tls_key_file    text check (tls_key_file like '/%'),
    tls_insecure    boolean not null default false,
    constraint backends_nodes_of_mode check ((mode = 'standalone') = (nodes is null)),
    constraint backends_sentinel_master_of_mode check ((mode = 'sentinel') = (sentinel_master is not null)),
    constraint backends_db_of_mode check (mode <> 'cluster' or coalesce(db, 0) = 0),
    constraint backends_stream_of_mode check (mode <> 'cluster' or stream_name is not null),
    constraint backends_address_of_mode check (mode = 'standalone' or (host is null and port is null and unix_socket is null)),
    constraint backends_tls_needs_tcp check (not tls or unix_socket is null),
    constraint backends_tls_settings_need_tls check (tls or (num_nonnulls(tls_ca_file, tls_cert_file, tls_key_file) = 0 and not tls_insecure)),
    constraint backends_tls_key_needs_cert check ((tls_cert_file is null) = (tls_key_file is null))
);

comment on table outbox.backends is 'Named Redis destinations. NULL in a column means the setting outbox_relay.redis_* of that name. A change takes effect at once.';
comment on column outbox.backends.name is 'How publishers name the backend; it may be changed.';
comment on column outbox.backends.number is 'Identifies the backend. It never changes and is never reused. Events store it, so that a renamed backend keeps its events.';
comment on column outbox.backends.enabled is 'False pauses the backend; its events wait.';
comment on column outbox.backends.mode is 'standalone: one Redis, at host and port or unix_socket. sentinel: the primary that sentinels name. cluster: streams are spread by hash slot.';
comment on column outbox.backends.host is 'Name or address of the Redis server (standalone).';
comment on column outbox.backends.port is 'Port of the Redis server (standalone), 1 to 65535.';
comment on column outbox.backends.db is 'Number of the Redis database; a cluster has database 0 alone.';
comment on column outbox.backends.username is 'Redis user (ACL).';
comment on column outbox.backends.stream_name is 'The stream of events that name no stream. In a cluster it decides their hash slot and cannot be changed.';
comment on column outbox.backends.max_len is 'Approximate length to which each stream is trimmed (MAXLEN ~); 0: unlimited.';
comment on column outbox.backends.connect_timeout is 'How long connecting and logging in may take, at most an hour.';
comment on column outbox.backends.socket_timeout is 'How long each write and each reply may take, at most an hour.';
comment on column outbox.backends.unix_socket is 'Path of a unix socket, instead of host and port.';
comment on column outbox.backends.nodes is 'The sentinels, or some nodes of the cluster, as host:port (an IPv6 address in brackets), in the order in which they are asked. NULL if mode is standalone.';
comment on column outbox.backends.sentinel_master is 'The name by which the sentinels know the primary; NULL unless mode is sentinel.';
comment on column outbox.backends.password_file is 'A file that the server reads at each connect; its first line is the password. Nobody else may read it: 0600, or 0640 if root owns it. Needs the rights of pg_read_server_files.';
comment on column outbox.backends.allowed_streams is 'Glob patterns (* and ?) one of which a publisher''s stream must match. With {*}, a publisher may append to any stream of that Redis, which is then trimmed to max_len.';
comment on column outbox.backends.delivery is 'exactly_once: each batch is one Redis transaction together with the guard, see outbox.guard_key(). at_least_once: plain commands; a crash may repeat what was sent since the cursor was last saved.';
comment on column outbox.backends.on_missing_guard is 'What to do when Redis has lost everything, including the guard. continue: send what was not sent yet. halt: wait for outbox.take_over(). replay: send all retained events again.';
comment on column outbox.backends.wait_replicas is 'Replicas of Redis that must acknowledge a batch (WAIT) before it counts as delivered, 0 to 100.';
comment on column outbox.backends.tls is 'Connects by TLS. A trusted authority must have issued the server''s certificate, and the certificate must name the host.';
comment on column outbox.backends.tls_ca_file is 'PEM file of the authorities that are trusted; NULL: those of the system. Read at each connect, like the other files; needs the rights of pg_read_server_files.';
comment on column outbox.backends.tls_cert_file is 'PEM file of the certificate (and its chain) that is shown to the server. Needs the rights of pg_read_server_files.';
comment on column outbox.backends.tls_key_file is 'PEM file of the key of tls_cert_file, not encrypted. Nobody else may read it: 0600, or 0640 if root owns it. Needs the rights of pg_read_server_files.';
comment on column outbox.backends.tls_insecure is 'Accepts any certificate. Use it for experiments only.';

create function outbox.destination(backend outbox.backends) returns jsonb
    language sql stable parallel safe set search_path = pg_catalog, pg_temp
    as $$
select jsonb_strip_nulls(jsonb_build_object('mode', backend.mode, 'host', backend.host, 'port', backend.port, 'unix_socket', backend.unix_socket,
    'nodes', backend.nodes, 'sentinel_master', backend.sentinel_master, 'username', backend.username, 'tls', backend.tls,
    'tls_insecure', backend.tls_insecure, 'tls_ca_file', backend.tls_ca_file, 'tls_cert_file', backend.tls_cert_file,
    'tls_key_file', backend.tls_key_file))
$$;
comment on function outbox.destination(outbox.backends) is 'Where and how a backend connects. A secret that was set for one destination is not sent to another.';

-- The key of passwords is an option of a user mapping: catalogs are in no dump, and are not decoded from the WAL.
create foreign data wrapper outbox_relay;
comment on foreign data wrapper outbox_relay is 'Reads no tables: the server below belongs to it.';
create server outbox_relay foreign data wrapper outbox_relay;
comment on server outbox_relay is 'Its user mapping for PUBLIC holds the key with which outbox.backend_passwords is sealed. Made when the first password is set.';

create function outbox.seal_password(backend_number integer, password text) returns bytea
    language c volatile strict
    as 'MODULE_PATHNAME', 'seal_password';
comment on function outbox.seal_password(integer, text) is 'A password as it lies in outbox.backend_passwords; makes the key if there is none. Needs the rights of the owner of server outbox_relay.';

create table outbox.backend_passwords (
    backend_number integer primary key,
    password       bytea not null,
    destination    jsonb not null
);
-- Row security without a policy: even pg_read_all_data sees no row. It does not bind the owner and other superusers.
alter table outbox.backend_passwords enable row level security;
-- ANALYZE would copy passwords into pg_statistic, which pg_read_all_data can read.
alter table outbox.backend_passwords alter column password set statistics 0;
comment on table outbox.backend_passwords is 'Passwords set by outbox.set_backend_password(); read by the worker alone, never dumped.';
comment on column outbox.backend_passwords.password is 'Sealed for this backend, with AES-256-GCM and the key of server outbox_relay.';
comment on column outbox.backend_passwords.destination is 'The destination that the password was set for, see outbox.destination(). With another destination the backend is misconfigured.';

create table outbox.moved_backends (
    backend_number integer primary key,
    destination    jsonb not null
);
alter table outbox.moved_backends enable row level security;
comment on table outbox.moved_backends is 'Backends whose destination was changed by a role that may not read the server''s files, with the destination before that. Their password files are read for that one only.';

----------------------------------------------------------------------------------------------------------------------
-- Events, and the tables of those that wait elsewhere
----------------------------------------------------------------------------------------------------------------------

-- Columns of fixed width come first, because each row is deformed once to be sent. The trigger fills in seq, xid and
-- backend_number.
create sequence outbox.events_seq_seq as bigint cache 1;
create table outbox.events (
    seq              bigint not null,
    xid              xid8 not null,
    created_at       timestamptz not null,
    event_id         uuid not null,
    backend_number   integer not null,
    event_type       text not null,
    source           text not null,
    backend          text not null,
    data             json,
    subject          text,
    stream           text,
    data_schema      text,
    publisher_config json,
    max_retries      integer
) with (
    -- Rows are inserted at one end and, much later, deleted in order at the other; never updated. Vacuum after each
    -- twentieth of the table has gone keeps its size steady; inserts need no more than freezing.
    autovacuum_vacuum_scale_factor = 0.05,
    autovacuum_vacuum_insert_scale_factor = 0.2,
    autovacuum_analyze_scale_factor = 0.2
);
alter sequence outbox.events_seq_seq owned by outbox.events.seq;
-- With the backend's number, so that other backends skip a row by a look at the index.
alter table outbox.events add primary key (seq) include (backend_number);
create unique index events_event_id_idx on outbox.events (event_id);
create index events_xid_idx on outbox.events (xid, seq);
-- For outbox.event_status: the latest events, and those of a period.
create index events_created_at_idx on outbox.events (created_at);

comment on table outbox.events is 'The outbox: one row for each event, kept until its retention ends. Rows are never updated; outbox.cursors says which were delivered.';
comment on sequence outbox.events_seq_seq is 'Draws the numbers of events, in publishing order. If somebody sets it back, numbering continues above the highest number that was drawn. With another type, INCREMENT, CACHE or CYCLE, publishing is refused.';
comment on column outbox.events.seq is 'The event''s place in publishing order. The trigger draws it, after xid.';
comment on column outbox.events.xid is 'The transaction that published the event. The trigger fills it in.';
comment on column outbox.events.backend_number is 'Number of the backend. The trigger looks it up by the backend''s name.';
comment on column outbox.events.backend is 'Name of the backend when the event was published. NULL or an empty text in an INSERT means outbox_relay.default_backend.';
comment on column outbox.events.data is 'The payload, as JSON text.';
comment on column outbox.events.stream is 'The stream of the entry. NULL means the backend''s stream_name at the time of sending.';
comment on column outbox.events.max_retries is 'Attempts in all if Redis refuses the event, at most 1000. NULL means outbox_relay.max_retries at the time of sending.';
comment on column outbox.events.publisher_config is 'Further fields of the stream entry: a flat JSON object.';

create table outbox.scheduled_events (
    like outbox.events,
    scheduled_at timestamptz not null,
    primary key (event_id)
);
create index scheduled_events_due_idx on outbox.scheduled_events (scheduled_at, seq);
comment on table outbox.scheduled_events is 'Events that are not due yet. The worker moves them to outbox.events when they are, in the order of scheduled_at and seq.';
comment on column outbox.scheduled_events.xid is 'The transaction that scheduled the event. 0 means that a dump brought it when it was overdue: it may have been sent already, so the worker looks for it first.';

create table outbox.refused_events (
    seq            bigint primary key,
    backend_number integer not null,
    attempts       integer not null,
    last_error     text not null,
    accepted_in    bigint,
    stream         text
);
-- Who asks for one stream must not be given this index, whatever the planner knows of a table that has just grown: only
-- those can use it who say that seq > 0, which it always is.
create index refused_events_backend_idx on outbox.refused_events (backend_number, seq) where accepted_in is null and seq > 0;
create index refused_events_stream_idx on outbox.refused_events (backend_number, stream, seq) where accepted_in is null;
comment on table outbox.refused_events is 'Events of outbox.events that Redis refused and that are being tried again, and those behind them in the same stream.';
comment on column outbox.refused_events.accepted_in is 'Number of the batch in which Redis accepted the event late. If Redis loses that batch, the event waits again. NULL: it waits now.';
comment on column outbox.refused_events.stream is 'The stream that the event names. NULL means its backend''s own.';

create table outbox.failed_events (
    like outbox.events,
    attempts   integer not null,
    last_error text not null,
    failed_at  timestamptz not null default clock_timestamp(),
    -- An event_id may be used again once its first event has gone from outbox.events: both are kept.
    primary key (event_id, seq)
);
create index failed_events_failed_at_idx on outbox.failed_events (failed_at);
comment on table outbox.failed_events is 'Events that Redis refused max_retries times, or whose backend was deleted; kept for outbox_relay.failed_retention. See outbox.retry_failed().';

----------------------------------------------------------------------------------------------------------------------
-- How far each backend has come
----------------------------------------------------------------------------------------------------------------------

create table outbox.cursors (
    backend_number    integer not null,
    -- In a cluster, the hash slot of a lane. -1: of the whole backend; or what its finder has read, for slots that have
    -- no lane.
    slot              integer not null default -1 check (slot between -1 and 16383),
    -- Everything that from_snapshot sees is delivered, and of what to_snapshot sees the rows up to last_seq.
    from_snapshot     pg_snapshot not null,
    from_next_xid     xid8 not null,
    from_low_seq      bigint not null,
    from_high_seq     bigint not null,
    to_snapshot       pg_snapshot,
    to_next_xid       xid8,
    to_low_seq        bigint,
    to_high_seq       bigint,
    last_seq          bigint not null default 0,
    -- The last batch that is known to be appended (exactly_once); 0: none.
    batch_number      bigint not null default 0,
    -- How often its guard was claimed: the upper part of batch numbers, so that none is ever given twice.
    epoch             bigint not null default 0,
    saved_at          timestamptz not null,
    state             text not null,
    published_total   bigint not null default 0,
    failed_total      bigint not null default 0,
    events_per_second real not null default 0,
    last_published_at timestamptz,
    last_error        text,
    last_error_at     timestamptz,
    next_attempt_at   timestamptz,
    healings          bigint not null default 0,
    address           text,
    primary key (backend_number, slot)
) with (fillfactor = 20, autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 500);
comment on table outbox.cursors is 'How far each backend has come, or in a cluster each of its lanes. Saved 250 ms after the last change, at the latest after a second. A row outlives its backend, because transactions that were open when the backend was deleted may still commit events.';

create function outbox.hash_slot(stream text) returns integer
    language c immutable strict parallel safe
    as 'MODULE_PATHNAME', 'hash_slot';
comment on function outbox.hash_slot(text) is 'Hash slot of a stream in a Redis Cluster, as CLUSTER KEYSLOT says.';

create function outbox.hash_tag(slot integer) returns text
    language c immutable strict parallel safe
    as 'MODULE_PATHNAME', 'hash_tag_wrapper';
comment on function outbox.hash_tag(integer) is 'A short tag for a hash slot: a key with this tag in braces lies in that slot. NULL if there is no such slot.';

create table outbox.ticks (
    backend_number integer not null,
    reached_at     timestamptz not null,
    snapshot       pg_snapshot not null,
    next_xid       xid8 not null,
    low_seq        bigint not null,
    high_seq       bigint not null,
    primary key (backend_number, reached_at)
);
comment on table outbox.ticks is 'The time at which each backend had delivered all that a snapshot sees. Retention is measured by it. What a backend''s oldest tick sees has been purged.';

create table outbox.installation (
    id       uuid not null default pg_catalog.gen_random_uuid(),
    database oid not null
);
insert into outbox.installation (database)
select d.oid from pg_catalog.pg_database d where d.datname = current_database();
comment on table outbox.installation is 'The id of this installation, which is part of its guards'' keys. CREATE EXTENSION makes it; dumps do not contain it.';
comment on column outbox.installation.database is 'The database that the installation belongs to. If this is another database, the current one was copied from it (CREATE DATABASE ... TEMPLATE). pg_upgrade keeps it.';

create table outbox.incarnations (
    number             integer generated always as identity primary key,
    incarnation        uuid not null unique,
    system             text not null,
    timeline           bigint not null,
    started_at         timestamptz not null default clock_timestamp(),
    previous_ended_lsn pg_lsn not null,
    first_xid          xid8 not null,
    place              text not null
);
comment on table outbox.incarnations is 'The runs of this server in which it relayed. Guards name them. Each is saved before it claims a guard, so a copy of the database knows only those from before the copy.';
comment on column outbox.incarnations.place is 'Host and data directory of the server. A run in another place belongs to a copy, unless the server was promoted there.';
comment on column outbox.incarnations.first_xid is 'The lowest transaction id of this run. If it is lower than what a guard of the previous run says, WAL was lost and ids are being used again.';
comment on column outbox.incarnations.previous_ended_lsn is 'Where the WAL of the previous run ended, as far as this server has it.';

create function outbox.here() returns text
    language c stable
    as 'MODULE_PATHNAME', 'here_wrapper';
comment on function outbox.here() is 'Timeline and data directory of this server. A take-over is valid only where it was asked for.';

create table outbox.take_overs (
    backend_number integer primary key,
    asked_at       timestamptz not null default clock_timestamp(),
    -- The present timeline and the directory: a promoted standby, or a copy, has not been asked.
    asked_of       text not null default outbox.here()
);
comment on table outbox.take_overs is 'Requests to take over a backend, see outbox.take_over().';

create table outbox.copied_backends (
    backend_number integer primary key,
    original       text not null,
    is_database    boolean not null,
    copied_at      timestamptz not null default clock_timestamp()
);
comment on table outbox.copied_backends is 'Backends of the installation that this database was copied from. Nothing is sent for them here before outbox.take_over().';
comment on column outbox.copied_backends.is_database is 'The original is a database of the same server (CREATE DATABASE ... TEMPLATE); otherwise this whole server is a copy.';

create table outbox.restores (
    number         bigint generated always as identity primary key,
    backend_number integer not null,
    xid            xid8 not null,
    restored_at    timestamptz not null default clock_timestamp(),
    is_looked_for  boolean not null default false
);
comment on table outbox.restores is 'Transactions that restored events from a dump. Some may have been sent since the dump was taken, so the worker looks for them in the streams first.';
comment on column outbox.restores.is_looked_for is 'The worker has looked for these events. The latest row of each backend is kept: if Redis loses what it had, the worker looks again.';

-- Without a search_path of its own, so that it can be inlined.
create function outbox.is_delivered(c outbox.cursors, xid xid8, seq bigint) returns boolean
    language sql immutable parallel safe
    as $$
select coalesce(pg_catalog.pg_visible_in_snapshot(xid, c.from_snapshot)
    or (pg_catalog.pg_visible_in_snapshot(xid, c.to_snapshot) and seq operator(pg_catalog.<=) c.last_seq), false)
$$;
comment on function outbox.is_delivered(outbox.cursors, xid8, bigint) is 'Whether an event with this xid and seq lies behind a cursor.';

----------------------------------------------------------------------------------------------------------------------
-- Publishing
----------------------------------------------------------------------------------------------------------------------

create function outbox.publish_event(
    event_type       text,
    source           text,
    data             jsonb default null,
    subject          text default null,
    backend          text default null,
    scheduled_at     timestamptz default null,
    max_retries      integer default null,
    publisher_config jsonb default null,
    stream           text default null,
    data_schema      text default null,
    event_id         uuid default null
) returns uuid
    language c volatile parallel unsafe
    as 'MODULE_PATHNAME', 'publish_event';
comment on function outbox.publish_event(text, text, jsonb, text, text, timestamptz, integer, jsonb, text, text, uuid) is
    'Publishes an event within the caller''s transaction, and returns its id, or NULL if somebody''s trigger on the table left the row out. The event is sent after the commit. backend, subject, stream and data_schema: an empty text counts as NULL. scheduled_at: a time without a zone, as drivers send for a naive one, is taken in the session''s TimeZone; send one with a zone.';

-- Drivers type what they send: json, text or varchar for JSON, bigint or double precision for a number. The same
-- function for them. It never competes with the one above. Its first argument is a domain, which loses to text for a
-- literal, for a parameter without a type and for all types of text. Its other types are of the categories of those
-- above (U and N), where none is preferred.
create domain outbox.any_text as text;
comment on domain outbox.any_text is 'A text as an argument of outbox.publish_event, where other arguments have types of their own.';
create type outbox.any_value;
create function outbox.any_value_in(cstring) returns outbox.any_value language internal immutable strict parallel safe as 'textin';
create function outbox.any_value_out(outbox.any_value) returns cstring language internal immutable strict parallel safe as 'textout';
create function outbox.any_value_recv(internal) returns outbox.any_value language internal stable strict parallel safe as 'textrecv';
create function outbox.any_value_send(outbox.any_value) returns bytea language internal stable strict parallel safe as 'textsend';
create type outbox.any_value (input = outbox.any_value_in, output = outbox.any_value_out, receive = outbox.any_value_recv,
    send = outbox.any_value_send, like = text, category = 'U');
comment on type outbox.any_value is 'An argument of outbox.publish_event in whatever type a driver sends it; read by what is written. Nothing else takes it.';
comment on function outbox.any_value_in(cstring) is 'Input of type outbox.any_value, which is that of text.';
comment on function outbox.any_value_out(outbox.any_value) is 'Output of type outbox.any_value, which is that of text.';
comment on function outbox.any_value_recv(internal) is 'Binary input of type outbox.any_value, which is that of text.';
comment on function outbox.any_value_send(outbox.any_value) is 'Binary output of type outbox.any_value, which is that of text.';
create cast (text as outbox.any_value) without function as implicit;
create cast (varchar as outbox.any_value) without function as implicit;
create cast (bpchar as outbox.any_value) without function as implicit;
create cast (json as outbox.any_value) without function as implicit;
create cast (bytea as outbox.any_value) without function as implicit;
create cast (jsonb as outbox.any_value) with inout as implicit;
create cast (uuid as outbox.any_value) with inout as implicit;
-- All types of numbers become this one by themselves.
create domain outbox.any_number as double precision;
comment on domain outbox.any_number is 'A number as an argument of outbox.publish_event, in whatever type a driver sends it.';

create function outbox.publish_event(
    event_type       outbox.any_text,
    source           text,
    data             outbox.any_value default null,
    subject          text default null,
    backend          text default null,
    scheduled_at     timestamptz default null,
    max_retries      outbox.any_number default null,
    publisher_config outbox.any_value default null,
    stream           text default null,
    data_schema      text default null,
    event_id         outbox.any_value default null
) returns uuid
    language c volatile parallel unsafe
    as 'MODULE_PATHNAME', 'publish_event_of_any_types';
comment on function outbox.publish_event(outbox.any_text, text, outbox.any_value, text, text, timestamptz, outbox.any_number, outbox.any_value, text, text, outbox.any_value) is
    'The same for arguments that a driver types otherwise: json, text or bytea for JSON, any number for max_retries, text for event_id.';

create function outbox.publish_events(events jsonb) returns setof uuid
    language c volatile strict parallel unsafe
    as 'MODULE_PATHNAME', 'publish_events';
comment on function outbox.publish_events(jsonb) is
    'Publishes an array of objects with the keys of outbox.publish_event, in order; returns their ids. The CONTEXT of an error says which element it is about.';

create function outbox.published_here(out event_id uuid, out event_type text, out source text, out subject text, out backend text, out stream text,
        out data jsonb) returns setof record
    language sql volatile security definer set search_path = pg_catalog, pg_temp
    as $$
select p.event_id, p.event_type, p.source, p.subject, coalesce(b.name, p.backend),
    coalesce(p.stream, b.stream_name, current_setting('outbox_relay.redis_stream_name', true)), p.data::jsonb
from (
        select e.seq, e.event_id, e.event_type, e.source, e.subject, e.backend_number, e.backend, e.stream, e.data
        from outbox.events e where e.xid = pg_current_xact_id_if_assigned()
        union all
        select s.seq, s.event_id, s.event_type, s.source, s.subject, s.backend_number, s.backend, s.stream, s.data
        from outbox.scheduled_events s where s.xid = pg_current_xact_id_if_assigned()
    ) p
    left join outbox.backends b on b.number = p.backend_number
order by p.seq
$$;
comment on function outbox.published_here() is
    'What the calling transaction has published so far, scheduled events too, in order: for tests that roll back. Nothing of others.';

create function outbox.complete_event() returns trigger
    language c
    as 'MODULE_PATHNAME', 'complete_event';
comment on function outbox.complete_event() is 'Trigger of outbox.events and outbox.scheduled_events: checks a row as publish_event does, and fills in xid, seq and backend_number.';

create function outbox.draw_seq() returns bigint
    language c volatile
    as 'MODULE_PATHNAME', 'draw_seq_wrapper';
comment on function outbox.draw_seq() is 'Draws the next number, after the transaction has its id. For rows that this transaction inserts with both.';

create function outbox.confirm_event() returns trigger
    language c
    as 'MODULE_PATHNAME', 'confirm_event';
comment on function outbox.confirm_event() is 'Trigger of outbox.events: refuses a row in which another trigger has changed seq, xid, backend_number or event_id, or which another trigger has made invalid.';

create function outbox.refuse_update() returns trigger
    language plpgsql set search_path = pg_catalog, pg_temp
    as $$
begin
    raise exception using errcode = 'object_not_in_prerequisite_state',
        message = 'rows of outbox.events are never updated',
        hint = 'Publish another event.';
end
$$;
comment on function outbox.refuse_update() is 'Trigger of outbox.events: an event that may have been sent cannot be changed.';

----------------------------------------------------------------------------------------------------------------------
-- The backends' triggers
----------------------------------------------------------------------------------------------------------------------

create function outbox.silence_triggers() returns void
    language c
    as 'MODULE_PATHNAME', 'silence_triggers_wrapper';
comment on function outbox.silence_triggers() is 'Keeps triggers of others from firing until the function that calls it ends. For functions that write with the owner''s rights. The owner must be a superuser.';

create function outbox.has_waiting_events(backend_number integer) returns boolean
    language c strict
    as 'MODULE_PATHNAME', 'has_waiting_events_wrapper';
comment on function outbox.has_waiting_events(integer) is 'Whether events of a backend wait to be delivered, are scheduled, or are being tried again.';

create function outbox.check_backend() returns trigger
    language plpgsql set search_path = pg_catalog, pg_temp
    as $$
declare
    present outbox.backends;
    defaults jsonb;
    node text;
    file_column text;
begin
    if new.mode = 'cluster' and new.stream_name is null then
        -- The hash slot of its events must not change with a setting.
        new.stream_name := coalesce(nullif(pg_catalog.current_setting('outbox_relay.redis_stream_name', true), ''), 'events');
    end if;
    if tg_op = 'UPDATE' and old.mode = 'cluster' and (new.mode <> 'cluster' or new.stream_name <> old.stream_name) then
        -- Asked only here, so that other changes do not wait for a lock on that table.
        if exists (select from outbox.cursors c where c.backend_number = old.number) then
            raise exception using errcode = 'object_not_in_prerequisite_state',
                message = format('mode and stream_name of backend "%s" cannot be changed', old.name),
                detail = 'What is delivered is known for each hash slot of its cluster, and its events were placed by its stream_name.',
                hint = 'Rename it, and insert another backend under its name.';
        end if;
    end if;
    if tg_op = 'UPDATE' and new.number <> old.number then
        raise exception using errcode = 'feature_not_supported',
            message = format('number of backend "%s" cannot be changed', old.name),
            detail = 'Events refer to it.';
    end if;
    foreach file_column in array array['password_file', 'tls_ca_file', 'tls_cert_file', 'tls_key_file'] loop
        if to_jsonb(new) ->> file_column is not null
            and (tg_op = 'INSERT' or to_jsonb(new) ->> file_column is distinct from to_jsonb(old) ->> file_column)
            and not pg_has_role('pg_read_server_files', 'usage') then
            raise exception using errcode = 'insufficient_privilege',
                message = format('permission denied to set %s', file_column),
                detail = 'The server reads that file.',
                hint = 'Only roles with the privileges of pg_read_server_files may set it.';
        end if;
    end loop;
    foreach node in array coalesce(new.nodes, '{}') loop
        if node !~ '^([^][[:space:]:]+|\[[0-9a-fA-F:.]+(%[^][[:space:]:]+)?\]):[0-9]{1,5}$'
            or pg_catalog.substring(node, '[0-9]+$')::integer not between 1 and 65535 then
            raise exception using errcode = 'invalid_parameter_value',
                message = format('"%s" is no node of backend "%s"', node, new.name),
                detail = 'A node is a host and a port, such as 10.0.0.1:26379.',
                hint = 'Write an IPv6 address in brackets: [::1]:26379.';
        end if;
    end loop;
    if tg_op = 'INSERT' then
        -- A dump brings a "default" of its own, which takes the place of the one that CREATE EXTENSION made.
        select b.* into present from outbox.backends b where b.name = new.name;
        if found and present.number = new.number then
            -- All but name and number: an option that is added needs no change here.
            execute (
                select format('update outbox.backends b set (%s) = row(%s) where b.name = ($1).name',
                    string_agg(quote_ident(a.attname), ', '), string_agg('($1).' || quote_ident(a.attname), ', '))
                from pg_attribute a
                where a.attrelid = 'outbox.backends'::regclass and a.attnum > 0 and not a.attisdropped and a.attgenerated = ''
                    and a.attname not in ('name', 'number')
            ) using new;
            return null;
        elsif found then
            -- What a row has of which nothing was said; of columns that are added, too.
            execute (
                select format('select jsonb_strip_nulls(jsonb_build_object(%s))',
                    string_agg(format('%L, %s', a.attname, pg_get_expr(d.adbin, d.adrelid)), ', '))
                from pg_attribute a join pg_attrdef d on d.adrelid = a.attrelid and d.adnum = a.attnum
                where a.attrelid = 'outbox.backends'::regclass and a.attgenerated = ''
            ) into defaults;
            if jsonb_strip_nulls(to_jsonb(present)) - '{name,number}'::text[] = defaults then
                -- In a statement of its own: it needs rights that only those have who restore a dump.
                if not exists (select from outbox.events e where e.backend_number = present.number)
                    and not exists (select from outbox.backend_passwords p where p.backend_number = present.number)
                    and not outbox.has_waiting_events(present.number) then
                    delete from outbox.backends b where b.name = new.name;
                end if;
            end if;
        end if;
    end if;
    return new;
end
$$;
comment on function outbox.check_backend() is 'Trigger of outbox.backends: numbers never change, a cluster''s backend keeps its stream_name, nodes are host:port, file columns need pg_read_server_files, and a restored "default" replaces the untouched one.';

create function outbox.check_number() returns trigger
    language plpgsql security definer set search_path = pg_catalog, pg_temp
    as $$
declare
    drawn integer;
begin
    begin
        drawn := currval('outbox.backends_number_seq');
    exception when object_not_in_prerequisite_state then
        null;
    end;
    if new.number is distinct from drawn then
        raise exception using errcode = 'insufficient_privilege',
            message = format('permission denied to choose the number of backend "%s"', new.name),
            detail = 'Events refer to backends by their numbers, also to those that were deleted.',
            hint = 'Leave number out: it is drawn from a sequence.';
    end if;
    -- The sequence may have been set back.
    while exists (select from outbox.backends b where b.number = new.number)
        or exists (select from outbox.cursors c where c.backend_number = new.number) loop
        new.number := nextval('outbox.backends_number_seq');
    end loop;
    return new;
end
$$;
comment on function outbox.check_number() is 'Trigger of outbox.backends: only a superuser, or a role that may execute this function, may choose a backend''s number, as a restore does. All others get the next number that was never used.';

-- With the owner's rights: who may delete backends need not be one who may read all the rest.
create function outbox.check_backend_deletion() returns trigger
    language plpgsql security definer set search_path = pg_catalog, pg_temp
    as $$
begin
    perform outbox.silence_triggers();
    -- The saved cursor may lag behind what was delivered a moment ago: let the worker save it.
    for i in 1..20 loop
        if not outbox.has_waiting_events(old.number) then
            delete from outbox.backend_passwords p where p.backend_number = old.number;
            delete from outbox.moved_backends m where m.backend_number = old.number;
            delete from outbox.copied_backends c where c.backend_number = old.number;
            return old;
        end if;
        exit when i = 20 or pg_catalog.current_setting('transaction_isolation') not in ('read committed', 'read uncommitted');
        perform outbox.wake();
        perform pg_catalog.pg_sleep(0.05);
    end loop;
    raise exception using errcode = 'object_in_use',
        message = format('backend "%s" has waiting events', old.name),
        detail = 'Events are pending, scheduled or being tried again.',
        hint = 'Wait until outbox.backend_status shows none pending, or delete its rows from outbox.events, outbox.scheduled_events and outbox.refused_events.';
end
$$;
comment on function outbox.check_backend_deletion() is 'Trigger of outbox.backends: a backend with waiting events is not deleted.';

-- Who may do that is asked by the triggers' conditions, which are evaluated for whoever changes the backend; the
-- functions have the owner's rights.
create function outbox.keep_password() returns trigger
    language plpgsql security definer set search_path = pg_catalog, pg_temp
    as $$
begin
    if outbox.destination(old) <> outbox.destination(new)
        and exists (select from outbox.backend_passwords p where p.backend_number = old.number and p.destination = outbox.destination(old)) then
        perform outbox.silence_triggers();
        update outbox.backend_passwords p set destination = outbox.destination(new) where p.backend_number = old.number;
    end if;
    return null;
end
$$;
comment on function outbox.keep_password() is 'Trigger of outbox.backends: when a role that may set passwords changes a backend''s destination, the stored password is valid for the new one.';

create function outbox.note_move() returns trigger
    language plpgsql security definer set search_path = pg_catalog, pg_temp
    as $$
begin
    if outbox.destination(old) <> outbox.destination(new)
        and not exists (select from outbox.moved_backends m where m.backend_number = old.number) then
        perform outbox.silence_triggers();
        insert into outbox.moved_backends (backend_number, destination) values (old.number, outbox.destination(old));
    end if;
    return null;
end
$$;
comment on function outbox.note_move() is 'Trigger of outbox.backends: notes a change of destination by a role that may not read the server''s files.';

create function outbox.forget_move() returns trigger
    language plpgsql security definer set search_path = pg_catalog, pg_temp
    as $$
begin
    -- A role that changes another column of a moved backend has not confirmed its destination by that.
    if exists (select from outbox.moved_backends m where m.backend_number = old.number
        and (new.password_file <> coalesce(old.password_file, '')
            or (m.destination = outbox.destination(old) and m.destination <> outbox.destination(new)))) then
        perform outbox.silence_triggers();
        delete from outbox.moved_backends m where m.backend_number = old.number;
    end if;
    return null;
end
$$;
comment on function outbox.forget_move() is 'Trigger of outbox.backends: removes the note of outbox.note_move() when a role that may read the server''s files names a file or a destination.';

create function outbox.backends_changed() returns trigger
    language c
    as 'MODULE_PATHNAME', 'backends_changed';
comment on function outbox.backends_changed() is 'Trigger of outbox.backends and outbox.backend_passwords: tells sessions and the worker.';
----------------------------------------------------------------------------------------------------------------------
-- Logical replication: what another server's tables bring is kept aside until outbox.take_over()
----------------------------------------------------------------------------------------------------------------------

-- UPDATE and DELETE of a published table need a key.
alter table outbox.installation add primary key (id);

create function outbox.is_applied() returns boolean
    language c volatile
    as 'MODULE_PATHNAME', 'is_applied_wrapper';
comment on function outbox.is_applied() is 'Whether this process is a worker of a subscription, which applies rows of another server.';

create table outbox.held_events (
    like outbox.events,
    number  bigint generated always as identity primary key,
    held_at timestamptz not null default clock_timestamp()
);
create index held_events_backend_idx on outbox.held_events (backend, seq);
create index held_events_number_idx on outbox.held_events (backend_number, seq);
create index held_events_event_id_idx on outbox.held_events (event_id);
comment on table outbox.held_events is 'Events of another server, brought by a subscription, with the numbers of that server. That server sends them. outbox.take_over() here publishes those that it has not sent.';

create table outbox.held_scheduled (
    event_id     uuid primary key,
    scheduled_at timestamptz not null
);
comment on table outbox.held_scheduled is 'The real times of scheduled events that a subscription has brought. In outbox.scheduled_events they are due in 9999, until outbox.take_over().';

create table outbox.held_cursors (
    like outbox.cursors,
    primary key (backend_number, slot)
);
comment on table outbox.held_cursors is 'How far another server has come, as a subscription reports it, with that server''s numbers of backends. It may lag behind that server and is never ahead.';

create table outbox.held_refused (
    seq bigint primary key
);
comment on table outbox.held_refused is 'Held events that Redis refused on the other server. outbox.take_over() has them looked for in the streams.';

create function outbox.hold_event() returns trigger
    language plpgsql security definer set search_path = pg_catalog, pg_temp
    as $$
begin
    if not outbox.is_applied() then
        return new;
    end if;
    -- It has fallen due there, or was retried.
    delete from outbox.held_scheduled h where h.event_id = new.event_id;
    delete from outbox.held_events h where h.event_id = new.event_id;
    insert into outbox.held_events (seq, xid, created_at, event_id, backend_number, event_type, source, backend, data, subject, stream,
            data_schema, publisher_config, max_retries)
        values (new.seq, new.xid, new.created_at, new.event_id, new.backend_number, new.event_type, new.source, new.backend, new.data,
            new.subject, new.stream, new.data_schema, new.publisher_config, new.max_retries);
    return null;
end
$$;
comment on function outbox.hold_event() is 'Trigger of outbox.events: holds an event that a subscription brings.';

create function outbox.hold_scheduled() returns trigger
    language plpgsql security definer set search_path = pg_catalog, pg_temp
    as $$
begin
    if not outbox.is_applied() then
        if tg_op = 'DELETE' then
            return old;
        end if;
        return new;
    end if;
    if tg_op <> 'INSERT' and not exists (select from outbox.held_scheduled h where h.event_id = old.event_id) then
        return null;
    end if;
    if tg_op = 'DELETE' then
        delete from outbox.held_scheduled h where h.event_id = old.event_id;
        return old;
    end if;
    insert into outbox.held_scheduled as h (event_id, scheduled_at) values (new.event_id, new.scheduled_at)
        on conflict (event_id) do update set scheduled_at = excluded.scheduled_at;
    new.scheduled_at := '9999-12-31';
    return new;
end
$$;
comment on function outbox.hold_scheduled() is 'Trigger of outbox.scheduled_events: keeps an event that a subscription brings from falling due, and the other server''s changes from touching events of this one.';

create function outbox.hold_cursor() returns trigger
    language plpgsql security definer set search_path = pg_catalog, pg_temp
    as $$
begin
    if not outbox.is_applied() then
        if tg_op = 'DELETE' then
            return old;
        end if;
        return new;
    end if;
    if tg_op = 'DELETE' then
        delete from outbox.held_cursors h where h.backend_number = old.backend_number and h.slot = old.slot;
        return null;
    end if;
    delete from outbox.held_cursors h where h.backend_number = new.backend_number and h.slot = new.slot;
    insert into outbox.held_cursors select new.*;
    if new.slot = -1 and not exists (select from outbox.held_cursors h where h.backend_number = new.backend_number and h.slot >= 0) then
        delete from outbox.held_events h where h.number = any (array(
            select o.number from outbox.held_events o
            where o.backend_number = new.backend_number
                and not exists (select from outbox.held_refused r where r.seq = o.seq)
            order by o.seq limit 5000)) and pg_visible_in_snapshot(h.xid, new.from_snapshot);
    end if;
    if tg_op = 'INSERT' and new.slot = -1 then
        -- Changes of a row are told only to who has one of its key: this is as that of a backend which has sent
        -- nothing. This server's own worker may be inserting that row just now.
        perform outbox.put_back(format('insert into outbox.cursors (backend_number, slot, from_snapshot, from_next_xid, from_low_seq,
                from_high_seq, saved_at, state)
            values (%s, -1, ''3:3:'', ''3'', 0, 0, %L, ''idle'') on conflict do nothing', new.backend_number, new.saved_at));
    end if;
    return null;
end
$$;
comment on function outbox.hold_cursor() is 'Trigger of outbox.cursors: keeps the positions that a subscription brings apart, and releases held events that the other server has sent.';

create function outbox.hold_refused() returns trigger
    language plpgsql security definer set search_path = pg_catalog, pg_temp
    as $$
begin
    if not outbox.is_applied() then
        return new;
    end if;
    insert into outbox.held_refused (seq) values (new.seq) on conflict do nothing;
    return null;
end
$$;
comment on function outbox.hold_refused() is 'Trigger of outbox.refused_events: notes which events Redis refused on another server, as a subscription reports it.';

create function outbox.place_failed() returns trigger
    language plpgsql security definer set search_path = pg_catalog, pg_temp
    as $$
begin
    if outbox.is_applied() then
        -- Its number is the other server's: here its name counts.
        new.backend_number := coalesce((select b.number from outbox.backends b where b.name = new.backend), -1);
    end if;
    return new;
end
$$;
comment on function outbox.place_failed() is 'Trigger of outbox.failed_events: assigns an event that a subscription brings to the backend of the same name.';

create function outbox.leave_local() returns trigger
    language c
    as 'MODULE_PATHNAME', 'leave_local';
comment on function outbox.leave_local() is 'Trigger of tables that belong to this server alone: ignores what a subscription inserts, updates or deletes there.';

----------------------------------------------------------------------------------------------------------------------
-- All triggers: made by this list, looked after by the worker
----------------------------------------------------------------------------------------------------------------------

create table outbox.known_triggers (
    only_row boolean primary key default true check (only_row),
    triggers text,
    filenode oid,
    snapshot pg_snapshot not null,
    next_xid xid8 not null,
    low_seq  bigint not null,
    high_seq bigint not null
);
comment on table outbox.known_triggers is 'What outbox.trigger_state() returned when all rows of outbox.events were last known to have passed its trigger, with the tick of that moment.';
comment on column outbox.known_triggers.triggers is 'NULL: the worker is looking for rows that did not pass the trigger, up to this tick.';

create table outbox.kept_rows (
    number   bigint generated always as identity primary key,
    relation text not null,
    kept     text not null
);
comment on table outbox.kept_rows is 'Rows of this server while a subscription truncates a table of the extension; they are put back. Otherwise empty.';

create function outbox.keep_rows() returns trigger
    language plpgsql security definer set search_path = pg_catalog, pg_temp
    as $$
begin
    if outbox.is_applied() then
        if tg_table_name = 'events' then
            delete from outbox.held_events;
        end if;
        execute format('insert into outbox.kept_rows (relation, kept) select %1$L, t::text from outbox.%1$I t', tg_table_name);
    end if;
    return null;
end
$$;
comment on function outbox.keep_rows() is 'Trigger of all tables: saves the rows of this server when a subscription applies the TRUNCATE of another.';

create function outbox.put_rows_back() returns trigger
    language plpgsql security definer set search_path = pg_catalog, pg_temp
    as $$
begin
    if outbox.is_applied() then
        perform outbox.put_back(format('insert into outbox.%1$I overriding system value
            select (k.kept::outbox.%1$I).* from outbox.kept_rows k where k.relation = %1$L order by k.number', tg_table_name));
        delete from outbox.kept_rows k where k.relation = tg_table_name;
    end if;
    return null;
end
$$;
comment on function outbox.put_rows_back() is 'Trigger of all tables: see outbox.keep_rows().';

create function outbox.put_back(statement text) returns void
    language c strict volatile
    as 'MODULE_PATHNAME', 'put_back_wrapper';
comment on function outbox.put_back(text) is 'Executes an INSERT of rows of this server while a subscription applies changes. The rows are inserted unchanged.';

create function outbox.our_triggers(out relation text, out name text, out definition text) returns setof record
    language sql immutable set search_path = pg_catalog, pg_temp
    as $$
values
    ('events', 'applied_truncate', 'before truncate on outbox.events for each statement execute function outbox.keep_rows()'),
    ('events', 'applied_truncated', 'after truncate on outbox.events for each statement execute function outbox.put_rows_back()'),
    ('scheduled_events', 'applied_truncate', 'before truncate on outbox.scheduled_events for each statement execute function outbox.keep_rows()'),
    ('scheduled_events', 'applied_truncated', 'after truncate on outbox.scheduled_events for each statement execute function outbox.put_rows_back()'),
    ('refused_events', 'applied_truncate', 'before truncate on outbox.refused_events for each statement execute function outbox.keep_rows()'),
    ('refused_events', 'applied_truncated', 'after truncate on outbox.refused_events for each statement execute function outbox.put_rows_back()'),
    ('failed_events', 'applied_truncate', 'before truncate on outbox.failed_events for each statement execute function outbox.keep_rows()'),
    ('failed_events', 'applied_truncated', 'after truncate on outbox.failed_events for each statement execute function outbox.put_rows_back()'),
    ('cursors', 'applied_truncate', 'before truncate on outbox.cursors for each statement execute function outbox.keep_rows()'),
    ('cursors', 'applied_truncated', 'after truncate on outbox.cursors for each statement execute function outbox.put_rows_back()'),
    ('backends', 'applied_truncate', 'before truncate on outbox.backends for each statement execute function outbox.keep_rows()'),
    ('backends', 'applied_truncated', 'after truncate on outbox.backends for each statement execute function outbox.put_rows_back()'),
    ('backend_passwords', 'applied_truncate', 'before truncate on outbox.backend_passwords for each statement execute function outbox.keep_rows()'),
    ('backend_passwords', 'applied_truncated', 'after truncate on outbox.backend_passwords for each statement execute function outbox.put_rows_back()'),
    ('moved_backends', 'applied_truncate', 'before truncate on outbox.moved_backends for each statement execute function outbox.keep_rows()'),
    ('moved_backends', 'applied_truncated', 'after truncate on outbox.moved_backends for each statement execute function outbox.put_rows_back()'),
    ('ticks', 'applied_truncate', 'before truncate on outbox.ticks for each statement execute function outbox.keep_rows()'),
    ('ticks', 'applied_truncated', 'after truncate on outbox.ticks for each statement execute function outbox.put_rows_back()'),
    ('installation', 'applied_truncate', 'before truncate on outbox.installation for each statement execute function outbox.keep_rows()'),
    ('installation', 'applied_truncated', 'after truncate on outbox.installation for each statement execute function outbox.put_rows_back()'),
    ('incarnations', 'applied_truncate', 'before truncate on outbox.incarnations for each statement execute function outbox.keep_rows()'),
    ('incarnations', 'applied_truncated', 'after truncate on outbox.incarnations for each statement execute function outbox.put_rows_back()'),
    ('take_overs', 'applied_truncate', 'before truncate on outbox.take_overs for each statement execute function outbox.keep_rows()'),
    ('take_overs', 'applied_truncated', 'after truncate on outbox.take_overs for each statement execute function outbox.put_rows_back()'),
    ('restores', 'applied_truncate', 'before truncate on outbox.restores for each statement execute function outbox.keep_rows()'),
    ('restores', 'applied_truncated', 'after truncate on outbox.restores for each statement execute function outbox.put_rows_back()'),
    ('known_triggers', 'applied_truncate', 'before truncate on outbox.known_triggers for each statement execute function outbox.keep_rows()'),
    ('known_triggers', 'applied_truncated', 'after truncate on outbox.known_triggers for each statement execute function outbox.put_rows_back()'),
    -- Before all others, by its name.
    ('events', 'applied_event', 'before insert on outbox.events for each row when (current_setting(''session_replication_role'') = ''replica'') execute function outbox.hold_event()'),
    ('events', 'applied_change', 'before update or delete on outbox.events for each row execute function outbox.leave_local()'),
    ('scheduled_events', 'applied_event', 'before insert or update or delete on outbox.scheduled_events for each row when (current_setting(''session_replication_role'') = ''replica'') execute function outbox.hold_scheduled()'),
    ('cursors', 'applied_cursor', 'before insert or update or delete on outbox.cursors for each row when (outbox.is_applied()) execute function outbox.hold_cursor()'),
    ('refused_events', 'applied_event', 'before insert on outbox.refused_events for each row when (outbox.is_applied()) execute function outbox.hold_refused()'),
    ('refused_events', 'applied_change', 'before update or delete on outbox.refused_events for each row execute function outbox.leave_local()'),
    ('failed_events', 'applied_event', 'before insert on outbox.failed_events for each row when (outbox.is_applied()) execute function outbox.place_failed()'),
    ('backends', 'applied_change', 'before insert or update or delete on outbox.backends for each row execute function outbox.leave_local()'),
    ('backend_passwords', 'applied_change', 'before insert or update or delete on outbox.backend_passwords for each row execute function outbox.leave_local()'),
    ('ticks', 'applied_change', 'before insert or update or delete on outbox.ticks for each row execute function outbox.leave_local()'),
    ('installation', 'applied_change', 'before insert or update or delete on outbox.installation for each row execute function outbox.leave_local()'),
    ('incarnations', 'applied_change', 'before insert or update or delete on outbox.incarnations for each row execute function outbox.leave_local()'),
    ('take_overs', 'applied_change', 'before insert or update or delete on outbox.take_overs for each row execute function outbox.leave_local()'),
    ('known_triggers', 'applied_change', 'before insert or update or delete on outbox.known_triggers for each row execute function outbox.leave_local()'),
    ('restores', 'applied_change', 'before insert or update or delete on outbox.restores for each row execute function outbox.leave_local()'),
    ('events', 'complete_event', 'before insert on outbox.events for each row execute function outbox.complete_event()'),
    -- Triggers fire in the order of their names: this one after those of others.
    ('events', '~confirm_event', 'before insert on outbox.events for each row execute function outbox.confirm_event()'),
    ('events', 'refuse_update', 'before update on outbox.events for each statement execute function outbox.refuse_update()'),
    ('scheduled_events', 'complete_event', 'before insert on outbox.scheduled_events for each row execute function outbox.complete_event()'),
    ('backends', 'check_backend', 'before insert or update on outbox.backends for each row execute function outbox.check_backend()'),
    -- After check_backend, by its name.
    ('backends', 'check_number', 'before insert on outbox.backends for each row when (not pg_catalog.has_function_privilege(''outbox.check_number()'', ''execute'')) execute function outbox.check_number()'),
    ('backends', 'check_backend_deletion', 'before delete on outbox.backends for each row execute function outbox.check_backend_deletion()'),
    ('backends', 'keep_password', 'after update on outbox.backends for each row when (pg_catalog.has_function_privilege(''outbox.set_backend_password(pg_catalog.text, pg_catalog.text)'', ''execute'')) execute function outbox.keep_password()'),
    ('backends', 'note_move', 'after update on outbox.backends for each row when (not pg_catalog.pg_has_role(''pg_read_server_files'', ''usage'')) execute function outbox.note_move()'),
    ('backends', 'forget_move', 'after update on outbox.backends for each row when (pg_catalog.pg_has_role(''pg_read_server_files'', ''usage'')) execute function outbox.forget_move()'),
    ('backends', 'backends_changed', 'after insert or update or delete or truncate on outbox.backends for each statement execute function outbox.backends_changed()'),
    ('backend_passwords', 'backends_changed', 'after insert or update or delete or truncate on outbox.backend_passwords for each statement execute function outbox.backends_changed()'),
    ('take_overs', 'backends_changed', 'after insert or update on outbox.take_overs for each statement execute function outbox.backends_changed()'),
    ('moved_backends', 'applied_change', 'before insert or update or delete on outbox.moved_backends for each row execute function outbox.leave_local()'),
    ('copied_backends', 'applied_change', 'before insert or update or delete on outbox.copied_backends for each row execute function outbox.leave_local()'),
    ('copied_backends', 'backends_changed', 'after insert or update or delete or truncate on outbox.copied_backends for each statement execute function outbox.backends_changed()'),
    ('restores', 'backends_changed', 'after insert on outbox.restores for each statement execute function outbox.backends_changed()')
$$;
comment on function outbox.our_triggers() is 'The triggers of this extension''s tables. All are enabled always: also where session_replication_role is replica.';

create function outbox.broken_triggers(out relation text, out name text, out found text) returns setof record
    language sql stable set search_path = pg_catalog, pg_temp
    as $$
select o.relation, o.name,
    case t.tgenabled when 'D' then 'disabled' when 'O' then 'not enabled always' when 'R' then 'enabled for replicas alone' else 'missing' end
from outbox.our_triggers() o
    left join pg_trigger t on t.tgrelid = to_regclass('outbox.' || o.relation) and t.tgname = o.name and not t.tgisinternal
where t.tgenabled is distinct from 'A' and to_regclass('outbox.' || o.relation) is not null
$$;
comment on function outbox.broken_triggers() is 'Triggers of this extension that are missing or not enabled always, for example after pg_restore --disable-triggers. The worker repairs them.';

create function outbox.mend_trigger(relation text, name text) returns void
    language plpgsql set search_path = pg_catalog, pg_temp set lock_timeout = '100ms'
    as $$
declare
    o record;
begin
    select * into strict o from outbox.our_triggers() t where t.relation = mend_trigger.relation and t.name = mend_trigger.name;
    if not exists (select from pg_trigger t
        where t.tgrelid = format('outbox.%I', o.relation)::regclass and t.tgname = o.name and not t.tgisinternal) then
        execute format('create trigger %I %s', o.name, o.definition);
    end if;
    execute format('alter table outbox.%I enable always trigger %I', o.relation, o.name);
end
$$;
comment on function outbox.mend_trigger(text, text) is 'Makes one of this extension''s triggers if it is missing, and enables it always.';

do $$
begin
    perform outbox.mend_trigger(o.relation, o.name) from outbox.our_triggers() o;
end
$$;

insert into outbox.backends (name) values ('default');

----------------------------------------------------------------------------------------------------------------------
-- Looking
----------------------------------------------------------------------------------------------------------------------

-- The estimates of rows matter: with the default of 1,000, the views on them look so expensive that they are compiled
-- (JIT), and that takes half a second.
create function outbox.worker_status(out worker_pid integer, out state text) returns setof record
    language c volatile rows 1
    as 'MODULE_PATHNAME', 'worker_status_wrapper';
comment on function outbox.worker_status() is 'This database''s worker: its process id, and its state or the reason why there is none.';

create function outbox.backlog(backend_number integer, out pending bigint, out oldest_created_at timestamptz) returns setof record
    language c volatile strict rows 1
    as 'MODULE_PATHNAME', 'backlog_wrapper';
comment on function outbox.backlog(integer) is 'How many committed events of a backend lie behind its saved cursor: exact up to 10,000, an estimate above.';

create view outbox.backend_status with (security_barrier) as
select b.name as backend,
    case
        when h.is_copy or o.is_database or (o.backend_number is not null and b.delivery <> 'exactly_once'
            and coalesce(pg_catalog.current_setting('outbox_relay.take_over', true), 'standby') = 'standby') then 'copy'
        when not b.enabled then 'paused'
        when w.state not in ('running', 'starting', 'standby') then 'stopped'
        else coalesce(c.state, 'idle')
    end as state,
    l.pending + r.waiting as pending,
    pg_catalog.clock_timestamp() - least(l.oldest_created_at, r.oldest_created_at) as oldest_pending_age,
    coalesce(c.published_total, 0) as published_total,
    coalesce(c.failed_total, 0) as failed_total,
    c.last_published_at,
    c.last_error,
    c.last_error_at,
    case when b.enabled then c.next_attempt_at end as next_attempt_at,
    coalesce(c.healings, 0) as healings,
    c.address
from outbox.backends b
    cross join outbox.worker_status() w
    left join outbox.copied_backends o on o.backend_number = b.number
    -- No worker has been here yet to take note of it.
    cross join (
        select i.database <> d.oid as is_copy
        from outbox.installation i, pg_catalog.pg_database d where d.datname = pg_catalog.current_database()
    ) h
    -- In a cluster, of all lanes: what troubles one comes first.
    cross join lateral (
        select (pg_catalog.array_agg(k.state order by pg_catalog.array_position(
                '{fenced,copy,misconfigured,backoff,sending,idle}'::text[], k.state)))[1] as state,
            pg_catalog.sum(k.published_total)::bigint as published_total,
            pg_catalog.sum(k.failed_total)::bigint as failed_total,
            pg_catalog.max(k.last_published_at) as last_published_at,
            (pg_catalog.array_agg(k.last_error order by k.last_error_at desc nulls last))[1] as last_error,
            pg_catalog.max(k.last_error_at) as last_error_at,
            pg_catalog.min(k.next_attempt_at) as next_attempt_at,
            pg_catalog.sum(k.healings)::bigint as healings,
            pg_catalog.string_agg(distinct k.address, ', ') as address
        from outbox.cursors k where k.backend_number = b.number
    ) c
    cross join lateral outbox.backlog(b.number) l
    cross join lateral (
        select pg_catalog.count(*) as waiting, pg_catalog.min(w.created_at) as oldest_created_at
        from (select e.created_at from outbox.refused_events f join outbox.events e on e.seq = f.seq
            where f.backend_number = b.number and f.accepted_in is null and f.seq > 0 order by f.seq limit 10000) w
    ) r;
comment on view outbox.backend_status is 'One row for each backend: its state, how much waits, and its last error.';

create view outbox.status with (security_barrier) as
select w.worker_pid,
    case when w.state = 'running' and b.copies > 0 then 'copy' else w.state end as state,
    b.backends,
    b.pending,
    b.oldest_pending_age,
    (select pg_catalog.count(*) from (select from outbox.scheduled_events limit 10000) s) as scheduled,
    (select pg_catalog.count(*) from (select from outbox.failed_events limit 10000) f) as failed,
    b.published_total,
    (select coalesce(pg_catalog.sum(c.events_per_second), 0)::real from outbox.cursors c
        where c.saved_at > pg_catalog.clock_timestamp() - interval '5 s') as events_per_second
from outbox.worker_status() w
    cross join (
        select pg_catalog.count(*) as backends, pg_catalog.count(*) filter (where s.state = 'copy') as copies, coalesce(pg_catalog.sum(s.pending), 0)::bigint as pending,
            pg_catalog.max(s.oldest_pending_age) as oldest_pending_age,
            coalesce(pg_catalog.sum(s.published_total), 0)::bigint as published_total
        from outbox.backend_status s
    ) b;
comment on view outbox.status is 'The relay of this database in one row.';

create view outbox.top with (security_barrier) as
select pg_catalog.left(s.backend, 14) as backend,
    s.state,
    coalesce((select pg_catalog.sum(c.events_per_second)::bigint from outbox.cursors c join outbox.backends b on b.number = c.backend_number
        where b.name = s.backend and c.saved_at > pg_catalog.clock_timestamp() - interval '5 s'), 0) as per_s,
    s.pending,
    pg_catalog.date_trunc('second', s.oldest_pending_age) as lag,
    pg_catalog.left(s.address, 20) as address,
    case when s.state not in ('idle', 'sending') then pg_catalog.left(s.last_error, 16) end as last_error
from outbox.backend_status s
order by s.pending desc, s.backend;
comment on view outbox.top is 'What each backend is doing, on one screen of at most 100 columns: for \watch 1 in psql.';

create view outbox.metrics with (security_barrier) as
with
b as (select s.*, k.number from outbox.backend_status s join outbox.backends k on k.name = s.backend),
w as (select * from outbox.worker_status())
select m.name, m.type, m.labels, m.value, m.help
from b cross join lateral (values
    ('outbox_relay_published_total', 'counter', b.published_total::double precision, 'Events that Redis has accepted.'),
    ('outbox_relay_failed_total', 'counter', b.failed_total::double precision, 'Events that have failed for good.'),
    ('outbox_relay_healings_total', 'counter', b.healings::double precision, 'Times that Redis came back without entries that it had acknowledged, and got them again.'),
    ('outbox_relay_pending_events', 'gauge', b.pending::double precision, 'Committed events that Redis has not accepted yet: exact up to 10,000, an estimate above.'),
    ('outbox_relay_oldest_pending_seconds', 'gauge', coalesce(extract(epoch from b.oldest_pending_age), 0)::double precision, 'Age of the oldest pending event; 0: none is pending.'),
    ('outbox_relay_last_published_timestamp_seconds', 'gauge', extract(epoch from b.last_published_at)::double precision, 'When Redis accepted an event last.'),
    ('outbox_relay_last_error_timestamp_seconds', 'gauge', extract(epoch from b.last_error_at)::double precision, 'When there was an error last.')
) v (name, type, value, help)
    cross join lateral (select v.name, v.type, pg_catalog.jsonb_build_object('backend', b.backend) as labels, v.value, v.help) m
where m.value is not null
union all
select 'outbox_relay_backend_state', 'gauge', pg_catalog.jsonb_build_object('backend', b.backend, 'state', s.state),
    (s.state = b.state)::integer::double precision, 'What a backend is doing: 1 for its state, 0 for the others.'
from b cross join pg_catalog.unnest('{idle,sending,backoff,paused,misconfigured,fenced,copy,stopped}'::text[]) s (state)
union all
select 'outbox_relay_refused_events', 'gauge', pg_catalog.jsonb_build_object('backend', b.backend),
    (select pg_catalog.count(*) from (select from outbox.refused_events r
        where r.backend_number = b.number and r.accepted_in is null and r.seq > 0 limit 10000) r)::double precision,
    'Events that Redis has refused and that are tried again, and those behind them in their streams: counted up to 10,000.'
from b
union all
select 'outbox_relay_worker_up', 'gauge', '{}'::jsonb, (w.state in ('running', 'standby'))::integer::double precision,
    '1: this database has a worker, or the server is a standby.' from w
union all
select 'outbox_relay_worker_state', 'gauge', pg_catalog.jsonb_build_object('state', w.state), 1, 'What the worker is doing, or why there is none.' from w
union all
select t.name, 'gauge', '{}'::jsonb, t.value, t.help
from (values
    ('outbox_relay_scheduled_events', (select pg_catalog.count(*) from (select from outbox.scheduled_events limit 10000) s)::double precision,
        'Events that are not due yet: counted up to 10,000.'),
    ('outbox_relay_failed_events', (select pg_catalog.count(*) from (select from outbox.failed_events limit 10000) f)::double precision,
        'Failed events that are kept: counted up to 10,000.'),
    ('outbox_relay_retained_events', (select greatest(c.reltuples, 0) from pg_catalog.pg_class c where c.oid = 'outbox.events'::regclass)::double precision,
        'Rows of outbox.events, as the last vacuum or analyze has estimated.'),
    ('outbox_relay_retained_bytes', pg_catalog.pg_total_relation_size('outbox.events')::double precision, 'Size of outbox.events with its indexes.'),
    ('outbox_relay_oldest_retained_timestamp_seconds', (select extract(epoch from pg_catalog.min(e.created_at)) from outbox.events e)::double precision,
        'When the oldest event that is kept was published.'),
    ('outbox_relay_read_timestamp_seconds', extract(epoch from pg_catalog.clock_timestamp())::double precision,
        'When these figures were read: some exporters go on showing the last ones while the server does not answer.')
) t (name, value, help)
where t.value is not null;
comment on view outbox.metrics is 'Figures for a monitoring system: name, type (counter or gauge), labels, value, help. No event ids, streams or payloads are among them. Counters are saved with the cursors, so that they outlive a restart; they lag by a second at most.';

-- One branch for each status, so that a query for one status reads nothing else.
create view outbox.event_status with (security_barrier) as
select f.event_id, f.event_type, f.source, f.subject, coalesce(b.name, f.backend) as backend,
    coalesce(f.stream, b.stream_name, pg_catalog.current_setting('outbox_relay.redis_stream_name', true)) as stream,
    f.created_at, null::timestamptz as scheduled_at, 'failed' as status, f.attempts, f.last_error
-- Kept here longer than in outbox.events.
from outbox.failed_events f
    left join outbox.backends b on b.number = f.backend_number
union all
select e.event_id, e.event_type, e.source, e.subject, coalesce(b.name, e.backend),
    coalesce(e.stream, b.stream_name, pg_catalog.current_setting('outbox_relay.redis_stream_name', true)),
    e.created_at, e.scheduled_at, 'scheduled', 0, null
from outbox.scheduled_events e
    left join outbox.backends b on b.number = e.backend_number
union all
select e.event_id, e.event_type, e.source, e.subject, coalesce(b.name, e.backend),
    coalesce(e.stream, b.stream_name, pg_catalog.current_setting('outbox_relay.redis_stream_name', true)),
    e.created_at, null, 'pending', r.attempts, r.last_error
from outbox.refused_events r
    join outbox.events e on e.seq = r.seq
    left join outbox.backends b on b.number = e.backend_number
where r.accepted_in is null
    and not exists (select from outbox.failed_events f where f.event_id = e.event_id and f.seq = e.seq)
union all
select e.event_id, e.event_type, e.source, e.subject, coalesce(b.name, e.backend),
    coalesce(e.stream, b.stream_name, pg_catalog.current_setting('outbox_relay.redis_stream_name', true)),
    e.created_at, null, 'pending', 0, null
-- What not all cursors see: events of later transactions, and of those that were open for one. (That they have numbers
-- is always so; it tells the planner that they are few, as a rule.)
from (
        select n.* from outbox.events n
        where n.xid >= coalesce((select case when exists (select from outbox.backends s where not exists (select from outbox.cursors k where k.backend_number = s.number))
                then '0' else (select pg_snapshot_xmax(k.from_snapshot) as xid from outbox.cursors k order by xid limit 1) end), '0')
            and n.xid <= '18446744073709551615'
            and n.seq between (select -9223372036854775808) and (select 9223372036854775807)
        union all
        select l.* from outbox.events l
        where exists (select from outbox.cursors k, pg_snapshot_xip(k.from_snapshot))
            and l.xid = any (array(select running.xid from outbox.cursors k, pg_snapshot_xip(k.from_snapshot) running(xid)))
            and l.xid < coalesce((select case when exists (select from outbox.backends s where not exists (select from outbox.cursors k where k.backend_number = s.number))
                then '0' else (select pg_snapshot_xmax(k.from_snapshot) as xid from outbox.cursors k order by xid limit 1) end), '0')
            and l.backend_number between (select -2147483648) and (select 2147483647)
    ) e
    left join outbox.backends b on b.number = e.backend_number
    left join lateral (
        select outbox.is_delivered(k, e.xid, e.seq) as is_delivered
        from outbox.cursors k
        where k.backend_number = e.backend_number and k.slot in (-1, outbox.hash_slot(coalesce(e.stream, b.stream_name, '')))
        order by k.slot desc limit 1
    ) c on true
where c.is_delivered is not true
    and not exists (select from outbox.refused_events r where r.seq = e.seq and r.accepted_in is null)
    and not exists (select from outbox.failed_events f where f.event_id = e.event_id and f.seq = e.seq)
union all
(select e.event_id, e.event_type, e.source, e.subject, coalesce(b.name, e.backend),
    coalesce(e.stream, b.stream_name, pg_catalog.current_setting('outbox_relay.redis_stream_name', true)),
    e.created_at, null, 'published', 1, null
from outbox.events e
    left join outbox.backends b on b.number = e.backend_number
    left join lateral (
        select outbox.is_delivered(k, e.xid, e.seq) as is_delivered
        from outbox.cursors k
        where k.backend_number = e.backend_number and k.slot in (-1, outbox.hash_slot(coalesce(e.stream, b.stream_name, '')))
        order by k.slot desc limit 1
    ) c on true
where c.is_delivered
    and not exists (select from outbox.refused_events r where r.seq = e.seq and r.accepted_in is null)
    and not exists (select from outbox.failed_events f where f.event_id = e.event_id and f.seq = e.seq)
-- In an order in which the latest few are found at once.
order by e.created_at desc);
comment on view outbox.event_status is 'One row for each event, without its payload. Fast by event_id, by status (except published), and for the latest by created_at. For anything else, add a condition on created_at.';

----------------------------------------------------------------------------------------------------------------------
-- Health: what is well, what is not, and what helps
----------------------------------------------------------------------------------------------------------------------

create function outbox.worker_health(out "check" text, out status text, out detail text, out hint text) returns setof record
    language sql volatile set search_path = pg_catalog, pg_temp
    as $$
select 'worker', w.status, w.detail, w.hint
from outbox.worker_status() s
    cross join lateral (values
        ('running', 'ok', format('Process %s delivers the events of this database.', s.worker_pid), null),
        ('standby', 'ok', 'This server is a standby: its primary delivers the events.', null),
        ('starting', 'warn', 'The worker of this database is being started.', 'Ask again in a few seconds.'),
        ('library not in shared_preload_libraries', 'fail', 'The library is not preloaded: events are kept, and nothing sends them.',
            format('Run ALTER SYSTEM SET shared_preload_libraries = %s; and restart the server.',
                quote_literal(concat_ws(', ', nullif(current_setting('shared_preload_libraries'), ''), 'outbox_relay')))),
        ('disabled', 'fail', 'outbox_relay.enabled is off.',
            'Run ALTER SYSTEM SET outbox_relay.enabled = on; SELECT pg_reload_conf();'),
        ('database not in outbox_relay.databases', 'fail',
            format('outbox_relay.databases is ''%s'', which leaves out "%s".', current_setting('outbox_relay.databases', true), current_database()),
            format('Run ALTER SYSTEM SET outbox_relay.databases = %s; SELECT pg_reload_conf();',
                quote_literal(concat_ws(',', nullif(current_setting('outbox_relay.databases', true), ''), current_database())))),
        ('version mismatch', 'fail',
            format('The extension has version %s, the library another one.', (select e.extversion from pg_extension e where e.extname = 'outbox_relay')),
            'Run ALTER EXTENSION outbox_relay UPDATE; or restart the server, if it still has an older library.'),
        ('waiting for a background worker process', 'fail',
            format('All of the %s background worker processes are in use.', current_setting('max_worker_processes')),
            format('Run ALTER SYSTEM SET max_worker_processes = %s; and restart the server.', current_setting('max_worker_processes')::integer + 8)),
        ('waiting for the launcher', 'fail', 'The process "outbox_relay launcher" is not there.',
            'The server starts it again within some seconds. If it does not, the server''s log says why.'),
        ('failing to start', 'fail', 'The worker of this database has ended several times before it was at work.',
            'The server''s log says why.'),
        ('stopped', 'fail', 'This database has no worker.', 'The server''s log says why it left. Run SELECT outbox.wake();')
    ) w (state, status, detail, hint)
where w.state = s.state
$$;
comment on function outbox.worker_health() is 'Part of outbox.health(): whether this database has a worker, or why there is none.';

create function outbox.object_health(out "check" text, out status text, out detail text, out hint text) returns setof record
    language sql volatile set search_path = pg_catalog, pg_temp
    as $$
with
ours(name) as (values ('events'), ('backends'), ('backend_passwords'), ('moved_backends'), ('scheduled_events'), ('refused_events'),
    ('failed_events'), ('cursors'), ('ticks'), ('installation'), ('incarnations'), ('take_overs'), ('copied_backends'), ('restores'),
    ('known_triggers'), ('held_events'), ('held_scheduled'), ('held_cursors'), ('held_refused'), ('kept_rows'), ('events_seq_seq')),
there as (select o.name, to_regclass('outbox.' || o.name) as oid from ours o),
faults(what, fault, cure) as (
    select 'tables', format('outbox.%s is missing.', t.name),
        format('If it was renamed, give it its name back: ALTER TABLE ... RENAME TO %s;', t.name)
    from there t where t.oid is null
    union all
    select 'indexes', format('%s is not valid.', i.indexrelid::regclass), format('Run REINDEX INDEX CONCURRENTLY %s;', i.indexrelid::regclass)
    from there t join pg_index i on i.indrelid = t.oid where not i.indisvalid or not i.indisready
    union all
    select 'indexes', format('outbox.events has no index on (%s).', w.columns), w.cure
    from there t cross join (values
            ('seq', 'Run ALTER TABLE outbox.events ADD PRIMARY KEY (seq) INCLUDE (backend_number);'),
            ('xid, seq', 'Run CREATE INDEX CONCURRENTLY events_xid_idx ON outbox.events (xid, seq);'),
            ('event_id', 'Run CREATE UNIQUE INDEX CONCURRENTLY events_event_id_idx ON outbox.events (event_id);'),
            ('created_at', 'Run CREATE INDEX CONCURRENTLY events_created_at_idx ON outbox.events (created_at);')) w (columns, cure)
    where t.name = 'events' and t.oid is not null and not exists (
        select from pg_index i where i.indrelid = t.oid and i.indpred is null and i.indisvalid and w.columns = (
            select string_agg(a.attname::text, ', ' order by k.n)
            from unnest(i.indkey::smallint[]) with ordinality k (attnum, n) join pg_attribute a on a.attrelid = t.oid and a.attnum = k.attnum
            where k.n <= i.indnkeyatts))
    union all
    select 'sequence', 'outbox.events_seq_seq has other parameters than it needs.',
        'Run ALTER SEQUENCE outbox.events_seq_seq AS bigint INCREMENT 1 NO MAXVALUE CACHE 1 NO CYCLE;'
    from pg_sequence s join there t on t.oid = s.seqrelid
    where s.seqtypid <> 'bigint'::regtype or s.seqincrement <> 1 or s.seqcache <> 1 or s.seqcycle or s.seqmax <> 9223372036854775807
    union all
    select 'owner', format('The owner of the extension, %I, is no superuser.', pg_get_userbyid(e.extowner)),
        format('Run ALTER ROLE %I SUPERUSER;', pg_get_userbyid(e.extowner))
    from pg_extension e join pg_roles r on r.oid = e.extowner where e.extname = 'outbox_relay' and not r.rolsuper
    union all
    select 'triggers', format('The trigger "%s" of outbox.%s is %s.', b.name, b.relation, b.found),
        'The worker mends it. If it cannot, the server''s log says why.'
    from outbox.broken_triggers() b
    union all
    select 'foreign triggers', format('outbox.%s has the trigger "%s", which is not of this extension.', t.name, g.tgname),
        format('If it is not meant, run DROP TRIGGER %I ON outbox.%s;', g.tgname, t.name)
    from there t join pg_trigger g on g.tgrelid = t.oid
    where not g.tgisinternal and not exists (select from outbox.our_triggers() o where o.relation = t.name and o.name = g.tgname)
    union all
    select 'publications', format('The publication "%s" has outbox.%s, which must not leave this server.', p.pubname, t.name),
        format('Run ALTER PUBLICATION %I DROP TABLE outbox.%s;', p.pubname, t.name)
    from there t join pg_publication_rel r on r.prrelid = t.oid join pg_publication p on p.oid = r.prpubid
    where t.name not in ('events', 'scheduled_events', 'failed_events', 'refused_events', 'cursors')
    union all
    select 'inheritance', format('outbox.%s takes part in inheritance or partitioning.', t.name), 'Detach it: its rows are read one table at a time.'
    from there t where exists (select from pg_inherits i where t.oid in (i.inhrelid, i.inhparent))
)
select c.name, case when f.what is null then 'ok' else c.severity end, coalesce(f.faults, c.well), f.cure
from (values
        ('tables', 'fail', 'All tables are there.'), ('indexes', 'fail', 'All indexes are there and valid.'),
        ('sequence', 'fail', 'The sequence numbers events as it should.'), ('owner', 'fail', 'The owner of the extension is a superuser.'),
        ('triggers', 'warn', 'All triggers of the extension are enabled.'), ('foreign triggers', 'warn', 'Nobody else has a trigger on the tables.'),
        ('publications', 'warn', 'No publication has what must not leave this server.'), ('inheritance', 'fail', 'No table is inherited.')
    ) c (name, severity, well)
    left join (
        select f.what, string_agg(f.fault, ' ' order by f.fault) as faults, string_agg(distinct f.cure, ' ') as cure
        from faults f group by f.what
    ) f on f.what = c.name
$$;
comment on function outbox.object_health() is 'Part of outbox.health(): whether all that belongs to the extension is there, as it must be.';

create function outbox.backend_health(out "check" text, out status text, out detail text, out hint text) returns setof record
    language sql volatile set search_path = pg_catalog, pg_temp
    as $$
select 'backend ' || s.backend, j.status,
    concat_ws(' ', j.detail, 'The last error: ' || case when j.status <> 'ok' then s.last_error end || '.',
        case when s.pending > 0 then format('%s events wait, the oldest for %s.', s.pending, date_trunc('second', s.oldest_pending_age)) end),
    j.hint
from outbox.backend_status s
    join outbox.backends b on b.name = s.backend
    cross join lateral (select case
        when s.last_error ~ '^(WRONGPASS|NOAUTH)' or s.last_error like 'ERR invalid password%' then 'password'
        when s.last_error ~ '^NOPERM' then 'rights'
        else 'other' end as error) e
    cross join lateral (values
        ('idle', 'ok', 'All is sent.', null),
        ('sending', case when s.oldest_pending_age > interval '1 min' then 'warn' else 'ok' end, 'Events are being sent.',
            case when s.oldest_pending_age > interval '1 min' then 'If the age grows, Redis or the network is slower than the publishers: look at SLOWLOG GET in Redis.' end),
        ('paused', 'warn', 'It is paused: events wait.', format('Run UPDATE outbox.backends SET enabled = true WHERE name = %L;', s.backend)),
        ('stopped', 'fail', 'This database has no worker: nothing is sent.', 'See the check "worker".'),
        ('copy', 'fail', 'This database is a copy of another one: what is published here waits.',
            format('If this server is to send it, run SELECT outbox.take_over(%L);', s.backend)),
        ('fenced', 'fail', 'Another server owns its streams.',
            format('If that server is gone for good, run SELECT outbox.take_over(%L);', s.backend)),
        ('misconfigured', 'fail', 'It cannot work as it is configured, and is tried again.',
            case e.error
                when 'password' then format('Run SELECT outbox.set_backend_password(%L, ''...''); with the password of Redis%s.', s.backend,
                    coalesce(format(' (and the user %L of the column username)', b.username), ''))
                when 'rights' then 'Give the user the rights that docs/FAILURES.md lists: ACL SETUSER in Redis.'
                else format('Correct its row: UPDATE outbox.backends SET ... WHERE name = %L; docs/FAILURES.md has the error.', s.backend) end),
        ('backoff', case when s.oldest_pending_age > interval '5 s' or s.pending = 0 and s.last_error_at > s.last_published_at then 'fail' else 'warn' end,
            format('Redis at %s cannot be used, and is tried again at %s.', coalesce(s.address, b.unix_socket, concat(coalesce(b.host, current_setting('outbox_relay.redis_host', true)), ':', coalesce(b.port::text, current_setting('outbox_relay.redis_port', true)))),
                to_char(s.next_attempt_at, 'HH24:MI:SS')),
            format('Start it, or correct where it is: UPDATE outbox.backends SET host = ..., port = ... WHERE name = %L; SELECT outbox.wake(); tries at once.', s.backend))
    ) j (state, status, detail, hint)
where j.state = s.state
$$;
comment on function outbox.backend_health() is 'Part of outbox.health(): each backend, with what waits for it.';

create function outbox.event_health(old interval, out "check" text, out status text, out detail text, out hint text) returns setof record
    language sql volatile set search_path = pg_catalog, pg_temp
    as $$
with
-- Who has a lock of writers on the table publishes, or has published.
publishers as (
    select distinct l.pid, l.virtualtransaction from pg_locks l
    where l.relation in ('outbox.events'::regclass, 'outbox.scheduled_events'::regclass) and l.mode = 'RowExclusiveLock' and l.granted
        and l.database = (select d.oid from pg_database d where d.datname = current_database())
),
open_ones as (
    select a.pid, a.xact_start, a.state, left(a.query, 100) as query
    from publishers p join pg_stat_activity a on a.pid = p.pid
    where a.xact_start < clock_timestamp() - old and a.backend_type <> 'outbox_relay worker'
    order by a.xact_start limit 1
),
prepared as (
    select x.gid, x.prepared from pg_prepared_xacts x
    where x.database = current_database() and x.prepared < clock_timestamp() - old
        and exists (select from publishers p where p.pid is null)
    order by x.prepared limit 1
),
retained as (
    select (select min(e.created_at) from outbox.events e) as oldest,
        (select s.setting::bigint * interval '1 min' from pg_settings s where s.name = 'outbox_relay.published_retention' and s.setting::bigint > 0) as kept
),
waiting as (
    select b.name, count(*) as count, min(r.last_error) as error
    from (select * from outbox.refused_events r where r.accepted_in is null limit 10000) r join outbox.backends b on b.number = r.backend_number
    group by b.name
),
failed as (select count(*) as count, max(f.failed_at) as last from (select f.failed_at from outbox.failed_events f order by f.failed_at desc limit 10000) f),
dead as (
    select t.relid, t.n_dead_tup, t.n_live_tup from pg_stat_user_tables t
    where t.schemaname = 'outbox' and t.n_dead_tup > 100000 and t.n_dead_tup > t.n_live_tup
)
select 'open transactions', case when count(o) > 0 then 'warn' else 'ok' end,
    coalesce(min(format('Process %s has published in a transaction that is open since %s: its events are sent when it commits. Its last query: %s', o.pid, o.xact_start, o.query)),
        'Nobody keeps events in a transaction that has been open for long.'),
    min(format('If nobody is at work there, run SELECT pg_terminate_backend(%s);', o.pid))
from open_ones o
union all
select 'prepared transactions', case when count(p) > 0 then 'warn' else 'ok' end,
    coalesce(min(format('The transaction %L has published, and is prepared since %s: its events are sent when it commits.', p.gid, p.prepared)),
        'Nobody keeps events in a prepared transaction for long.'),
    min(format('Run COMMIT PREPARED %L; or ROLLBACK PREPARED %L;', p.gid, p.gid))
from prepared p
union all
select 'refused events', case when count(w) > 0 then 'warn' else 'ok' end,
    coalesce(string_agg(format('%s events of backend "%s" wait behind one that Redis has refused: %s.', w.count, w.name, w.error), ' '), 'No event waits behind a refused one.'),
    case when count(w) > 0 then 'They are tried again by themselves. Mend the stream that the error is of; SELECT outbox.wake(); tries at once.' end
from waiting w
union all
select 'failed events', case when f.count > 0 then 'warn' else 'ok' end,
    case when f.count > 0 then format('%s events have failed, the last one at %s.', f.count, f.last) else 'No event has failed.' end,
    case when f.count > 0 then 'Look at outbox.failed_events, mend what last_error says, and run SELECT outbox.retry_failed();' end
from failed f
union all
select 'retention', case when is_late then 'warn' else 'ok' end,
    case
        when r.oldest is null then 'No events are kept.'
        when is_late then format('The oldest event is of %s, and is kept for longer than outbox_relay.published_retention (%s).', r.oldest, r.kept) ||
            coalesce(' Backend "' || (select string_agg(w.name, '", "') from waiting w) || '" has refused events: until they are accepted or fail, nothing of it is purged.', '')
        else format('The oldest event is of %s.', r.oldest) end,
    case when is_late then 'Run CALL outbox.purge(); what is still kept then waits for a backend: see the checks above.' end
from retained r, lateral (select coalesce(r.oldest < clock_timestamp() - r.kept * 1.1 - interval '1 hour', false)
    and current_setting('outbox_relay.cleanup_published', true) = 'on') l (is_late)
union all
select 'bloat', case when count(d) > 0 then 'warn' else 'ok' end,
    coalesce(string_agg(format('%s has %s dead rows beside %s live ones.', d.relid::regclass, d.n_dead_tup, d.n_live_tup), ' '), 'No table has more dead rows than live ones.'),
    string_agg(format('Run VACUUM %s;', d.relid::regclass), ' ')
from dead d
$$;
comment on function outbox.event_health(interval) is 'Part of outbox.health(): what keeps events back, and what keeps them for too long.';

create function outbox.health(old interval default '10 min', out "check" text, out status text, out detail text, out hint text) returns setof record
    language plpgsql volatile security definer set search_path = pg_catalog, pg_temp set jit = off
    as $$
declare
    has_tables boolean := true;
begin
    return query select * from outbox.worker_health();
    for "check", status, detail, hint in select o.* from outbox.object_health() o loop
        has_tables := has_tables and not ("check" = 'tables' and status = 'fail');
        return next;
    end loop;
    -- What is asked below needs all tables.
    if has_tables then
        return query select * from outbox.backend_health();
        return query select * from outbox.event_health(old);
    end if;
end
$$;
comment on function outbox.health(interval) is 'Whether all is well: one row a check, with status ok, warn or fail, what was found, and what helps. A transaction that is open for longer than "old" counts as old. Cheap enough to be asked each 10 s; readable by pg_monitor.';

----------------------------------------------------------------------------------------------------------------------
-- Acting
----------------------------------------------------------------------------------------------------------------------

create function outbox.wake() returns void
    language c volatile
    as 'MODULE_PATHNAME', 'wake_wrapper';
comment on function outbox.wake() is 'Wakes this database''s worker. A backend that waits to try again tries at once, but not more than once a second. Its backoff continues as before.';

create function outbox.purge_piece(backend_number integer, after_seq bigint, row_count integer, out deleted bigint, out last_seq bigint) returns setof record
    language c volatile strict
    as 'MODULE_PATHNAME', 'purge_piece_wrapper';
comment on function outbox.purge_piece(integer, bigint, integer) is 'Deletes some sent events of a backend whose retention has ended. Pass last_seq to the next call; NULL means that all are deleted.';

-- A procedure that commits cannot have a search_path of its own.
create procedure outbox.purge()
    language plpgsql
    as $$
declare
    c record;
    after_seq bigint;
    retention interval := pg_catalog.current_setting('outbox_relay.failed_retention')::interval;
begin
    for c in select distinct k.backend_number from outbox.cursors k order by k.backend_number loop
        after_seq := 0;
        loop
            select p.last_seq into after_seq from outbox.purge_piece(c.backend_number, after_seq, 1000) p;
            commit;
            exit when after_seq is null;
        end loop;
    end loop;
    if retention operator(pg_catalog.>=) interval '0' then
        loop
            delete from outbox.failed_events f
                where f.ctid operator(pg_catalog.=) any (array(select o.ctid from outbox.failed_events o
                    where o.failed_at operator(pg_catalog.<) (pg_catalog.clock_timestamp() operator(pg_catalog.-) retention)
                    order by o.failed_at limit 1000));
            exit when not found;
            commit;
        end loop;
    end if;
end
$$;
comment on procedure outbox.purge() is 'Deletes sent and failed events whose retention has ended, and commits after each piece. The worker does the same by itself.';

create function outbox.wait_published(event_id uuid, timeout interval default '10s') returns boolean
    language plpgsql set search_path = pg_catalog, pg_temp
    as $$
declare
    deadline timestamptz := pg_catalog.clock_timestamp() + timeout;
begin
    if event_id is null or timeout is null then
        raise exception using errcode = 'null_value_not_allowed', message = 'event_id and timeout must not be null',
            hint = 'Pass the id that outbox.publish_event returned; it is null if a trigger has left the event out.';
    end if;
    loop
        -- In the transaction that published it, an event never gets published: it returns false after the timeout.
        if exists (select from outbox.event_status s where s.event_id = wait_published.event_id and s.status = 'published') then
            return true;
        end if;
        if pg_catalog.clock_timestamp() >= deadline then
            return false;
        end if;
        perform pg_catalog.pg_sleep(0.02);
    end loop;
end
$$;
comment on function outbox.wait_published(uuid, interval) is 'Waits until an event is known to be in its stream. Returns false if that takes longer than the timeout. Call it after the commit.';

create function outbox.waits_since(seen pg_snapshot) returns boolean
    language sql volatile set search_path = pg_catalog, pg_temp
    as $$
-- An event that was committed by then, and lies behind no cursor.
select exists (
    select from outbox.events e join outbox.backends b on b.number = e.backend_number
    where e.xid >= (select coalesce(min(pg_snapshot_xmin(c.from_snapshot)), '0') from outbox.cursors c join outbox.backends k on k.number = c.backend_number)
        and e.xid < pg_snapshot_xmax(seen) and pg_visible_in_snapshot(e.xid, seen)
        and not coalesce((select outbox.is_delivered(c, e.xid, e.seq) from outbox.cursors c
            where c.backend_number = e.backend_number and c.slot in (-1, outbox.hash_slot(coalesce(e.stream, b.stream_name, '')))
            order by c.slot desc limit 1), false)
) or exists (
    select from outbox.refused_events r join outbox.events e on e.seq = r.seq
    where r.accepted_in is null and r.seq > 0 and pg_visible_in_snapshot(e.xid, seen)
)
$$;
comment on function outbox.waits_since(pg_snapshot) is 'Whether an event that this snapshot sees is not known to be in its stream yet, and has not failed.';

create function outbox.drain(timeout interval default '10s') returns boolean
    language plpgsql volatile security definer set search_path = pg_catalog, pg_temp
    as $$
declare
    seen constant pg_snapshot := pg_current_snapshot();
    deadline constant timestamptz := clock_timestamp() + timeout;
    asked timestamptz;
begin
    if timeout is null then
        raise exception using errcode = 'null_value_not_allowed', message = 'timeout must not be null',
            hint = 'Pass how long to wait, such as ''10 s''.';
    end if;
    perform outbox.wake();
    loop
        asked := clock_timestamp();
        if not outbox.waits_since(seen) then
            return true;
        end if;
        if clock_timestamp() >= deadline then
            return false;
        end if;
        -- Asking takes longer the more there is to be sent: it rests at least as long.
        perform pg_sleep(greatest(0.02, extract(epoch from clock_timestamp() - asked)));
    end loop;
end
$$;
comment on function outbox.drain(interval) is 'Waits until all events that were committed before it was called are in their streams, or have failed; false if they are not within the timeout. Events of a paused backend, and those that Redis refuses, are waited for; scheduled ones that are not due are not. Call it outside a transaction.';

create function outbox.publish_failed(failed outbox.failed_events, backend text) returns boolean
    language plpgsql set search_path = pg_catalog, pg_temp
    as $$
begin
    -- What is there under the same id is another event. As long as that waits to be sent it stays, and this one waits
    -- for it; once it has been published, or has failed too, its row makes room.
    if exists (select from outbox.scheduled_events s where s.event_id = failed.event_id)
        or exists (select from outbox.events e left join outbox.backends b on b.number = e.backend_number
            where e.event_id = failed.event_id and e.seq <> failed.seq
                and not exists (select from outbox.failed_events o where o.event_id = e.event_id and o.seq = e.seq)
                and (exists (select from outbox.refused_events r where r.seq = e.seq and r.accepted_in is null)
                    or not coalesce((select outbox.is_delivered(k, e.xid, e.seq) from outbox.cursors k
                        where k.backend_number = e.backend_number
                            and k.slot in (-1, outbox.hash_slot(coalesce(e.stream, b.stream_name, '')))
                        order by k.slot desc limit 1), false))) then
        return false;
    end if;
    delete from outbox.failed_events e where e.event_id = failed.event_id and e.seq = failed.seq;
    delete from outbox.events e where e.event_id = failed.event_id;
    -- With all that the trigger fills in: it may be off.
    insert into outbox.events (xid, seq, created_at, event_id, backend_number, event_type, source, backend, data, subject, stream, data_schema, publisher_config, max_retries)
        values (pg_current_xact_id(), outbox.draw_seq(), failed.created_at, failed.event_id, (outbox.expect_backend(publish_failed.backend)).number,
            failed.event_type, failed.source, publish_failed.backend, failed.data, failed.subject,
            failed.stream, failed.data_schema, failed.publisher_config, failed.max_retries);
    return found;
end
$$;
comment on function outbox.publish_failed(outbox.failed_events, text) is 'Publishes one failed event again; false if another event with its event_id waits to be sent.';

create function outbox.retry_failed(backend text default null, event_type text default null, event_id uuid default null) returns bigint
    language plpgsql security definer set search_path = pg_catalog, pg_temp
    as $$
declare
    f record;
    retried bigint := 0;
    used_again bigint := 0;
    refused bigint := 0;
    reason text;
    one_by_one boolean := false;
begin
    perform outbox.silence_triggers();
    loop
        begin
            for f in
                select e as event, b.name as backend_name
                from outbox.failed_events e
                    join outbox.backends b on b.number = e.backend_number
                        or (b.name = e.backend and not exists (select from outbox.backends n where n.number = e.backend_number))
                where (retry_failed.backend is null or b.name = retry_failed.backend)
                    and (retry_failed.event_type is null or e.event_type = retry_failed.event_type)
                    and (retry_failed.event_id is null or e.event_id = retry_failed.event_id)
                order by e.seq
                for update of e
            loop
                if one_by_one then
                    begin
                        if outbox.publish_failed(f.event, f.backend_name) then
                            retried := retried + 1;
                        else
                            used_again := used_again + 1;
                        end if;
                    exception when data_exception or integrity_constraint_violation or program_limit_exceeded or data_corrupted
                        or index_corrupted or internal_error or plpgsql_error or undefined_object or insufficient_privilege then
                        refused := refused + 1;
                        reason := sqlerrm;
                    end;
                elsif outbox.publish_failed(f.event, f.backend_name) then
                    retried := retried + 1;
                else
                    used_again := used_again + 1;
                end if;
            end loop;
            exit;
        exception when data_exception or integrity_constraint_violation or program_limit_exceeded or data_corrupted
            or index_corrupted or internal_error or plpgsql_error or undefined_object or insufficient_privilege then
            if one_by_one then
                raise;
            end if;
            -- One of them cannot be published: it stays, and the others go on, each in a subtransaction.
            one_by_one := true;
            retried := 0;
            used_again := 0;
        end;
    end loop;
    if used_again > 0 then
        raise warning using message = format('%s failed events were not published again', used_again),
            detail = 'Other events with their event_id wait to be sent.',
            hint = 'Retry them when those have been published.';
    end if;
    if refused > 0 then
        raise warning using message = format('%s failed events were not published again', refused),
            detail = format('The last was refused: %s.', reason),
            hint = 'They stay in outbox.failed_events.';
    end if;
    return retried;
end
$$;
comment on function outbox.retry_failed(text, text, uuid) is 'Publishes failed events again, with the same event_id, in their order. Returns how many. An event stays failed if it is refused, or if another event with its event_id waits to be sent.';

create function outbox.discard_failed(backend text default null, event_type text default null, event_id uuid default null) returns bigint
    language plpgsql security definer set search_path = pg_catalog, pg_temp
    as $$
declare
    discarded bigint;
begin
    perform outbox.silence_triggers();
    delete from outbox.failed_events f
    where (discard_failed.backend is null or f.backend = discard_failed.backend)
        and (discard_failed.event_type is null or f.event_type = discard_failed.event_type)
        and (discard_failed.event_id is null or f.event_id = discard_failed.event_id);
    get diagnostics discarded = row_count;
    if discarded > 0 then
        raise log '% failed events were discarded', discarded;
    end if;
    return discarded;
end
$$;
comment on function outbox.discard_failed(text, text, uuid) is 'Deletes failed events for good: those of this backend, type and id, NULL means any. Returns how many; the server''s log has a line. See outbox.retry_failed(), which publishes them again.';

create function outbox.expect_backend(name text) returns outbox.backends
    language plpgsql stable set search_path = pg_catalog, pg_temp
    as $$
declare
    found_backend outbox.backends;
begin
    select * into found_backend from outbox.backends b where b.name = expect_backend.name;
    if not found then
        raise exception using errcode = 'undefined_object', message = format('backend "%s" does not exist', name);
    end if;
    return found_backend;
end
$$;
comment on function outbox.expect_backend(text) is 'The backend of this name; raises 42704 if there is none.';

create function outbox.guard_key(backend text, stream text) returns text
    language sql stable security definer set search_path = pg_catalog, pg_temp
    as $$
select format('outbox_relay:guard:%s:%s:%s', i.id, d.oid, b.number)
    || case when b.mode = 'cluster' then
        format(':{%s}', outbox.hash_tag(outbox.hash_slot(coalesce(guard_key.stream, b.stream_name)))) else '' end
from outbox.installation i, pg_catalog.pg_database d, outbox.expect_backend(backend) b
where d.datname = current_database()
$$;
comment on function outbox.guard_key(text, text) is 'Key of the backend''s guard in the hash slot of this stream, in a cluster. NULL means the backend''s stream_name.';

create function outbox.guard_key(backend text) returns text
    language sql stable security definer set search_path = pg_catalog, pg_temp
    as $$
select outbox.guard_key(backend, null)
$$;
comment on function outbox.guard_key(text) is 'Key of a backend''s guard in Redis: a hash that says who owns the streams, and which batch was the last. In a cluster, the guard in the hash slot of the backend''s own stream.';

create function outbox.accept_held(backend text) returns bigint
    language plpgsql security definer set search_path = pg_catalog, pg_temp
    as $$
declare
    b outbox.backends := outbox.expect_backend(backend);
    sent bigint;
    accepted bigint;
    scheduled bigint;
begin
    perform outbox.silence_triggers();
    -- What its server had sent, as far as that is known.
    delete from outbox.held_events h
        where h.backend = b.name
            and not exists (select from outbox.held_refused r where r.seq = h.seq)
            and exists (select from outbox.held_cursors c
                where c.backend_number = h.backend_number
                    and (c.slot = outbox.hash_slot(coalesce(h.stream, b.stream_name, ''))
                        or c.slot = -1 and not exists (select from outbox.held_cursors l where l.backend_number = c.backend_number and l.slot >= 0))
                    and (pg_visible_in_snapshot(h.xid, c.from_snapshot)
                        or pg_visible_in_snapshot(h.xid, c.to_snapshot) and h.seq <= c.last_seq));
    get diagnostics sent = row_count;
    with gone as (
        delete from outbox.held_events h where h.backend = b.name returning h.*
    )
    insert into outbox.events (xid, seq, created_at, event_id, backend_number, event_type, source, backend, data, subject, stream,
            data_schema, publisher_config, max_retries)
        select pg_current_xact_id(), outbox.draw_seq(), g.created_at, g.event_id, b.number, g.event_type, g.source, b.name, g.data,
            g.subject, g.stream, g.data_schema, g.publisher_config, g.max_retries
        -- Sorted last: a join (a right anti-join, since Postgres 16) need not keep the order of what it reads.
        from (select * from gone
            where not exists (select from outbox.events e where e.event_id = gone.event_id)
                and not exists (select from outbox.failed_events f where f.event_id = gone.event_id)
            order by gone.seq) g;
    get diagnostics accepted = row_count;
    if accepted > 0 then
        -- Some may stand in their streams already: they are looked for first.
        insert into outbox.restores (backend_number, xid) values (b.number, pg_current_xact_id());
    end if;
    with due as (
        delete from outbox.held_scheduled h using outbox.scheduled_events s
            where s.event_id = h.event_id and s.backend = b.name returning h.*
    )
    update outbox.scheduled_events s
        set scheduled_at = d.scheduled_at, backend_number = b.number,
            xid = case when d.scheduled_at <= clock_timestamp() then '0'::xid8 else pg_current_xact_id() end
        from due d where s.event_id = d.event_id;
    get diagnostics scheduled = row_count;
    delete from outbox.held_refused r where not exists (select from outbox.held_events h where h.seq = r.seq);
    if sent + accepted + scheduled > 0 then
        raise log using message = format('backend "%s" goes on in place of another server: %s held events are published, %s had been sent, %s are scheduled',
            b.name, accepted, sent, scheduled);
    end if;
    return sent + accepted + scheduled;
end
$$;
comment on function outbox.accept_held(text) is 'Publishes here those events of a backend that a subscription has brought and that their own server has not sent. outbox.take_over() calls it.';

create function outbox.database_made_by(out xid bigint, out is_certain boolean) returns setof record
    language c volatile
    as 'MODULE_PATHNAME', 'database_made_by_wrapper';
comment on function outbox.database_made_by() is 'The transaction that created this database. Not certain if its row of pg_database was changed since.';

create function outbox.note_copy() returns boolean
    language plpgsql security definer set search_path = pg_catalog, pg_temp
    as $$
declare
    reason constant text := 'it waited when this database was copied, and is the original''s to send';
    here oid;
    original oid;
    made_in xid8;
    is_certain boolean;
    made_at timestamptz;
    oldest xid8;
    low bigint;
begin
    perform outbox.silence_triggers();
    select d.oid into here from pg_database d where d.datname = current_database();
    select i.database into original from outbox.installation i where i.database <> here for update;
    if not found then
        return false;
    end if;
    -- What the original published has an id below that of the transaction which made this database, and what is
    -- published here one above.
    select m.xid::text::xid8, m.is_certain into made_in, is_certain from outbox.database_made_by() m;
    if not is_certain then
        -- That row has been changed, perhaps after the first event was published here: files are as old as the copy.
        select f.modification into made_at
            from pg_stat_file(regexp_replace(pg_relation_filepath('pg_catalog.pg_class'), '[^/]*$', 'PG_VERSION')) f;
        made_in := least(made_in,
            (select e.xid from outbox.events e where e.created_at > made_at order by e.xid limit 1),
            (select s.xid from outbox.scheduled_events s where s.created_at > made_at order by s.xid limit 1));
    end if;
    low := coalesce((select e.seq from outbox.events e where e.xid < made_in order by e.seq desc limit 1), 0);
    -- What is made to be copied, and has never been used, is nobody's.
    if not exists (select from pg_database d where d.oid = original and d.datistemplate)
        or exists (select from outbox.events e where e.xid < made_in)
        or exists (select from outbox.scheduled_events e where e.xid < made_in)
        or exists (select from outbox.failed_events e where e.xid < made_in)
        or exists (select from outbox.cursors c where c.published_total > 0) then
        insert into outbox.copied_backends (backend_number, original, is_database)
            select b.number, format('the database with OID %s', original), true from outbox.backends b
            on conflict (backend_number) do update
            set original = excluded.original, is_database = true, copied_at = excluded.copied_at;
    end if;

    -- What waited then is not sent from here.
    oldest := case
        when exists (select from outbox.backends b where not exists (select from outbox.cursors c where c.backend_number = b.number)) then '3'
        else (select pg_snapshot_xmin(c.from_snapshot) from outbox.cursors c
            where exists (select from outbox.backends b where b.number = c.backend_number) order by 1 limit 1)
    end;
    insert into outbox.failed_events (seq, xid, created_at, event_id, backend_number, event_type, source, backend, data, subject, stream,
            data_schema, publisher_config, max_retries, attempts, last_error)
        select e.seq, e.xid, e.created_at, e.event_id, e.backend_number, e.event_type, e.source, e.backend, e.data, e.subject, e.stream,
            e.data_schema, e.publisher_config, e.max_retries, r.attempts, reason
        from outbox.refused_events r join outbox.events e on e.seq = r.seq
        where r.accepted_in is null
        on conflict (event_id, seq) do nothing;
    insert into outbox.failed_events (seq, xid, created_at, event_id, backend_number, event_type, source, backend, data, subject, stream,
            data_schema, publisher_config, max_retries, attempts, last_error)
        select e.seq, e.xid, e.created_at, e.event_id, e.backend_number, e.event_type, e.source, e.backend, e.data, e.subject, e.stream,
            e.data_schema, e.publisher_config, e.max_retries, 0, reason
        from outbox.events e join outbox.backends b on b.number = e.backend_number
        where e.xid >= oldest and e.xid < made_in
            and not coalesce((select outbox.is_delivered(c, e.xid, e.seq) from outbox.cursors c
                where c.backend_number = e.backend_number and c.slot in (-1, outbox.hash_slot(coalesce(e.stream, b.stream_name, '')))
                order by c.slot desc limit 1), false)
        on conflict (event_id, seq) do nothing;
    with gone as (
        delete from outbox.scheduled_events s where s.xid < made_in returning s.*
    )
    insert into outbox.failed_events (seq, xid, created_at, event_id, backend_number, event_type, source, backend, data, subject, stream,
            data_schema, publisher_config, max_retries, attempts, last_error)
        select e.seq, e.xid, e.created_at, e.event_id, e.backend_number, e.event_type, e.source, e.backend, e.data, e.subject, e.stream,
            e.data_schema, e.publisher_config, e.max_retries, 0, reason
        from gone e
        on conflict (event_id, seq) do nothing;
    with gone as (
        delete from outbox.held_events returning *
    )
    insert into outbox.failed_events (seq, xid, created_at, event_id, backend_number, event_type, source, backend, data, subject, stream,
            data_schema, publisher_config, max_retries, attempts, last_error)
        select e.seq, e.xid, e.created_at, e.event_id, e.backend_number, e.event_type, e.source, e.backend, e.data, e.subject, e.stream,
            e.data_schema, e.publisher_config, e.max_retries, 0, reason
        from gone e
        on conflict (event_id, seq) do nothing;
    delete from outbox.held_scheduled;
    delete from outbox.held_cursors;
    delete from outbox.held_refused;
    delete from outbox.refused_events;
    delete from outbox.take_overs;
    delete from outbox.restores;

    -- Each reader stands where the database was made, under a guard that is yet to come.
    insert into outbox.cursors (backend_number, from_snapshot, from_next_xid, from_low_seq, from_high_seq, saved_at, state)
        select b.number, '3:3:', '3', 0, 0, clock_timestamp(), 'idle' from outbox.backends b
        on conflict (backend_number, slot) do nothing;
    update outbox.cursors c
        set from_snapshot = format('%s:%s:', made_in, made_in)::pg_snapshot, from_next_xid = made_in, from_low_seq = low, from_high_seq = low,
            to_snapshot = null, to_next_xid = null, to_low_seq = null, to_high_seq = null, last_seq = 0,
            batch_number = 0, epoch = 0, saved_at = clock_timestamp(), state = 'idle', events_per_second = 0,
            last_error = null, last_error_at = null, next_attempt_at = null, address = null
        where exists (select from outbox.backends b where b.number = c.backend_number);
    update outbox.installation set id = gen_random_uuid(), database = here;
    return true;
end
$$;
comment on function outbox.note_copy() is 'Notes that this database is a copy of another one, if it is and nobody had noted it; returns whether it did. Events that waited in the original fail here, and the copy sends nothing before outbox.take_over().';

create function outbox.take_over(backend text) returns void
    language plpgsql security definer set search_path = pg_catalog, pg_temp
    as $$
declare
    b outbox.backends := outbox.expect_backend(backend);
    copied outbox.copied_backends;
    held bigint;
begin
    perform outbox.silence_triggers();
    -- Without a worker nobody may have noticed.
    perform outbox.note_copy();
    held := outbox.accept_held(backend);
    delete from outbox.copied_backends c where c.backend_number = b.number returning c.* into copied;
    -- Of a copied database, the guard is new; without a guard, nobody is ousted.
    if copied.is_database or (b.delivery <> 'exactly_once' and (copied.backend_number is not null or held > 0)) then
        return;
    end if;
    if b.delivery <> 'exactly_once' then
        raise exception using errcode = 'object_not_in_prerequisite_state',
            message = format('backend "%s" cannot be taken over', backend),
            detail = format('Its delivery is %s, which has no owner.', b.delivery);
    end if;
    insert into outbox.take_overs (backend_number) values (b.number)
        on conflict (backend_number) do update set asked_at = excluded.asked_at, asked_of = excluded.asked_of;
end
$$;
comment on function outbox.take_over(text) is 'Makes this server the owner of the backend''s streams, whoever owns them now. A copy of a database begins to send what is published in it. A backend that halted because its guard was missing continues.';

create function outbox.set_backend_password(name text, password text) returns void
    language plpgsql security definer set search_path = pg_catalog, pg_temp
    -- A plan of its own for each password would hold it, and be logged where plans are (auto_explain).
    set plan_cache_mode = force_generic_plan
    as $$
declare
    b outbox.backends := outbox.expect_backend(name);
    before jsonb;
begin
    perform outbox.silence_triggers();
    -- What is logged of the caller's statement once it has ended shows its parameters, and auto_explain also what a
    -- plan has made of them.
    perform set_config('log_parameter_max_length', '0', true);
    if current_setting('auto_explain.log_min_duration', true) is not null then
        perform set_config('auto_explain.log_min_duration', '-1', true);
    end if;
    if password is null then
        delete from outbox.backend_passwords p where p.backend_number = b.number;
    else
        select p.destination into before from outbox.backend_passwords p
            where p.backend_number = b.number and p.destination <> outbox.destination(b);
        if found then
            raise warning using message = format('backend "%s" connects elsewhere than when its password was set', b.name),
                detail = format('It was %s, and is %s.', before, outbox.destination(b)),
                hint = 'Take the password away again if that is not where it belongs.';
        end if;
        insert into outbox.backend_passwords as p (backend_number, password, destination)
            values (b.number, outbox.seal_password(b.number, set_backend_password.password), outbox.destination(b))
            on conflict (backend_number) do update set password = excluded.password, destination = excluded.destination;
    end if;
end
$$;
comment on function outbox.set_backend_password(text, text) is 'Sets the password with which the worker logs in to the backend''s present destination. NULL removes it. It is stored sealed, nobody can read it, and dumps do not contain it. The server may log the statement that sets it; contrib/set_backend_password.sql and password_file avoid that.';

create function outbox.publisher_rights(out right_to text, out object text) returns setof record
    language sql immutable parallel safe set search_path = pg_catalog, pg_temp
    as $$
values
    ('usage', 'schema outbox'),
    ('execute', 'function outbox.publish_event(text, text, jsonb, text, text, timestamptz, integer, jsonb, text, text, uuid)'),
    ('execute', 'function outbox.publish_event(outbox.any_text, text, outbox.any_value, text, text, timestamptz, outbox.any_number, outbox.any_value, text, text, outbox.any_value)'),
    -- Called for what becomes an any_value by its text.
    ('execute', 'function outbox.any_value_in(cstring)'),
    ('execute', 'function outbox.publish_events(jsonb)'),
    ('execute', 'function outbox.published_here()'),
    ('insert (event_id, event_type, source, backend, data, subject, stream, data_schema, publisher_config, max_retries)', 'table outbox.events')
$$;
comment on function outbox.publisher_rights() is 'What outbox.grant_publisher() grants, as words of GRANT.';

create function outbox.expect_role(name text) returns regrole
    language plpgsql stable set search_path = pg_catalog, pg_temp
    as $$
declare
    found_role regrole;
begin
    if name is null then
        raise exception using errcode = 'null_value_not_allowed', message = 'role must not be null',
            detail = 'It says who may publish.', hint = 'Pass the name of a role, as pg_roles shows it.';
    end if;
    select r.oid into found_role from pg_roles r where r.rolname = expect_role.name;
    if not found then
        -- As regrole reads a name: in lower case unless it is quoted.
        begin
            found_role := to_regrole(name);
        exception when invalid_name or syntax_error then
            null;
        end;
    end if;
    if found_role is null or found_role = 0 then
        raise exception using errcode = 'undefined_object', message = format('role "%s" does not exist', name),
            detail = 'Roles are in pg_roles, with their names in upper and lower case as they were created.',
            hint = case when lower(name) = 'public' then 'Publishing is granted to a role, not to PUBLIC: create one, and grant it to whoever publishes.'
                else format('Check the name, or run CREATE ROLE %I LOGIN first.', name) end;
    end if;
    return found_role;
end
$$;
comment on function outbox.expect_role(text) is 'The role of this name, or an ERROR in words.';

create function outbox.grant_publisher(role regrole) returns void
    language plpgsql set search_path = pg_catalog, pg_temp
    as $$
declare
    r record;
    grantee text := outbox.expect_role(coalesce((select p.rolname from pg_roles p where p.oid = role), role::text))::text;
begin
    for r in select * from outbox.publisher_rights() loop
        execute format('grant %s on %s to %s', r.right_to, r.object, grantee);
    end loop;
end
$$;
comment on function outbox.grant_publisher(regrole) is 'Lets a role publish, and see what its own transaction has published; nothing else. See outbox.revoke_publisher(), and allowed_streams of outbox.backends.';

create function outbox.grant_publisher(role text) returns void
    language sql set search_path = pg_catalog, pg_temp
    as $$
select outbox.grant_publisher(outbox.expect_role(role))
$$;
comment on function outbox.grant_publisher(text) is 'The same by the role''s name, as pg_roles shows it: ''Shop-App'', or current_user.';

create function outbox.revoke_publisher(role regrole) returns void
    language plpgsql set search_path = pg_catalog, pg_temp
    as $$
declare
    r record;
    grantee text := outbox.expect_role(coalesce((select p.rolname from pg_roles p where p.oid = role), role::text))::text;
begin
    for r in select * from outbox.publisher_rights() p where p.object <> 'schema outbox' loop
        execute format('revoke %s on %s from %s', r.right_to, r.object, grantee);
    end loop;
    -- Unless the role has been granted something else in this schema.
    if not exists (
        select from pg_class c, aclexplode(c.relacl) a where c.relnamespace = 'outbox'::regnamespace and a.grantee = role::oid
        union all
        select from pg_proc p, aclexplode(p.proacl) a where p.pronamespace = 'outbox'::regnamespace and a.grantee = role::oid
        union all
        select from pg_attribute t join pg_class c on c.oid = t.attrelid, aclexplode(t.attacl) a
            where c.relnamespace = 'outbox'::regnamespace and a.grantee = role::oid) then
        execute format('revoke usage on schema outbox from %s', grantee);
    end if;
end
$$;
comment on function outbox.revoke_publisher(regrole) is 'Revokes what outbox.grant_publisher() has granted to a role. The role keeps what it has as a member of other roles.';

create function outbox.revoke_publisher(role text) returns void
    language sql set search_path = pg_catalog, pg_temp
    as $$
select outbox.revoke_publisher(outbox.expect_role(role))
$$;
comment on function outbox.revoke_publisher(text) is 'The same by the role''s name, as pg_roles shows it.';

----------------------------------------------------------------------------------------------------------------------
-- Dump: backends, and events that have not been sent. Cursors mean nothing in another cluster.
----------------------------------------------------------------------------------------------------------------------

select pg_catalog.pg_extension_config_dump('outbox.backends', '');
select pg_catalog.pg_extension_config_dump('outbox.backends_number_seq', '');
select pg_catalog.pg_extension_config_dump('outbox.events', $$
    where not coalesce((select outbox.is_delivered(c, events.xid, events.seq) from outbox.cursors c
        where c.backend_number = events.backend_number and c.slot in (-1, outbox.hash_slot(coalesce(events.stream,
            (select b.stream_name from outbox.backends b where b.number = events.backend_number), '')))
        order by c.slot desc limit 1), false)
        or exists (select from outbox.refused_events r where r.seq = events.seq and r.accepted_in is null)
    order by events.seq$$);
select pg_catalog.pg_extension_config_dump('outbox.events_seq_seq', '');
select pg_catalog.pg_extension_config_dump('outbox.scheduled_events', 'order by scheduled_at, seq');
select pg_catalog.pg_extension_config_dump('outbox.failed_events', '');

-- --------------------------------------------------------------------------------------------------------------------
-- Rows that come while triggers are off carry ids of another cluster: the worker looks for them when a trigger has been
-- touched
-- --------------------------------------------------------------------------------------------------------------------

create function outbox.trigger_state(out triggers text, out filenode oid) returns record
    language sql stable set search_path = pg_catalog, pg_temp
    as $$
select (select t.oid || ' ' || t.xmin from pg_trigger t where t.tgrelid = 'outbox.events'::regclass and t.tgname = 'complete_event'),
    pg_relation_filenode('outbox.events')
$$;
comment on function outbox.trigger_state() is 'The identity of the trigger of outbox.events, and of the table''s file. It changes whenever somebody changes the trigger or rewrites the table.';

insert into outbox.known_triggers (triggers, filenode, snapshot, next_xid, low_seq, high_seq)
    select s.triggers, s.filenode, format('%s:%s:', x, x)::pg_snapshot, x, 0, 0
    from outbox.trigger_state() s, pg_snapshot_xmin(pg_current_snapshot()) as x;

----------------------------------------------------------------------------------------------------------------------
-- Privileges: PUBLIC has nothing, pg_monitor may look
----------------------------------------------------------------------------------------------------------------------

revoke all on schema outbox from public;
revoke all on all tables in schema outbox from public;
revoke all on all functions in schema outbox from public;
revoke all on all procedures in schema outbox from public;
revoke all on type outbox.any_text, outbox.any_value, outbox.any_number from public;
grant usage on schema outbox to pg_monitor;
grant select on outbox.status, outbox.backend_status, outbox.event_status, outbox.top, outbox.metrics to pg_monitor;
grant execute on function outbox.worker_status(), outbox.backlog(integer), outbox.is_delivered(outbox.cursors, xid8, bigint), outbox.hash_slot(text), outbox.health(interval), outbox.drain(interval) to pg_monitor;

----------------------------------------------------------------------------------------------------------------------
-- A worker is to come once this is committed, by whatever statement the extension was created
----------------------------------------------------------------------------------------------------------------------

create function outbox.announce_extension() returns void language c as 'MODULE_PATHNAME', 'announce_extension_wrapper';
select outbox.announce_extension();
drop function outbox.announce_extension();
