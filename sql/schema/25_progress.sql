-- How far each backend has come: cursors, ticks, and what distinguishes an installation from its copies.

create table outbox.cursors (
    backend_number    integer not null,
    -- In a cluster, the hash slot of a lane. -1: the position of the whole backend; in a cluster, what its finder has
    -- read for slots without a lane.
    slot              integer not null default -1 check (slot between -1 and 16383),
    -- Everything that from_snapshot sees is delivered. Of what to_snapshot sees, the rows up to last_seq are delivered.
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
    -- How many times its guard was claimed. It is the upper part of batch numbers, so that none is ever given twice.
    epoch             bigint not null default 0,
    saved_at          timestamptz not null,
    state             text not null,
    published_total   bigint not null default 0,
    failed_total      bigint not null default 0,
    events_per_second real not null default 0,
    last_published_at timestamptz,
    last_error        text,
    -- What helps against it.
    last_hint         text,
    last_error_at     timestamptz,
    next_attempt_at   timestamptz,
    healings          bigint not null default 0,
    address           text,
    primary key (backend_number, slot)
) with (fillfactor = 20, autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 500);
comment on table outbox.cursors is 'How far each backend has come, or in a cluster each of its lanes. Saved 250 ms after the last change, and at the latest after a second. A row outlives its backend until the transactions have ended that were open when the backend was deleted, because they may still commit events. Row 0 stands for events whose backend is unknown or was deleted earlier.';

create table outbox.former_lanes (
    like outbox.cursors,
    -- Set if an administrator has told the backend to take over since, and this lane has not done that yet. As in
    -- outbox.take_overs.
    take_over_of      text,
    primary key (backend_number, slot)
);
comment on table outbox.former_lanes is 'Where lanes of a cluster''s backend stood that were given up because other hash slots needed one. A lane goes on from there when the next event for its hash slot comes.';

create function outbox.hash_slot(stream text) returns integer
    language c immutable strict parallel safe
    as 'MODULE_PATHNAME', 'hash_slot';
comment on function outbox.hash_slot(text) is 'Hash slot of a stream in a Redis Cluster, as CLUSTER KEYSLOT returns it.';

create function outbox.hash_tag(slot integer) returns text
    language c immutable strict parallel safe
    as 'MODULE_PATHNAME', 'hash_tag_wrapper';
comment on function outbox.hash_tag(integer) is 'A short hash tag for a hash slot: a key with this tag in braces is in that slot. NULL if there is no such slot.';

create table outbox.ticks (
    backend_number integer not null,
    reached_at     timestamptz not null,
    snapshot       pg_snapshot not null,
    next_xid       xid8 not null,
    low_seq        bigint not null,
    high_seq       bigint not null,
    primary key (backend_number, reached_at)
);
comment on table outbox.ticks is 'Times at which a backend had delivered everything that a snapshot sees. Retention relies on them. What a backend''s oldest tick sees has been purged.';

create table outbox.installation (
    id       uuid not null default pg_catalog.gen_random_uuid(),
    database oid not null,
    common_stream text not null default 'events',
    deleted_backends int4multirange not null default '{}'
);
insert into outbox.installation (database)
select d.oid from pg_catalog.pg_database d where d.datname = current_database();
comment on table outbox.installation is 'The id of this installation, which is part of its guards'' keys. CREATE EXTENSION generates it; dumps do not contain it.';
comment on column outbox.installation.database is 'The database that the installation belongs to. If that is another database, the current one was copied from it (CREATE DATABASE ... TEMPLATE). pg_upgrade keeps it.';
comment on column outbox.installation.deleted_backends is 'Numbers of deleted backends that no longer have a cursor. If a backend with such a number is inserted, as a restore does, it continues from cursor 0.';
comment on column outbox.installation.common_stream is 'The last value of outbox_relay.redis_stream_name that the worker has seen and that was not a template.';

create function outbox.common_stream() returns text
    language plpgsql stable security definer set search_path = pg_catalog, pg_temp
    as $$
begin
    -- PL/pgSQL, because it caches the plan, which an SQL function does not.
    if current_setting('outbox_relay.redis_stream_name', true) ~ '[{}]' then
        return (select i.common_stream from outbox.installation i);
    end if;
    return current_setting('outbox_relay.redis_stream_name', true);
end
$$;
comment on function outbox.common_stream() is 'The stream of events whose rows name none, for backends without a stream of their own: outbox_relay.redis_stream_name, or its last value before it became a template.';

create table outbox.incarnations (
    number             integer generated always as identity primary key,
    incarnation        uuid not null unique,
    lineage            text not null,
    timeline           bigint not null,
    started_at         timestamptz not null default clock_timestamp(),
    previous_ended_lsn pg_lsn not null,
    first_xid          xid8 not null,
    place              text not null
);
comment on table outbox.incarnations is 'The runs of this server that used guards. Guards name them. Each is saved before it claims a guard, so a copy of the database knows only those from before the copy.';
comment on column outbox.incarnations.lineage is 'Which initdb made the data directory. A copy keeps it, also if pg_createsubscriber has given it another system identifier; pg_upgrade changes it.';
comment on column outbox.incarnations.place is 'Host and data directory of the server. A run in another place belongs to a copy, unless the server was promoted there.';
comment on column outbox.incarnations.first_xid is 'The lowest transaction id of this run. If it is lower than the ids in a guard of the previous run, WAL was lost and ids are being used again.';
comment on column outbox.incarnations.previous_ended_lsn is 'Where the WAL of the previous run ended, as far as this server has it.';

create function outbox.here() returns text
    language c stable
    as 'MODULE_PATHNAME', 'here_wrapper';
comment on function outbox.here() is 'Timeline and data directory of this server. A request to take over is valid only on the server where it was made.';

create table outbox.take_overs (
    backend_number integer primary key,
    asked_at       timestamptz not null default clock_timestamp(),
    -- Bound to the present timeline and directory, so that it does not apply to a promoted standby or a copy.
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
comment on table outbox.restores is 'Transactions that restored events from a dump. Some of these events may have been sent since the dump was taken, so the worker looks for them in the streams first.';
comment on column outbox.restores.is_looked_for is 'The worker has looked for these events. The latest row of each backend is kept: if Redis loses entries, the worker looks again.';

create table outbox.replays (
    number         bigint generated always as identity primary key,
    backend_number integer not null,
    xid            xid8 not null,
    first_seq      bigint not null,
    last_seq       bigint not null,
    events         bigint not null,
    replayed_at    timestamptz not null default clock_timestamp()
);
comment on table outbox.replays is 'Calls of outbox.replay() whose events are still kept. The events have this xid and these numbers. When the worker looks for events in the streams, it does not mistake the first entry of such an event for the second.';

-- Without a SET search_path, so that it can be inlined.
create function outbox.is_delivered(c outbox.cursors, xid xid8, seq bigint) returns boolean
    language sql immutable parallel safe
    as $$
select coalesce(pg_catalog.pg_visible_in_snapshot(xid, c.from_snapshot)
    or (pg_catalog.pg_visible_in_snapshot(xid, c.to_snapshot) and seq operator(pg_catalog.<=) c.last_seq), false)
$$;
comment on function outbox.is_delivered(outbox.cursors, xid8, bigint) is 'Whether an event with this xid and seq lies behind a cursor.';
