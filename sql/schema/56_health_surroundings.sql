-- Parts of outbox.health() that are about what surrounds the relay: locks of others, settings, standbys, autovacuum.

create function outbox.worker_silence() returns double precision
    language c volatile
    as 'MODULE_PATHNAME', 'worker_silence_wrapper';
comment on function outbox.worker_silence() is 'Part of outbox.health(): for how many seconds this database''s worker has given no sign of life since it was asked for one. NULL: it has given one, or there is no worker.';

create function outbox.error_hint(error text) returns text
    language c immutable strict
    as 'MODULE_PATHNAME', 'error_hint_wrapper';
comment on function outbox.error_hint(text) is 'Part of outbox.health(): what helps against an error with which Redis has refused an event. NULL: that is not known.';

-- Finds the session that has locked a table for longer than "old" in a way that keeps out publishers or readers.
create function outbox.lock_health(old interval, out "check" text, out status text, out detail text, out hint text) returns setof record
    language plpgsql volatile set search_path = pg_catalog, pg_temp
    as $$
#variable_conflict use_column
begin
    return query
with
locks as (
    select l.pid, l.virtualtransaction, c.relname, l.mode
    from pg_locks l join pg_class c on c.oid = l.relation and c.relkind = 'r' and c.relnamespace = 'outbox'::regnamespace
    where l.granted and l.mode in ('ShareLock', 'ShareRowExclusiveLock', 'ExclusiveLock', 'AccessExclusiveLock')
        and l.database = (select d.oid from pg_database d where d.datname = current_database()) and l.pid is distinct from pg_backend_pid()
),
holders as (
    select l.relname, l.mode, format('Process %s', l.pid) as who, a.xact_start as since, ' Its last query: ' || nullif(left(a.query, 100), '') as query,
        format('If that session is not in use, run SELECT pg_terminate_backend(%s);', l.pid) as cure
    from locks l join pg_stat_activity a on a.pid = l.pid
    where a.backend_type <> 'outbox_relay worker'
    union all
    select l.relname, l.mode, format('The prepared transaction %L', x.gid), x.prepared, null,
        format('Run COMMIT PREPARED %L; or ROLLBACK PREPARED %L;', x.gid, x.gid)
    from locks l join pg_locks t on t.virtualtransaction = l.virtualtransaction and t.locktype = 'transactionid' and t.pid is null
        join pg_prepared_xacts x on x.transaction = t.transactionid
    where l.pid is null
),
oldest as (
    -- Since when is not known with track_activities = off. Then somebody must have waited for it.
    select h.* from holders h where h.since < clock_timestamp() - old or h.since is null and old = '0'
    order by h.since, h.mode = 'AccessExclusiveLock' desc, h.relname = 'events' desc, h.relname limit 1
)
select 'locks', case when count(o) > 0 then 'fail' else 'ok' end,
    coalesce(min(format('%s has held %s on outbox.%s%s: %s.%s', o.who, o.mode, o.relname, ' since ' || o.since,
            case o.mode when 'AccessExclusiveLock' then 'nobody can read or write it' else 'nobody else can write it' end, o.query)),
        'No table has been locked for long.'),
    min(o.cure)
from oldest o;
end
$$;
comment on function outbox.lock_health(interval) is 'Part of outbox.health(): which session has locked a table so that nobody else can publish or read.';

-- As Postgres reads it, and keeps it as it was written: case does not matter, and a beginning is enough.
create function outbox.is_off(value text) returns boolean
    language sql immutable set search_path = pg_catalog, pg_temp
    as $$
select lower(btrim(is_off.value)) in ('f', 'fa', 'fal', 'fals', 'false', 'n', 'no', 'of', 'off', '0')
$$;
comment on function outbox.is_off(text) is 'Part of outbox.health(): whether the value of a boolean setting means off.';

create function outbox.setting_health(out "check" text, out status text, out detail text, out hint text) returns setof record
    language plpgsql volatile set search_path = pg_catalog, pg_temp
    as $$
#variable_conflict use_column
begin
    return query
with
-- The setting of this session, and those of roles and databases. ('' means unset: outbox.backends decides.)
named as (
    select current_setting('outbox_relay.default_backend', true) as backend, 'outbox_relay.default_backend' as what, null as of, 1 as n
    union all
    select substr(s.setting, strpos(s.setting, '=') + 1),
        concat_ws(' ', 'outbox_relay.default_backend of', 'role ' || quote_ident(r.rolname), 'in', 'database ' || quote_ident(d.datname)),
        concat_ws(' ', 'ROLE ' || quote_ident(r.rolname), case when r.rolname is not null and d.datname is not null then 'IN' end,
            'DATABASE ' || quote_ident(d.datname)), 2
    from (select c.setrole, c.setdatabase, unnest(c.setconfig) as setting from pg_db_role_setting c) s
        left join pg_roles r on r.oid = s.setrole left join pg_database d on d.oid = s.setdatabase
    where s.setting like 'outbox_relay.default_backend=%' and (d.datname is null or d.datname = current_database())
),
wrong as (
    select n.* from named n where n.backend <> '' and not exists (select from outbox.backends b where b.name = n.backend)
),
-- Where each backend's own stream is, and how it is trimmed. What a template gives is not known here.
trimming as (
    select b.number, b.name, b.trim, coalesce(b.max_len, current_setting('outbox_relay.redis_max_len', true)::bigint, 10000) as max_len,
        coalesce(b.own_stream, outbox.common_stream()) as stream,
        case b.mode when 'standalone' then jsonb_build_array(
                coalesce(b.unix_socket, coalesce(b.host, current_setting('outbox_relay.redis_host', true))),
                case when b.unix_socket is null then coalesce(b.port, current_setting('outbox_relay.redis_port', true)::integer) end)
            else jsonb_build_array((select array_agg(n order by n) from unnest(b.nodes) n), b.sentinel_master) end as place,
        case when b.mode <> 'cluster' then coalesce(b.db, current_setting('outbox_relay.redis_db', true)::integer, 0) end as db
    from outbox.backends b where b.enabled and coalesce(b.stream_name, current_setting('outbox_relay.redis_stream_name', true), '') !~ '[{}]'
),
-- The first of those that share a stream, and one that trims it otherwise.
contrary as (
    select a.name, a.trim, a.max_len, a.stream, min(o.name) as other
    from trimming a join trimming o on o.stream = a.stream and o.place = a.place and o.db is not distinct from a.db and o.number > a.number
    where (o.trim, o.max_len) <> (a.trim, a.max_len)
        and not exists (select from trimming f where f.stream = a.stream and f.place = a.place and f.db is not distinct from a.db and f.number < a.number)
    group by a.name, a.trim, a.max_len, a.stream
    order by a.name limit 3
)
select 'default backend', case when count(w) > 0 then 'fail' else 'ok' end,
    coalesce(string_agg(distinct format('%s is "%s", but there is no such backend: publishing without a backend fails.', w.what, w.backend), ' '),
        'The default backend exists.'),
    case when count(w) > 0 then coalesce('Run ' || string_agg(distinct case
        -- Resetting it would lead to a backend that is missing, too.
        when not exists (select from outbox.backends b where b.name = 'default') then format('INSERT INTO outbox.backends (name) VALUES (%L);', w.backend)
        when w.n = 2 then format('ALTER %s RESET outbox_relay.default_backend;', w.of)
        else (select case
                when p.source = 'session' then 'RESET outbox_relay.default_backend;'
                when p.source = 'client' then 'SET outbox_relay.default_backend = ''default'';'
                -- That of its role or database has a cure of its own.
                when p.source not in ('user', 'database', 'database user')
                    then 'ALTER SYSTEM RESET outbox_relay.default_backend; SELECT pg_reload_conf();' end
            from pg_settings p where p.name = 'outbox_relay.default_backend') end, ' '),
        'Connect anew: the setting was changed since this session began.') end
from wrong w
union all
select 'shared streams', case when count(c) > 0 then 'warn' else 'ok' end,
    coalesce(string_agg(format('The backends "%s" and "%s" write to the stream "%s" of one Redis, and trim it differently: what one of them keeps, the other removes.',
        c.name, c.other, c.stream), ' ' order by c.name), 'No backends share a stream and trim it differently.'),
    'Run ' || string_agg(format('UPDATE outbox.backends SET trim = %L, max_len = %s WHERE name IN (%L, %L);', c.trim, c.max_len, c.name, c.other), ' ' order by c.name)
from contrary c
union all
select 'autovacuum', case when count(f) > 0 then 'warn' else 'ok' end,
    coalesce(string_agg(f.fault, ' ' order by f.fault), 'Autovacuum is enabled for the tables.'), 'Run ' || string_agg(f.cure, ' ' order by f.fault)
from (
    select 'autovacuum is off: dead rows are never removed.' as fault, 'ALTER SYSTEM SET autovacuum = on; SELECT pg_reload_conf();' as cure
    where current_setting('autovacuum') = 'off'
    union all
    select 'track_counts is off, so autovacuum does nothing.', 'ALTER SYSTEM SET track_counts = on; SELECT pg_reload_conf();'
    where current_setting('autovacuum') = 'on' and current_setting('track_counts') = 'off'
    union all
    select format('autovacuum_enabled of outbox.%s is false.', c.relname), format('ALTER TABLE outbox.%I RESET (autovacuum_enabled);', c.relname)
    from (values ('events'), ('scheduled_events'), ('refused_events'), ('failed_events'), ('cursors'), ('ticks'), ('inbox'), ('consumer_groups')) t (name)
        join pg_class c on c.relname = t.name and c.relnamespace = 'outbox'::regnamespace cross join lateral pg_options_to_table(c.reloptions) o
    where o.option_name = 'autovacuum_enabled' and outbox.is_off(o.option_value)
) f
union all
select 'activity', case when count(f) > 0 then 'warn' else 'ok' end,
    coalesce(string_agg(format('%s: transactions that hold events back cannot be seen.', f.fault), ' ' order by f.fault), 'Activities are tracked.'),
    'Run ' || string_agg(f.cure, ' ' order by f.fault)
from (
    select 'track_activities is off' as fault, 'ALTER SYSTEM SET track_activities = on; SELECT pg_reload_conf();' as cure
    -- Not asked otherwise: reading all settings takes half a millisecond.
    where case when current_setting('track_activities') = 'off' then
        exists (select from pg_settings s where s.name = 'track_activities' and s.source in ('configuration file', 'command line')) end
    union all
    select concat_ws(' ', 'track_activities is off for', 'role ' || quote_ident(r.rolname),
            case when r.rolname is not null and d.datname is not null then 'in' end, 'database ' || quote_ident(d.datname)),
        format('ALTER %s RESET track_activities;', concat_ws(' ', 'ROLE ' || quote_ident(r.rolname),
            case when r.rolname is not null and d.datname is not null then 'IN' end, 'DATABASE ' || quote_ident(d.datname)))
    from (select c.setrole, c.setdatabase, unnest(c.setconfig) as setting from pg_db_role_setting c) s
        left join pg_roles r on r.oid = s.setrole left join pg_database d on d.oid = s.setdatabase
    where starts_with(s.setting, 'track_activities=') and outbox.is_off(split_part(s.setting, '=', 2))
        and (d.datname is null or d.datname = current_database())
) f
union all
-- Its id is part of the guards' names. Nothing is sent without one.
select 'installation', case when n.count <> 1 then 'fail' else 'ok' end,
    case when n.count = 1 then 'The installation has its id.' when n.count = 0 then 'outbox.installation is empty: the worker cannot begin.'
        else format('outbox.installation has %s rows instead of one.', n.count) end,
    case when n.count = 0 then 'Run INSERT INTO outbox.installation (database) SELECT oid FROM pg_database WHERE datname = current_database();'
        when n.count > 1 then 'Delete those whose ids are not in the names of the guards in Redis (outbox_relay:guard:ID:...).' end
from (select count(*) as count from outbox.installation) n
union all
select 'read-only sessions', case when count(f) > 0 then 'warn' else 'ok' end,
    coalesce(string_agg(f.fault || ': publishing fails.', ' ' order by f.fault), 'Those who publish may write.'),
    -- This session may be read-only, too.
    'Run ' || nullif(concat_ws(' ', string_agg(f.cure, ' ') filter (where f.is_server),
        'BEGIN READ WRITE; ' || string_agg(f.cure, ' ' order by f.fault) filter (where not f.is_server) || ' COMMIT;'), '')
from (
    select 'default_transaction_read_only is on' as fault, true as is_server, 'ALTER SYSTEM SET default_transaction_read_only = off; SELECT pg_reload_conf();' as cure
    where case when current_setting('default_transaction_read_only') = 'on' then
        exists (select from pg_settings s where s.name = 'default_transaction_read_only' and s.source in ('configuration file', 'command line')) end
    union all
    select concat_ws(' ', 'default_transaction_read_only is on for', 'role ' || quote_ident(r.rolname),
            case when r.rolname is not null and d.datname is not null then 'in' end, 'database ' || quote_ident(d.datname)), false,
        format('ALTER %s RESET default_transaction_read_only;', concat_ws(' ', 'ROLE ' || quote_ident(r.rolname),
            case when r.rolname is not null and d.datname is not null then 'IN' end, 'DATABASE ' || quote_ident(d.datname)))
    from (select c.setrole, c.setdatabase, unnest(c.setconfig) as setting from pg_db_role_setting c) s
        left join pg_roles r on r.oid = s.setrole left join pg_database d on d.oid = s.setdatabase
    where starts_with(s.setting, 'default_transaction_read_only=') and not outbox.is_off(split_part(s.setting, '=', 2))
        and (d.datname is null or d.datname = current_database())
        -- Others do not publish.
        and (r.oid is null or not r.rolsuper and has_column_privilege(r.oid, 'outbox.events', 'event_type', 'insert'))
) f
union all
select 'synchronous standbys', case when s.waiting > 0 or n.is_missing then 'fail' else 'ok' end,
    case
        when s.waiting > 0 then format('%s sessions wait, since %s, until a synchronous standby has their commits: what they publish is sent after that.', s.waiting, s.since)
        when n.is_missing then 'No synchronous standby is connected: commits wait for one.'
        else 'No commit waits for a standby.' end,
    case when s.waiting > 0 or n.is_missing then format('Start the standby (synchronous_standby_names is %L). If it does not come back, run ALTER SYSTEM SET synchronous_standby_names = ''''; SELECT pg_reload_conf();',
        current_setting('synchronous_standby_names')) end
from (select count(*) as waiting, min(a.query_start) as since from pg_stat_activity a
        where a.wait_event = 'SyncRep' and a.query_start < clock_timestamp() - interval '3 s') s,
    (select current_setting('synchronous_standby_names') <> '' and (current_setting('synchronous_commit') not in ('off', 'local')
            or current_setting('outbox_relay.send_after', true) = 'standby_flush') and not pg_is_in_recovery()
        and not exists (select from pg_stat_replication r where r.sync_state in ('sync', 'quorum')) as is_missing) n
union all
select 'configuration files', case when count(f) > 0 then 'warn' else 'ok' end,
    coalesce(string_agg(format('%s, line %s%s: %s.', f.sourcefile, f.sourceline, ' (' || f.name || ')', f.error), ' ' order by f.seqno), 'They can be read.'),
    case when count(f) > 0 then 'Correct that line in the file, then run SELECT pg_reload_conf(); Until then the server keeps what it had.' end
from pg_file_settings f
where f.error is not null and (f.name is null or starts_with(f.name, 'outbox_relay.') or f.error like 'unrecognized%')
union all
select 'transaction ids', case when d.age > 2000000000 then 'fail' when d.age > 1600000000 then 'warn' else 'ok' end,
    case when d.age > 1600000000 then format('The oldest transaction id of this database is %s transactions old: at 2,144 million nobody can write any more.', d.age)
        else 'The oldest transaction id of this database is young enough.' end,
    case when d.age > 1600000000 then 'End old transactions, prepared ones and replication slots that hold it, then run VACUUM (FREEZE);' end
from (select age(d.datfrozenxid) as age from pg_database d where d.datname = current_database()) d;
end
$$;
comment on function outbox.setting_health() is 'Part of outbox.health(): what of the server and its settings keeps events back.';
