-- Health: what is well, what is not, and what helps.
--
-- In PL/pgSQL, which keeps the plans: planning takes longer than what is planned. A probe comes each few seconds.

create function outbox.worker_health(out "check" text, out status text, out detail text, out hint text) returns setof record
    language plpgsql volatile set search_path = pg_catalog, pg_temp
    as $$
#variable_conflict use_column
begin
    -- A worker that hangs is found by whoever asks after it has not answered.
    perform outbox.worker_silence();
    return query
select 'worker', w.status, w.detail, w.hint
from outbox.worker_status() s
    cross join lateral (values
        ('running', 'ok', format('Process %s delivers the events of this database.', s.worker_pid), null),
        ('hanging', 'fail', format('Process %s should deliver the events of this database, and gives no sign of life%s.', s.worker_pid,
                (select format(': it waits for %s', a.wait_event) from pg_stat_activity a
                    where s.state = 'hanging' and a.pid = s.worker_pid and a.wait_event_type in ('Lock', 'LWLock', 'IO', 'IPC', 'BufferPin'))),
            format('If it was stopped, continue it in a shell of the server: kill -CONT %s. Otherwise run SELECT pg_terminate_backend(%s); another one is started.',
                s.worker_pid, s.worker_pid)),
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
        ('no slot in shared memory', 'fail',
            format('All %s slots in shared memory are taken by other databases.', 2 * current_setting('max_worker_processes')::integer + 1024),
            format('Run ALTER SYSTEM SET max_worker_processes = %s; and restart the server.', current_setting('max_worker_processes')::integer + 8)),
        ('waiting for the launcher', 'fail', 'The process "outbox_relay launcher" is not there.',
            'The server starts it again within some seconds. If it does not, the server''s log says why.'),
        ('failing to start', 'fail', 'The worker of this database has ended several times before it was at work.',
            'The server''s log says why.'),
        ('stopped', 'fail', 'This database has no worker.', 'The server''s log says why it left. Run SELECT outbox.wake();')
    ) w (state, status, detail, hint)
where w.state = s.state;
end
$$;
comment on function outbox.worker_health() is 'Part of outbox.health(): whether this database has a worker, or why there is none.';

create function outbox.object_health(out "check" text, out status text, out detail text, out hint text) returns setof record
    language plpgsql volatile set search_path = pg_catalog, pg_temp
    as $$
#variable_conflict use_column
begin
    return query
with
ours(name) as (values ('events'), ('backends'), ('backend_passwords'), ('moved_backends'), ('routes'), ('publisher_limits'), ('scheduled_events'), ('refused_events'),
    ('failed_events'), ('cursors'), ('ticks'), ('installation'), ('incarnations'), ('take_overs'), ('copied_backends'), ('restores'), ('replays'),
    ('known_triggers'), ('held_events'), ('held_scheduled'), ('held_cursors'), ('held_refused'), ('kept_rows'), ('inbox'), ('consumer_grants'),
    ('consumer_groups'), ('events_seq_seq')),
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
            ('xid, seq', 'Run CREATE INDEX CONCURRENTLY events_xid_idx ON outbox.events (xid, seq) INCLUDE (backend_number);'),
            ('event_id, branch', 'Run CREATE UNIQUE INDEX CONCURRENTLY events_event_id_idx ON outbox.events (event_id, branch);'),
            ('created_at', 'Run CREATE INDEX CONCURRENTLY events_created_at_idx ON outbox.events (created_at);')) w (columns, cure)
    where t.name = 'events' and t.oid is not null and not exists (
        select from pg_index i where i.indrelid = t.oid and i.indpred is null and i.indisvalid and w.columns = (
            select string_agg(a.attname::text, ', ' order by k.n)
            from unnest(i.indkey::smallint[]) with ordinality k (attnum, n) join pg_attribute a on a.attrelid = t.oid and a.attnum = k.attnum
            where k.n <= i.indnkeyatts))
    union all
    -- Of other tables, what writing needs, and what keeps looking cheap.
    select 'indexes', format('outbox.%s has no %s (%s).', w.relation, w.kind, w.columns),
        case w.kind when 'INDEX ON' then format('Run CREATE INDEX CONCURRENTLY ON outbox.%s (%s);', w.relation, w.columns)
            else format('Run ALTER TABLE outbox.%s ADD %s (%s);', w.relation, w.kind, w.columns) end
    from (values ('backends', 'PRIMARY KEY', 'name'), ('backends', 'UNIQUE', 'number'), ('backend_passwords', 'PRIMARY KEY', 'backend_number'),
            ('cursors', 'PRIMARY KEY', 'backend_number, slot'), ('ticks', 'PRIMARY KEY', 'backend_number, reached_at'),
            ('failed_events', 'PRIMARY KEY', 'event_id, seq'), ('failed_events', 'INDEX ON', 'failed_at'), ('failed_events', 'INDEX ON', 'seq, event_id'),
            ('refused_events', 'PRIMARY KEY', 'seq'), ('scheduled_events', 'PRIMARY KEY', 'event_id, branch'), ('scheduled_events', 'INDEX ON', 'scheduled_at, seq'),
            ('inbox', 'PRIMARY KEY', 'consumer, event_id'), ('inbox', 'INDEX ON', 'consumed_at'), ('take_overs', 'PRIMARY KEY', 'backend_number'),
            ('publisher_limits', 'PRIMARY KEY', 'role'), ('installation', 'PRIMARY KEY', 'id')) w (relation, kind, columns)
        join there t on t.name = w.relation and t.oid is not null
    where not exists (
        select from pg_index i where i.indrelid = t.oid and i.indpred is null and i.indisvalid and (i.indisunique or w.kind = 'INDEX ON') and w.columns = (
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
    where t.name not in ('events', 'scheduled_events', 'failed_events', 'refused_events', 'cursors', 'inbox', 'consumer_grants')
    union all
    -- An attached table's partitions and children: statements on them fire their own triggers alone.
    select distinct 'attached tables', format('%s is attached, and its partition or child %s is not.', a.tgrelid::regclass, i.inhrelid::regclass),
        format('Run SELECT outbox.attach_table(%L, ...); again, as the comment of %s says.', a.tgrelid::regclass, a.tgfoid::regprocedure)
    from pg_trigger a join pg_inherits i on i.inhparent = a.tgrelid join pg_class k on k.oid = i.inhrelid and k.relkind in ('r', 'p')
    where not a.tgisinternal and a.tgname ~ '^outbox_relay_(insert|update|delete)$'
        and not exists (select from pg_trigger o where o.tgrelid = i.inhrelid and o.tgname = a.tgname and o.tgfoid = a.tgfoid)
    union all
    select 'attached tables', format('The trigger "%s" of %s does not fire for each statement.', a.tgname, a.tgrelid::regclass),
        format('Run ALTER TABLE %s ENABLE TRIGGER %I;', a.tgrelid::regclass, a.tgname)
    from pg_trigger a where not a.tgisinternal and a.tgname ~ '^outbox_relay_(insert|update|delete|truncate)$' and a.tgenabled in ('D', 'R')
    union all
    select distinct 'attached tables', format('%s publishes as "%s", which may not publish.', a.tgrelid::regclass, pg_get_userbyid(p.proowner)),
        format('Run SELECT outbox.grant_publisher(%L);', pg_get_userbyid(p.proowner))
    from pg_trigger a join pg_proc p on p.oid = a.tgfoid
    where not a.tgisinternal and a.tgname ~ '^outbox_relay_(insert|update|delete|truncate)$'
        and not has_column_privilege(p.proowner, 'outbox.events', 'event_type', 'insert')
    union all
    -- Its owner has changed since. Superusers, and members of the owner, may be others.
    select distinct 'attached tables', format('%s belongs to "%s", and publishes as "%s".', a.tgrelid::regclass, pg_get_userbyid(k.relowner), pg_get_userbyid(p.proowner)),
        format('Run SELECT outbox.attach_table(%L, ...); again, as the comment of %s says.', a.tgrelid::regclass, a.tgfoid::regprocedure)
    from pg_trigger a join pg_proc p on p.oid = a.tgfoid join pg_class k on k.oid = a.tgrelid
    where not a.tgisinternal and a.tgname ~ '^outbox_relay_(insert|update|delete|truncate)$' and not pg_has_role(p.proowner, k.relowner, 'usage')
    union all
    select 'inheritance', format('outbox.%s takes part in inheritance or partitioning.', t.name), 'Detach it: its rows are read one table at a time.'
    from there t where exists (select from pg_inherits i where t.oid in (i.inhrelid, i.inhparent))
)
select c.name, case when f.what is null then 'ok' else c.severity end, coalesce(f.faults, c.well), f.cure
from (values
        ('tables', 'fail', 'All tables are there.'), ('indexes', 'fail', 'All indexes are there and valid.'),
        ('sequence', 'fail', 'The sequence numbers events as it should.'), ('owner', 'fail', 'The owner of the extension is a superuser.'),
        ('triggers', 'warn', 'All triggers of the extension are enabled.'), ('foreign triggers', 'warn', 'Nobody else has a trigger on the tables.'),
        ('attached tables', 'warn', 'All that is to publish rows does.'), ('publications', 'warn', 'No publication has what must not leave this server.'), ('inheritance', 'fail', 'No table is inherited.')
    ) c (name, severity, well)
    left join (
        select f.what, string_agg(f.fault, ' ' order by f.fault) as faults, string_agg(distinct f.cure, ' ') as cure
        from faults f group by f.what
    ) f on f.what = c.name;
end
$$;
comment on function outbox.object_health() is 'Part of outbox.health(): whether all that belongs to the extension is there, as it must be.';

create function outbox.lag_trend(backend_number integer, pending bigint, out growth bigint, out seconds double precision) returns setof record
    language c volatile strict rows 1
    as 'MODULE_PATHNAME', 'lag_trend_wrapper';
comment on function outbox.lag_trend(integer, bigint) is 'Part of outbox.health(): takes note of how many events are pending, and says how many more that are than at an earlier look, and how many seconds ago that was.';

create function outbox.backend_health(out "check" text, out status text, out detail text, out hint text) returns setof record
    language plpgsql volatile set search_path = pg_catalog, pg_temp
    as $$
#variable_conflict use_column
begin
    return query
with
s as materialized (select v.*, b.number, b.host, b.port, b.unix_socket, b.username, b.max_len from outbox.backend_status v join outbox.backends b on b.name = v.backend),
g as materialized (select s.number, t.growth, t.seconds from s cross join lateral outbox.lag_trend(s.number, s.pending) t)
select 'backend ' || s.backend, j.status,
    concat_ws(' ', j.detail, 'The last error: ' || case when j.status <> 'ok' then s.last_error end || '.',
        case when s.pending > 0 then format('%s events wait, the oldest for %s.', s.pending, date_trunc('second', s.oldest_pending_age)) end,
        case
            when s.pending > 0 and g.growth > 0 then format('The lag grows: %s more wait than %s s ago.', g.growth, round(g.seconds))
            when s.pending > 0 and g.growth < 0 then format('The lag shrinks: %s fewer wait than %s s ago.', -g.growth, round(g.seconds))
            when s.pending > 0 and g.growth = 0 then format('The lag does not grow: as many waited %s s ago.', round(g.seconds))
        end),
    j.hint
from s
    left join g on g.number = s.number
    cross join lateral (select (s.oldest_pending_age > interval '1 min' or s.oldest_pending_age > interval '10 s' and g.growth > 0)
        and (s.max_rate is null or coalesce((select sum(c.events_per_second) from outbox.cursors c
            where c.backend_number = s.number and c.saved_at > clock_timestamp() - interval '5 s'), 0) < 0.8 * s.max_rate) as is_late) t
    cross join lateral (select outbox.error_hint(s.last_error) as hint, case
        when s.last_error ~ '^(WRONGPASS|NOAUTH)' or s.last_error like 'ERR invalid password%' then 'password'
        when s.last_error ~ '^NOPERM' then 'rights'
        when s.last_error like '%and it has no consumer group' then 'no group'
        else 'other' end as error) e
    cross join lateral (values
        ('idle', 'ok', 'All is sent.', null),
        -- One that keeps to its pace is not ill, however much waits for that.
        ('sending', case when t.is_late then 'warn' else 'ok' end,
            case when s.max_rate is null then 'Events are being sent.'
                else format('Events are being sent, at most %s a second (max_rate).', s.max_rate) end,
            case when t.is_late then 'If the lag grows, Redis or the network is slower than the publishers: look at SLOWLOG GET in Redis.' end),
        ('paused', 'warn', 'It is paused: events wait.', format('Run UPDATE outbox.backends SET enabled = true WHERE name = %L;', s.backend)),
        ('stopped', 'fail', 'No worker is at work in this database: nothing is sent.', 'See the check "worker".'),
        ('copy', 'fail', 'This database is a copy of another one: what is published here waits.',
            format('If this server is to send it, run SELECT outbox.take_over(%L);', s.backend)),
        ('fenced', 'fail', 'Another server owns its streams.',
            format('If that server is gone for good, run SELECT outbox.take_over(%L);', s.backend)),
        ('misconfigured', 'fail', 'It cannot work as it is configured, and is tried again.',
            case e.error
                when 'password' then format('Run SELECT outbox.set_backend_password(%L, ''...''); with the password of Redis%s.', s.backend,
                    coalesce(format(' (and the user %L of the column username)', s.username), ''))
                    || case when s.username is not null then format(' If that user is wrong, correct it: UPDATE outbox.backends SET username = ... WHERE name = %L;', s.backend) else '' end
                when 'rights' then 'Give the user the rights that docs/FAILURES.md lists: ACL SETUSER in Redis.'
                else concat(e.hint || ' ', format('Correct its row: UPDATE outbox.backends SET ... WHERE name = %L; docs/FAILURES.md has the error.', s.backend)) end),
        ('full', 'fail', format('Consumers have not acknowledged what a stream holds, so that it cannot be trimmed (trim = ''read'', max_len %s).',
                coalesce(s.max_len::text, current_setting('outbox_relay.redis_max_len', true))),
            case e.error
                when 'no group' then 'Create the group in Redis: XGROUP CREATE stream group 0. Its consumers then read and acknowledge what is there.'
                else format('Start the consumers of that group; SELECT * FROM outbox.consumers WHERE backend = %L; shows how far it is. If nobody needs the group, delete it in Redis: XGROUP DESTROY stream group.', s.backend) end),
        ('backoff', case when s.oldest_pending_age > interval '5 s' or s.pending = 0 and s.last_error_at > s.last_published_at then 'fail' else 'warn' end,
            format('Redis at %s cannot be used, and is tried again at %s.', coalesce(s.address, s.unix_socket, concat(coalesce(s.host, current_setting('outbox_relay.redis_host', true)), ':', coalesce(s.port::text, current_setting('outbox_relay.redis_port', true)))),
                to_char(s.next_attempt_at, 'HH24:MI:SS')),
            format('%s, or correct where it is: UPDATE outbox.backends SET host = ..., port = ... WHERE name = %L; SELECT outbox.wake(); tries at once.',
                coalesce(rtrim(e.hint, '.'), 'Start it'), s.backend))
    ) j (state, status, detail, hint)
where j.state = s.state;
end
$$;
comment on function outbox.backend_health() is 'Part of outbox.health(): each backend, with what waits for it.';

create function outbox.consumer_health(out "check" text, out status text, out detail text, out hint text) returns setof record
    language plpgsql volatile set search_path = pg_catalog, pg_temp
    as $$
#variable_conflict use_column
begin
    return query
with
-- Known lately: Redis is asked only while somebody wants to know.
known as (
    select b.name, b.trim, g.*, coalesce(b.max_len, current_setting('outbox_relay.redis_max_len', true)::bigint, 10000) as max_len
    from outbox.consumer_groups g join outbox.backends b on b.number = g.backend_number
    where g.asked_at > clock_timestamp() - interval '2 min'
),
behind as (
    select k.*, coalesce(k.unread, 0) + coalesce(k.pending, 0) as left_over from known k
    where k.consumer_group is not null and k.max_len > 0 and k.length >= k.max_len * 0.8
),
late as (
    select b.* from behind b where b.left_over >= b.max_len * 0.8 order by b.left_over desc, b.stream, b.consumer_group limit 10
),
refusals as (select distinct k.name, k.error from known k where k.error is not null order by 1, 2 limit 3)
select 'consumers', case when exists (select from late) or exists (select from refusals) then 'warn' else 'ok' end,
    coalesce(concat_ws(' ',
            (select string_agg(format('The group "%s" has not acknowledged %s entries of stream "%s" (backend "%s"), which has %s of at most %s.',
                l.consumer_group, l.left_over, l.stream, l.name, l.length, l.max_len), ' ') from late l),
            (select string_agg(format('Redis cannot be asked about consumer groups of backend "%s": %s.', r.name, r.error), ' ') from refusals r),
            case when not exists (select from late) and not exists (select from refusals) then
                case when exists (select from known) then 'No stream is near its max_len while a group has not read it.'
                    else 'Nobody has asked about consumer groups lately: outbox.consumers does.' end end)),
    nullif(concat_ws(' ',
        (select case when bool_or(l.trim = 'length') then 'What is not read is trimmed next.' else 'The backend waits when the stream is full.' end
            || ' Start or add consumers, or raise max_len: ' || string_agg(distinct format('UPDATE outbox.backends SET max_len = %s WHERE name = %L;', 2 * l.max_len, l.name), ' ')
            from late l having count(*) > 0),
        case when exists (select from refusals) then 'Give the backend''s Redis user +xlen +xinfo|groups +xpending on its streams.' end), '');
end
$$;
comment on function outbox.consumer_health() is 'Part of outbox.health(): consumer groups that are about to lose entries, or to stop their backend.';

create function outbox.event_health(old interval, out "check" text, out status text, out detail text, out hint text) returns setof record
    language plpgsql volatile set search_path = pg_catalog, pg_temp
    as $$
#variable_conflict use_column
begin
    return query
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
inbox as (
    select (select min(i.consumed_at) from outbox.inbox i) as oldest,
        (select s.setting::bigint * interval '1 min' from pg_settings s where s.name = 'outbox_relay.inbox_retention' and s.setting::bigint > 0) as kept
),
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
select 'inbox', case when is_late then 'warn' else 'ok' end,
    case
        when i.oldest is null then 'The inbox is empty.'
        when is_late then format('The oldest entry of the inbox is of %s, and is kept for longer than outbox_relay.inbox_retention (%s).', i.oldest, i.kept)
        else format('The oldest entry of the inbox is of %s.', i.oldest) end,
    case when is_late then 'Run CALL outbox.purge(); each day, if this database has no worker.' end
from inbox i, lateral (select coalesce(i.oldest < clock_timestamp() - i.kept * 1.1 - interval '1 hour', false)) l (is_late)
union all
select 'bloat', case when count(d) > 0 then 'warn' else 'ok' end,
    coalesce(string_agg(format('%s has %s dead rows beside %s live ones.', d.relid::regclass, d.n_dead_tup, d.n_live_tup), ' '), 'No table has more dead rows than live ones.'),
    string_agg(format('Run VACUUM %s;', d.relid::regclass), ' ')
from dead d;
end
$$;
comment on function outbox.event_health(interval) is 'Part of outbox.health(): what keeps events back, and what keeps them for too long.';

create function outbox.health(old interval default '10 min', out "check" text, out status text, out detail text, out hint text) returns setof record
    -- Whoever has locked a table is to be named, not waited for.
    language plpgsql volatile security definer set search_path = pg_catalog, pg_temp set jit = off set lock_timeout = '1s'
    as $$
declare
    has_tables boolean := true;
    locked_since interval := '5 s';
begin
    return query select * from outbox.worker_health();
    begin
        for "check", status, detail, hint in select o.* from outbox.object_health() o loop
            has_tables := has_tables and not ("check" = 'tables' and status = 'fail');
            return next;
        end loop;
        -- What is asked below needs all tables.
        if has_tables then
            return query select * from outbox.setting_health();
            return query select * from outbox.backend_health();
            return query select * from outbox.route_health();
            return query select * from outbox.event_health(old);
            return query select * from outbox.consumer_health();
        end if;
    exception when lock_not_available then
        -- The checks that need the table are left out.
        locked_since := '0';
    end;
    return query select * from outbox.lock_health(locked_since);
end
$$;
comment on function outbox.health(interval) is 'Whether all is well: one row a check, with status ok, warn or fail, what was found, and what helps. A transaction that is open for longer than "old" counts as old. Cheap enough to be asked each 10 s; readable by pg_monitor.';
