-- Backends: named Redis destinations, and their passwords.

create table outbox.backends (
    name            text primary key check (length(name) between 1 and 63),
    number          integer generated always as identity unique check (number > 0),
    enabled         boolean not null default true,
    mode            text not null default 'standalone' check (mode in ('standalone', 'sentinel', 'cluster')),
    host            text check (host <> ''),
    port            integer check (port between 1 and 65535),
    db              integer check (db between 0 and 65535),
    username        text check (username <> ''),
    stream_name     text check (stream_name <> '' and not starts_with(stream_name, 'outbox_relay:')),
    own_stream      text check (not starts_with(own_stream, 'outbox_relay:')),
    max_len         bigint check (max_len >= 0),
    trim            text not null default 'length' check (trim in ('length', 'read')),
    trim_ignore_idle interval check (trim_ignore_idle > interval '0'),
    connect_timeout interval check (connect_timeout > interval '0' and connect_timeout <= interval '1 hour'),
    socket_timeout  interval check (socket_timeout > interval '0' and socket_timeout <= interval '1 hour'),
    unix_socket     text check (unix_socket like '/%'),
    nodes           text[] check (cardinality(nodes) between 1 and 32 and array_position(nodes, null) is null),
    sentinel_master text check (sentinel_master <> ''),
    password_file   text check (password_file like '/%'),
    allowed_streams text[] not null default '{*}' check (array_position(allowed_streams, null) is null),
    format          text not null default 'broadcaster' check (format in ('broadcaster', 'cloudevents', 'structured', 'debezium')),
    -- Strict mode: an array must not be treated as a list of its elements. It uses none of our functions, because every
    -- role that writes a row would need EXECUTE on it.
    static_fields   jsonb check (jsonb_typeof(static_fields) = 'object' and not jsonb_path_exists(static_fields,
        'strict $.* ? (@.type() != "string" && @.type() != "number" && @.type() != "boolean")', silent => true)),
    include_lsn     boolean not null default false,
    delivery        text not null default 'exactly_once' check (delivery in ('exactly_once', 'at_least_once')),
    on_missing_guard text not null default 'continue' check (on_missing_guard in ('continue', 'halt', 'replay')),
    wait_replicas   integer not null default 0 check (wait_replicas between 0 and 100),
    max_rate        integer check (max_rate > 0),
    tls             boolean not null default false,
    tls_ca_file     text check (tls_ca_file like '/%'),
    tls_cert_file   text check (tls_cert_file like '/%'),
    tls_key_file    text check (tls_key_file like '/%'),
    tls_insecure    boolean not null default false,
    constraint backends_static_fields_of_format check (static_fields is null or not static_fields ?| case format
        when 'broadcaster' then array['event_id', 'event_type', 'source', 'timestamp', 'cloud_event']
        when 'cloudevents' then array['ce_specversion', 'ce_id', 'ce_type', 'ce_source', 'ce_time', 'ce_subject', 'ce_dataschema', 'ce_traceparent', 'ce_tracestate', 'content-type', 'data']
        when 'structured' then array['cloud_event']
        else array['key', 'value'] end),
    constraint backends_static_fields_of_lsn check (not include_lsn or not coalesce(static_fields ? case format
        when 'broadcaster' then 'lsn' when 'cloudevents' then 'ce_lsn' end, false)),
    -- The worker and each publisher's session hold the rows in memory.
    constraint backends_size check (octet_length(concat(host, username, stream_name, own_stream, unix_socket, nodes, sentinel_master, password_file,
        allowed_streams, static_fields, tls_ca_file, tls_cert_file, tls_key_file)) <= 65536),
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
comment on column outbox.backends.mode is 'standalone: one Redis, at host and port or unix_socket. sentinel: the primary that the sentinels name. cluster: streams are spread by hash slot.';
comment on column outbox.backends.host is 'Name or address of the Redis server (standalone).';
comment on column outbox.backends.port is 'Port of the Redis server (standalone), 1 to 65535.';
comment on column outbox.backends.db is 'Number of the Redis database; a cluster has only database 0.';
comment on column outbox.backends.username is 'Redis user (ACL).';
comment on column outbox.backends.stream_name is 'The stream of events that name no stream. Or a template of streams, with the placeholders {event_type}, {source}, {subject} and {database}: each event''s stream is decided when it is published. {subject|16} is a hash of the subject, from 0 to 15: see outbox.stream_part(). {{ and }} are braces of the name itself.';
comment on column outbox.backends.own_stream is 'The stream of events whose rows name none: stream_name; or, if that is a template, its last value before, so that earlier events keep their stream. The trigger fills it in. In a cluster it decides the hash slot of these events and cannot be changed.';
comment on column outbox.backends.max_len is 'Approximate length to which each stream is trimmed (MAXLEN ~); 0: unlimited. With trim = ''read'', the length at which the backend waits.';
comment on column outbox.backends.trim is 'length: each stream is trimmed to max_len. read: a stream is trimmed only as far as all of its consumer groups have acknowledged; when it has max_len entries, the backend waits, in state full.';
comment on column outbox.backends.trim_ignore_idle is 'With trim = ''read'': a consumer group that has been silent for longer does not hold trimming; a WARNING in the log names it. NULL: every group does.';
comment on column outbox.backends.connect_timeout is 'How long connecting and logging in may take, at most an hour.';
comment on column outbox.backends.socket_timeout is 'How long each write and each reply may take, at most an hour.';
comment on column outbox.backends.unix_socket is 'Path of a unix socket, instead of host and port.';
comment on column outbox.backends.nodes is 'The sentinels, or some nodes of the cluster, as host:port (an IPv6 address in brackets), in the order in which the relay asks them. NULL if mode is standalone.';
comment on column outbox.backends.sentinel_master is 'The name by which the sentinels know the primary; NULL unless mode is sentinel.';
comment on column outbox.backends.password_file is 'A file that the server reads at each connect; its first line is the password. Nobody else may read it: 0600, or 0640 if root owns it. Needs the rights of pg_read_server_files.';
comment on column outbox.backends.allowed_streams is 'Glob patterns (* and ?). A publisher''s stream must match one of them. With {*}, a publisher may append to any stream of that Redis, which is then trimmed to max_len.';
comment on column outbox.backends.format is 'How an entry is laid out. broadcaster: as django-broadcaster writes it. cloudevents: a field ce_* for each attribute, and data (binary mode). structured: one field cloud_event, a JSON object. debezium: key and value, the envelope of a change.';
comment on column outbox.backends.static_fields is 'Further fields of each entry: an object of strings, numbers and booleans. If an event''s publisher_config has a field of the same name, that one is used.';
comment on column outbox.backends.include_lsn is 'Each entry contains a position in the WAL. A standby that has replayed up to this position shows what the event''s transaction has written, so a consumer can read a standby when pg_last_wal_replay_lsn() has reached it. A field lsn (broadcaster) or ce_lsn (cloudevents), an attribute lsn of the JSON object (structured), or the number source.lsn (debezium).';
comment on column outbox.backends.delivery is 'exactly_once: each batch is one Redis transaction together with the guard, see outbox.guard_key(). at_least_once: plain commands; a crash may repeat what was sent since the cursor was last saved.';
comment on column outbox.backends.on_missing_guard is 'What to do when Redis has lost everything, including the guard. continue: send what was not sent yet. halt: wait for outbox.take_over(). replay: send all retained events again.';
comment on column outbox.backends.wait_replicas is 'Replicas of Redis that must acknowledge a batch (WAIT) before it counts as delivered, 0 to 100.';
comment on column outbox.backends.max_rate is 'Maximum number of events sent per second, so that a draining backlog does not overload the consumers; NULL: unlimited. Events that are sent again count too. The lanes of a cluster share it.';
comment on column outbox.backends.tls is 'Connects by TLS. A trusted authority must have issued the server''s certificate, and the certificate must name the host.';
comment on column outbox.backends.tls_ca_file is 'PEM file of the trusted authorities; NULL: those of the operating system. Read at each connect, like the other files; needs the rights of pg_read_server_files.';
comment on column outbox.backends.tls_cert_file is 'PEM file of the certificate (and its chain) that is shown to the server. Needs the rights of pg_read_server_files.';
comment on column outbox.backends.tls_key_file is 'PEM file of the key of tls_cert_file, not encrypted. Nobody else may read it: 0600, or 0640 if root owns it. Needs the rights of pg_read_server_files.';
comment on column outbox.backends.tls_insecure is 'Accepts any certificate. Use it for experiments only.';

create function outbox.expect_backend_name(name text) returns void
    -- Its caller may not be allowed to read outbox.backends.
    language plpgsql stable security definer set search_path = pg_catalog, pg_temp
    as $$
begin
    if name is null then
        raise exception using errcode = 'null_value_not_allowed', message = 'backend must not be null',
            hint = 'Names of backends are in outbox.backends.';
    end if;
    if not exists (select from outbox.backends b where b.name = expect_backend_name.name) then
        raise exception using errcode = 'undefined_object', message = format('backend "%s" does not exist', name),
            detail = 'Backends are the rows of outbox.backends.', hint = 'Check the name, or create the backend first.';
    end if;
end
$$;
comment on function outbox.expect_backend_name(text) is 'Raises an ERROR with an explanation if there is no backend of this name.';

create function outbox.destination(backend outbox.backends) returns jsonb
    language sql stable parallel safe set search_path = pg_catalog, pg_temp
    as $$
select jsonb_strip_nulls(jsonb_build_object('mode', backend.mode, 'host', backend.host, 'port', backend.port, 'unix_socket', backend.unix_socket,
    'nodes', backend.nodes, 'sentinel_master', backend.sentinel_master, 'username', backend.username, 'tls', backend.tls,
    'tls_insecure', backend.tls_insecure, 'tls_ca_file', backend.tls_ca_file, 'tls_cert_file', backend.tls_cert_file,
    'tls_key_file', backend.tls_key_file))
$$;
comment on function outbox.destination(outbox.backends) is 'Where and how a backend connects. A secret that was set for one destination is not sent to another.';

-- The key of passwords is an option of a user mapping, because catalogs are not dumped and not decoded from the WAL.
create foreign data wrapper outbox_relay;
comment on foreign data wrapper outbox_relay is 'Has no handler and reads no tables. It exists for the server outbox_relay.';
create server outbox_relay foreign data wrapper outbox_relay;
comment on server outbox_relay is 'Its user mapping for PUBLIC holds the key that seals outbox.backend_passwords. The mapping is created when the first password is set.';

create function outbox.seal_password(backend_number integer, password text) returns bytea
    language c volatile strict
    as 'MODULE_PATHNAME', 'seal_password';
comment on function outbox.seal_password(integer, text) is 'Seals a password as it is stored in outbox.backend_passwords, and makes the key if there is none. Needs the rights of the owner of server outbox_relay.';

create table outbox.backend_passwords (
    backend_number integer primary key,
    password       bytea not null,
    destination    jsonb not null
);
-- Row security without a policy: even pg_read_all_data sees no row. It does not bind the owner and other superusers.
alter table outbox.backend_passwords enable row level security;
-- ANALYZE would copy passwords into pg_statistic, which pg_read_all_data can read.
alter table outbox.backend_passwords alter column password set statistics 0;
comment on table outbox.backend_passwords is 'Passwords set by outbox.set_backend_password(); only the worker reads them, and dumps never contain them.';
comment on column outbox.backend_passwords.password is 'Sealed for this backend, with AES-256-GCM and the key of server outbox_relay.';
comment on column outbox.backend_passwords.destination is 'The destination that the password was set for, see outbox.destination(). With another destination the backend is misconfigured.';

create table outbox.moved_backends (
    backend_number integer primary key,
    destination    jsonb not null
);
alter table outbox.moved_backends enable row level security;
comment on table outbox.moved_backends is 'Backends whose destination was changed by a role that may not read the server''s files, with the previous destination; {} if that role has created the backend. A backend''s password file is used only for the destination recorded here. The password file of the settings is used only if a backend that is not in this table uses it in the same way.';
