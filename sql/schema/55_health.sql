-- Health checks: what is well, what is not, and what helps.
--
-- In PL/pgSQL, which caches the plans: planning takes longer than executing. A probe calls this every few seconds.

create function outbox.worker_trouble() returns text[]
    language c volatile
    as 'MODULE_PATHNAME', 'worker_trouble';
comment on function outbox.worker_trouble() is 'Part of outbox.health(): what keeps this database''s worker from its work, or has kept the last one: fail or warn, what it is, what helps. NULL: nothing.';

create function outbox.databases_with(database text) returns text
    language sql stable set search_path = pg_catalog, pg_temp
    as $$
-- A name that begins with ! takes a database out wherever it stands.
with
e as (select btrim(e.entry) as entry, e.n from string_to_table(current_setting('outbox_relay.databases', true), ',') with ordinality e (entry, n)),
kept as (
    select e.* from e
    where e.entry <> '' and not (e.entry like '!%' and outbox.matches(databases_with.database, btrim(substr(e.entry, 2))))
)
select concat_ws(',', string_agg(k.entry, ',' order by k.n), case
    -- With such names alone, all other databases are in.
    when count(*) = 0 or bool_or(k.entry not like '!%') and not bool_or(k.entry not like '!%' and outbox.matches(databases_with.database, k.entry))
        then databases_with.database end)
from kept k
$$;
comment on function outbox.databases_with(text) is 'Part of outbox.health(): what outbox_relay.databases must be so that it also names a database.';

create function outbox.worker_health(out "check" text, out status text, out detail text, out hint text) returns setof record
    language plpgsql volatile set search_path = pg_catalog, pg_temp
    as $$
#variable_conflict use_column
begin
    -- A worker that hangs is only noticed if it was asked for a sign of life and has not answered.
    perform outbox.worker_silence();
    return query
select 'worker', w.status, w.detail, w.hint
from outbox.worker_status() s
    cross join (select outbox.launcher_pid() as launcher_pid, outbox.worker_trouble() as trouble) l
    cross join lateral (select case when s.state = 'standby' then pg_get_wal_replay_pause_state() <> 'not paused' end as is_paused) p
    cross join lateral (select case when s.state = 'waiting for the launcher' then
        (select count(*) from pg_stat_activity a where a.backend_type not in ('client backend', 'autovacuum launcher', 'autovacuum worker', 'background writer',
            'checkpointer', 'startup', 'walwriter', 'walsender', 'walreceiver', 'archiver', 'walsummarizer', 'slotsync worker', 'io worker'))
            >= current_setting('max_worker_processes')::integer end as is_used_up) u
    cross join lateral (values
        ('running', coalesce(l.trouble[1], 'ok'),
            format('Process %s %s', s.worker_pid, coalesce('has trouble: ' || l.trouble[2], 'delivers the events of this database.')), l.trouble[3]),
        ('hanging', 'fail', format('Process %s should deliver the events of this database, and gives no sign of life%s.', s.worker_pid,
                (select format(': it waits for %s', a.wait_event) from pg_stat_activity a
                    where s.state = 'hanging' and a.pid = s.worker_pid and a.wait_event_type in ('Lock', 'LWLock', 'IO', 'IPC', 'BufferPin'))),
            format('If it was stopped, continue it in a shell of the server: kill -CONT %s. Otherwise run SELECT pg_terminate_backend(%s); another one is started.',
                s.worker_pid, s.worker_pid)),
        ('standby', case when p.is_paused then 'warn' else 'ok' end,
            case when p.is_paused then 'This server is in recovery, and replaying the WAL is paused: it shows the state of that moment.'
                else 'This server is a standby: its primary delivers the events.' end,
            case when p.is_paused then 'Run SELECT pg_wal_replay_resume(); (at a recovery target, that ends the recovery).' end),
        ('starting', 'warn', 'The worker of this database is being started.', 'Ask again in a few seconds.'),
        ('library not in shared_preload_libraries', 'fail', 'The library is not preloaded: events are kept, and nothing sends them.',
            -- Each name is a literal of its own: one that has commas would be taken for one name.
            case when s.state = 'library not in shared_preload_libraries' then format('Run ALTER SYSTEM SET shared_preload_libraries = %s; and restart the server.',
                (select string_agg(quote_literal(btrim(n.name, ' "')), ', ' order by n.number)
                    from string_to_table(concat_ws(',', nullif(current_setting('shared_preload_libraries'), ''), 'outbox_relay'), ',') with ordinality n (name, number))) end),
        ('disabled', 'fail', 'outbox_relay.enabled is off.',
            'Run ALTER SYSTEM SET outbox_relay.enabled = on; SELECT pg_reload_conf();'),
        ('database not in outbox_relay.databases', 'fail',
            format('outbox_relay.databases is ''%s'', which leaves out "%s".', current_setting('outbox_relay.databases', true), current_database()),
            case when s.state = 'database not in outbox_relay.databases' then
                format('Run ALTER SYSTEM SET outbox_relay.databases = %L; SELECT pg_reload_conf();', outbox.databases_with(current_database())) end),
        ('connections not allowed', 'fail', format('Connections to "%s" are not allowed, so no worker can come.', current_database()),
            format('Run ALTER DATABASE %I ALLOW_CONNECTIONS true;', current_database())),
        ('version mismatch', 'fail',
            format('The extension has version %s, but the library has another version.', (select e.extversion from pg_extension e where e.extname = 'outbox_relay')),
            'Run ALTER EXTENSION outbox_relay UPDATE; or restart the server, if it still runs an older library.'),
        ('waiting for a background worker process', 'fail',
            format('All of the %s background worker processes are in use.', current_setting('max_worker_processes')),
            format('Run ALTER SYSTEM SET max_worker_processes = %s; and restart the server.', current_setting('max_worker_processes')::integer + 8)),
        ('no slot in shared memory', 'fail',
            format('Other databases use all %s slots in shared memory.', 2 * current_setting('max_worker_processes')::integer + 1024),
            format('Run ALTER SYSTEM SET max_worker_processes = %s; and restart the server.', current_setting('max_worker_processes')::integer + 8)),
        ('waiting for the launcher', 'fail',
            case
                when l.launcher_pid is not null then format('Process %s ("outbox_relay launcher") should have started the worker of this database, and has not.', l.launcher_pid)
                when u.is_used_up then format('All of the %s background worker processes are in use, and the process "outbox_relay launcher" has none.', current_setting('max_worker_processes'))
                else 'The process "outbox_relay launcher" is not there.' end,
            case
                when l.launcher_pid is not null then format('If it was stopped, continue it in a shell of the server: kill -CONT %s. Otherwise run SELECT pg_terminate_backend(%s); another one is started.',
                    l.launcher_pid, l.launcher_pid)
                when u.is_used_up then format('Run ALTER SYSTEM SET max_worker_processes = %s; and restart the server.', current_setting('max_worker_processes')::integer + 8)
                else 'The server starts it again within some seconds. If it does not, the server''s log says why.' end),
        ('failing to start', 'fail', coalesce(format('The worker of this database cannot begin: %s', l.trouble[2]),
                'The worker of this database has ended several times before it was at work.'),
            coalesce(l.trouble[3], 'The server''s log says why.')),
        ('stopped', 'fail', 'This database has no worker.', 'The server''s log says why it left. Run SELECT outbox.wake();')
    ) w (state, status, detail, hint)
where w.state = s.state;
end
$$;
comment on function outbox.worker_health() is 'Part of outbox.health(): whether this database has a worker, or why there is none.';

create function outbox.lag_trend(backend_number integer, pending bigint, out growth bigint, out seconds double precision) returns setof record
    language c volatile strict rows 1
    as 'MODULE_PATHNAME', 'lag_trend_wrapper';
comment on function outbox.lag_trend(integer, bigint) is 'Part of outbox.health(): notes how many events are pending, and returns by how many that number has grown since an earlier call, and how many seconds ago that was.';

create function outbox.backend_health(out "check" text, out status text, out detail text, out hint text) returns setof record
    language plpgsql volatile set search_path = pg_catalog, pg_temp
    as $$
#variable_conflict use_column
begin
    return query
with
s as materialized (select v.*, b.number, b.host, b.port, b.unix_socket, b.username, b.max_len, b.trim, b.mode,
        -- As words of redis-cli: no name must become several. A pattern: of a template, what it gives.
        regexp_replace(b.username, p.special, '?', 'g') as redis_user,
        regexp_replace(regexp_replace(coalesce(b.stream_name, current_setting('outbox_relay.redis_stream_name', true)), p.special, '?', 'g'),
            '[{][^{}]*[}]', '*', 'g') as streams
    from outbox.backend_status v join outbox.backends b on b.name = v.backend
        -- Characters that end or quote a word, or are special in a pattern, where ? stands for any.
        cross join (values ('[][[:space:][:cntrl:]"''\\*?^]')) p (special)),
g as materialized (select s.number, t.growth, t.seconds from s cross join lateral outbox.lag_trend(s.number, s.pending) t)
select 'backend ' || s.backend, j.status,
    concat_ws(' ', j.detail, 'The last error: ' || case when j.status <> 'ok' then rtrim(s.last_error, '.') end || '.',
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
            where c.backend_number = s.number and clock_timestamp() - c.saved_at between interval '0' and interval '5 s'), 0) < 0.8 * s.max_rate) as is_late,
        -- More than a burst, and more than the error of an estimate.
        s.max_rate is not null and s.oldest_pending_age > interval '5 min' and g.growth > s.pending / 100 as is_outgrown) t
    cross join lateral (select (select c.last_hint from outbox.cursors c where c.backend_number = s.number and c.last_error = s.last_error
            order by c.last_error_at desc limit 1) as hint,
        outbox.worker_trouble() as trouble, case
        when s.last_error ~ '^(WRONGPASS|NOAUTH)' or s.last_error like 'ERR invalid password%' then 'password'
        when s.last_error ~ '^NOPERM' then 'rights'
        when s.last_error like '%and it has no consumer group' then 'no group'
        when s.last_error ~ '^(its guard was missing|Redis has lost entries)' and s.last_error_at > clock_timestamp() - interval '10 min' then 'loss'
        else 'other' end as error) e
    cross join lateral (values
        ('idle', case when e.error = 'loss' then 'warn' else 'ok' end, 'All is sent.', case when e.error = 'loss' then e.hint end),
        -- One that keeps to its pace is not ill, however much waits for that, unless it is more and more.
        ('sending', case when e.trouble[1] = 'fail' or t.is_late or t.is_outgrown or e.error = 'loss' then 'warn' else 'ok' end,
            case when e.trouble[1] = 'fail' then 'The worker has trouble.'
                when s.max_rate is null then 'Events are being sent.'
                else format('Events are being sent, at most %s a second (max_rate).', s.max_rate) end,
            case when e.trouble[1] = 'fail' then 'See the check "worker".' when e.error = 'loss' then e.hint
                when t.is_outgrown and not t.is_late then format('More is published than max_rate lets through. To send faster, run UPDATE outbox.backends SET max_rate = %s WHERE name = %L;',
                    least(2 * s.max_rate::bigint, 2147483647), s.backend)
                when t.is_late then 'If the lag grows, Redis or the network is slower than the publishers: look at SLOWLOG GET in Redis.' end),
        ('paused', 'warn', 'It is paused: events wait.', format('Run UPDATE outbox.backends SET enabled = true WHERE name = %L;', s.backend)),
        ('stopped', 'fail', 'This database has no worker: nothing is sent.', 'See the check "worker".'),
        ('copy', 'fail', 'This database is a copy of another one: events that are published here wait.',
            format('If this server shall send them, run SELECT outbox.take_over(%L);', s.backend)),
        ('fenced', 'fail', 'Another server owns its streams.',
            format('If that server is gone for good, run SELECT outbox.take_over(%L);', s.backend)),
        ('misconfigured', 'fail', 'It cannot work with its present configuration. The relay tries again.',
            case e.error
                when 'password' then format('Run SELECT outbox.set_backend_password(%L, ''...''); with the password of Redis%s.', s.backend,
                    coalesce(format(' (and the user %L of the column username)', s.username), ''))
                    || case when s.username is not null then format(' If that user is wrong, correct it: UPDATE outbox.backends SET username = ... WHERE name = %L;', s.backend) else '' end
                when 'rights' then format('In Redis: ACL SETUSER %s ~%s ~outbox_relay:guard:* +@connection +xadd +xrevrange +xinfo|stream +watch +unwatch +multi +exec +discard +hset +hgetall +hmget +wait%s (with ~ for each further stream, too). SELECT outbox.wake(); tries at once.',
                    coalesce(s.redis_user, 'default'), s.streams,
                    concat(case when s.trim = 'read' then ' +xlen +xinfo|groups +xinfo|consumers +xpending +xtrim +eval' end,
                        case when s.mode = 'cluster' then ' +cluster|slots' end))
                else concat_ws(' ', e.hint, case when e.hint is null or e.hint like '%backend%' then
                        format('Correct its row: UPDATE outbox.backends SET ... WHERE name = %L;', s.backend) end,
                    'SELECT outbox.wake(); tries at once.') end),
        ('full', 'fail', format('Consumers have not acknowledged what a stream holds, so that it cannot be trimmed (trim = ''read'', max_len %s).',
                coalesce(s.max_len::text, current_setting('outbox_relay.redis_max_len', true))),
            case e.error
                when 'no group' then 'Create the group in Redis: XGROUP CREATE stream group 0. Its consumers then read and acknowledge the existing entries.'
                else format('Start the consumers of that group; SELECT * FROM outbox.consumers WHERE backend = %L; shows its progress. If nobody needs the group, delete it in Redis: XGROUP DESTROY stream group.', s.backend) end),
        ('backoff', case when s.oldest_pending_age > interval '5 s' or s.pending = 0 and s.last_error_at > s.last_published_at then 'fail' else 'warn' end,
            format('Redis at %s cannot be used. The relay tries again at %s.', coalesce(s.address, s.unix_socket, concat(coalesce(s.host, current_setting('outbox_relay.redis_host', true)), ':', coalesce(s.port::text, current_setting('outbox_relay.redis_port', true)))),
                to_char(s.next_attempt_at, 'HH24:MI:SS')),
            concat_ws(' ', coalesce(e.hint, 'Start it, or correct where it is.'), case when e.hint is null or e.hint ~ 'backend|host|port' then
                    format('To correct where it is: UPDATE outbox.backends SET %s WHERE name = %L;',
                        case when s.unix_socket is null then 'host = ..., port = ...' else 'unix_socket = ...' end, s.backend) end,
                'SELECT outbox.wake(); tries at once.'))
    ) j (state, status, detail, hint)
where j.state = s.state;
end
$$;
comment on function outbox.backend_health() is 'Part of outbox.health(): each backend and its waiting events.';

create function outbox.consumer_health(out "check" text, out status text, out detail text, out hint text) returns setof record
    language plpgsql volatile set search_path = pg_catalog, pg_temp
    as $$
#variable_conflict use_column
declare
    is_asked constant boolean := outbox.probe_consumers();
begin
    return query
with
-- What has not changed is not saved again while Redis is being asked.
known as (
    select b.name, b.trim, g.*, coalesce(b.max_len, current_setting('outbox_relay.redis_max_len', true)::bigint, 10000) as max_len
    from outbox.consumer_groups g join outbox.backends b on b.number = g.backend_number
    where clock_timestamp() - g.asked_at between interval '0' and case when is_asked or b.trim = 'read' then interval '1 h' else interval '2 min' end
),
behind as (
    select k.*, coalesce(k.unread, 0) + coalesce(k.pending, 0) as left_over from known k
    where k.consumer_group is not null and k.max_len > 0 and k.length >= k.max_len * 0.8
),
late as (
    select b.* from behind b where b.left_over >= b.max_len * 0.8 order by b.left_over desc, b.stream, b.consumer_group limit 10
),
refusals as (
    select distinct k.name, k.error, k.error like 'NOPERM%' as is_forbidden from known k where k.error is not null
    order by k.name, k.error limit 3
)
-- A backend that trims by length works without the right to ask.
select 'consumers', case when exists (select from late) or exists (select from refusals r where not r.is_forbidden) then 'warn' else 'ok' end,
    coalesce(concat_ws(' ',
            (select string_agg(format('The group "%s" has not acknowledged %s entries of stream "%s" (backend "%s"), which has %s of at most %s.',
                l.consumer_group, l.left_over, l.stream, l.name, l.length, l.max_len), ' ') from late l),
            (select string_agg(format('Redis cannot be asked about consumer groups of backend "%s": %s.', r.name, r.error), ' ') from refusals r),
            case when not exists (select from late) and not exists (select from refusals) then
                case when exists (select from known) then 'No stream is near its max_len while a group has not read it.'
                    else 'Nothing is known of consumer groups at present: no backend has been asked about them.' end end)),
    nullif(concat_ws(' ',
        (select case when bool_or(l.trim = 'length') then 'Unread entries will be trimmed next.' else 'The backend waits when the stream is full.' end
            || ' Start or add consumers, or raise max_len: ' || string_agg(distinct format('UPDATE outbox.backends SET max_len = %s WHERE name = %L;', 2 * l.max_len, l.name), ' ')
            from late l having count(*) > 0),
        case when exists (select from refusals r where r.is_forbidden) then 'To have consumer groups watched, give the backend''s Redis user +xlen +xinfo|groups +xpending on its streams.' end,
        (select string_agg(distinct outbox.error_hint(r.error), ' ') from refusals r where not r.is_forbidden)), '');
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
-- A session that has a writer's lock on the table publishes or has published.
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
        nullif(greatest(current_setting('outbox_relay.published_retention', true)::interval, '0'), '0') as kept
),
waiting as (
    select b.name, count(*) as count, min(r.last_error) as error
    from (select * from outbox.refused_events r where r.accepted_in is null limit 10000) r join outbox.backends b on b.number = r.backend_number
    group by b.name
),
-- Of another server, brought by a subscription.
held as (
    select h.backend, count(*) as count, exists (select from outbox.backends b where b.name = h.backend) as is_here
    from (select e.backend from outbox.held_events e limit 10000) h group by h.backend
    union all
    select s.backend, count(*), exists (select from outbox.backends b where b.name = s.backend)
    from (select e.backend from outbox.held_scheduled h join outbox.scheduled_events e on e.event_id = h.event_id and e.branch = h.branch limit 10000) s
    group by s.backend
),
failed as (select count(*) as count, max(f.failed_at) as last from (select f.failed_at from outbox.failed_events f order by f.failed_at desc limit 10000) f),
inbox as (
    select (select min(i.consumed_at) from outbox.inbox i) as oldest,
        nullif(greatest(current_setting('outbox_relay.inbox_retention', true)::interval, '0'), '0') as kept
),
dead as (
    select t.relid, t.n_dead_tup, pg_stat_get_live_tuples(t.relid) as n_live_tup
    from (select r.relid, pg_stat_get_dead_tuples(r.relid) as n_dead_tup from (values ('outbox.events'::regclass), ('outbox.scheduled_events'),
        ('outbox.refused_events'), ('outbox.failed_events'), ('outbox.cursors'), ('outbox.ticks'), ('outbox.inbox'), ('outbox.consumer_groups')) r (relid)) t
    where t.n_dead_tup > 100000 and t.n_dead_tup > pg_stat_get_live_tuples(t.relid)
),
-- What the dead rows are kept for. Transactions of other databases keep none here.
horizon as (
    select h.words, h.cure from (
        select age(a.backend_xmin) as age, format('process %s, whose transaction is open since %s', a.pid, a.xact_start) as words,
            format('If that session is not in use, run SELECT pg_terminate_backend(%s, 5000);', a.pid) as cure
        from pg_stat_activity a where a.backend_xmin is not null and a.pid <> pg_backend_pid() and a.xact_start < clock_timestamp() - old
            and a.datname = current_database()
        union all
        select age(x.transaction), format('the prepared transaction %L', x.gid), format('Run COMMIT PREPARED %L; or ROLLBACK PREPARED %L; Then run', x.gid, x.gid)
        from pg_prepared_xacts x where x.prepared < clock_timestamp() - old and x.database = current_database()
        union all
        select age(r.xmin), format('the replication slot "%s"', r.slot_name),
            case when r.active then 'End what its standby reads for long, or switch hot_standby_feedback off there; then run'
                else format('If nobody needs that slot, run SELECT pg_drop_replication_slot(%L);', r.slot_name) end
        from pg_replication_slots r where r.xmin is not null
        union all
        select age(w.backend_xmin), format('the standby of process %s', w.pid), 'End what that standby reads for long, or switch hot_standby_feedback off there; then run'
        from pg_stat_replication w where w.backend_xmin is not null
    ) h where exists (select from dead) order by h.age desc limit 1
)
select 'open transactions', case when count(o) > 0 then 'warn' else 'ok' end,
    coalesce(min(format('Process %s has published in a transaction that has been open since %s: its events are sent when it commits. Its last query: %s', o.pid, o.xact_start, o.query)),
        'No transaction that has been open for long has published events.'),
    min(format('If that session is not in use, run SELECT pg_terminate_backend(%s);', o.pid))
from open_ones o
union all
select 'prepared transactions', case when count(p) > 0 then 'warn' else 'ok' end,
    coalesce(min(format('The transaction %L has published events and has been prepared since %s: its events are sent when it commits.', p.gid, p.prepared)),
        'No transaction that has been prepared for long has published events.'),
    min(format('Run COMMIT PREPARED %L; or ROLLBACK PREPARED %L;', p.gid, p.gid))
from prepared p
union all
select 'refused events', case when count(w) > 0 then 'warn' else 'ok' end,
    coalesce(string_agg(format('%s events of backend "%s" wait behind one that Redis has refused: %s.', w.count, w.name, w.error), ' '), 'No event waits behind a refused one.'),
    case when count(w) > 0 then concat_ws(' ', string_agg(distinct outbox.error_hint(w.error), ' '),
        'They are tried again by themselves; SELECT outbox.wake(); tries at once.') end
from waiting w
union all
select 'failed events', case when f.count > 0 then 'warn' else 'ok' end,
    case when f.count > 0 then format('%s events have failed, the last one at %s.', f.count, f.last) else 'No event has failed.' end,
    case when f.count > 0 then coalesce((select outbox.error_hint(e.last_error) || ' ' from outbox.failed_events e order by e.failed_at desc limit 1), '') || 'Look at outbox.failed_events, mend what last_error says, and run SELECT outbox.retry_failed();' end
from failed f
union all
select 'held events', case when count(h) > 0 and not s.is_subscribed then 'warn' else 'ok' end,
    case
        when count(h) = 0 then 'No events of another server are held.'
        when s.is_subscribed then format('%s events of another server are held, which has not sent them as far as its subscription says.', sum(h.count))
        else format('%s events of another server are held, and no subscription says what became of them.', sum(h.count)) end,
    case when count(h) > 0 and not s.is_subscribed then 'If that server sends nothing any more, run '
        || string_agg(distinct case when not h.is_here then format('INSERT INTO outbox.backends (name) VALUES (%L); ', h.backend) else '' end
            || format('SELECT outbox.take_over(%L);', h.backend), ' ') end
from (select exists (select from pg_subscription_rel r where r.srrelid = 'outbox.events'::regclass) as is_subscribed) s left join held h on true
group by s.is_subscribed
union all
select 'retention', case when is_late then 'warn' else 'ok' end,
    case
        when r.oldest is null then 'No events are kept.'
        when is_late then format('The oldest event is from %s. It is kept for longer than outbox_relay.published_retention (%s).', r.oldest, r.kept) ||
            coalesce(' Backend "' || (select string_agg(w.name, '", "') from waiting w) || '" has refused events: until they are accepted or fail, none of its events is purged.', '')
        else format('The oldest event is from %s.', r.oldest) end,
    case when is_late then 'Run CALL outbox.purge(); events that are still kept after that wait for a backend: see the checks above.' end
from retained r, lateral (select coalesce(r.oldest < clock_timestamp() - r.kept * 1.1 - interval '1 hour', false)
    and current_setting('outbox_relay.cleanup_published', true) = 'on') l (is_late)
union all
select 'inbox', case when is_late then 'warn' else 'ok' end,
    case
        when i.oldest is null then 'The inbox is empty.'
        when is_late then format('The oldest entry of the inbox is from %s. It is kept for longer than outbox_relay.inbox_retention (%s).', i.oldest, i.kept)
        else format('The oldest entry of the inbox is from %s.', i.oldest) end,
    case when is_late then 'If this database has no worker, run CALL outbox.purge(); each day.' end
from inbox i, lateral (select coalesce(i.oldest < clock_timestamp() - i.kept * 1.1 - interval '1 hour', false)) l (is_late)
union all
select 'bloat', case when count(d) > 0 then 'warn' else 'ok' end,
    coalesce(string_agg(format('%s has %s dead rows beside %s live ones.', d.relid::regclass, d.n_dead_tup, d.n_live_tup), ' ')
            || coalesce((select format(' VACUUM cannot remove what %s may still see.', h.words) from horizon h), ''),
        'No table has more dead rows than live ones.'),
    case when count(d) > 0 then concat_ws(' ', coalesce((select h.cure from horizon h), 'Run'), string_agg(format('VACUUM %s;', d.relid::regclass), ' ')) end
from dead d;
end
$$;
comment on function outbox.event_health(interval) is 'Part of outbox.health(): what delays events, and what keeps them for too long.';

create function outbox.as_possible_here(hint text) returns text
    language sql stable strict set search_path = pg_catalog, pg_temp
    as $$
select case
    when hint not like '%ALTER SYSTEM%' then hint
    when current_setting('allow_alter_system', true) = 'off'
        then 'ALTER SYSTEM is switched off here: make this change where the configuration of this server is kept. ' || hint
    when exists (select from regexp_matches(hint, 'ALTER SYSTEM (?:RE)?SET ([a-z_.]+)', 'g') m (words)
            join pg_settings s on s.name = m.words[1] and s.source = 'command line')
        then 'The command line that starts the server (-c) sets this, whatever ALTER SYSTEM says: change it there, and restart the server. Otherwise: ' || hint
    else hint end
$$;
comment on function outbox.as_possible_here(text) is 'Part of outbox.health(): a hint, with what to do if ALTER SYSTEM has no effect on this server.';

create function outbox.permit_views() returns void
    language c volatile
    as 'MODULE_PATHNAME', 'permit_views_wrapper';
comment on function outbox.permit_views() is 'Part of outbox.health(): lets the function that calls it read views until it ends, also in a session that may read none (restrict_nonsystem_relation_kind, which programs like pg_dump set).';

create function outbox.health(old interval default '10 min', out "check" text, out status text, out detail text, out hint text) returns setof record
    -- A session that has locked a table shall be named, not waited for. Definitions are compared as Postgres writes
    -- them.
    language plpgsql volatile security definer set search_path = pg_catalog, pg_temp set jit = off set lock_timeout = '1s'
    set standard_conforming_strings = on set quote_all_identifiers = off set work_mem = '4MB'
    as $$
declare
    part text;
    help text;
    locked_since interval := '5 s';
begin
    if to_regnamespace('outbox') is null then
        -- All the rest needs the schema by its name.
        return query select 'schema', 'fail', format('The schema of the extension is called "%s" instead of "outbox".', n.nspname),
                format('Run ALTER SCHEMA %I RENAME TO outbox;', n.nspname)
            from pg_extension e join pg_namespace n on n.oid = e.extnamespace where e.extname = 'outbox_relay';
        return;
    end if;
    if to_regprocedure('outbox.permit_views()') is not null then
        perform outbox.permit_views();
    end if;
    -- Whatever somebody has changed: where one part cannot look, the others do.
    foreach part in array '{worker,function,object,setting,backend,route,event,consumer}'::text[] loop
        begin
            case part
                when 'worker' then return query select h."check", h.status, h.detail, outbox.as_possible_here(h.hint) from outbox.worker_health() h;
                when 'function' then return query select * from outbox.function_health();
                when 'object' then return query select * from outbox.object_health();
                when 'setting' then return query select h."check", h.status, h.detail, outbox.as_possible_here(h.hint) from outbox.setting_health() h;
                when 'backend' then return query select * from outbox.backend_health();
                when 'route' then return query select * from outbox.route_health();
                when 'event' then return query select * from outbox.event_health(old);
                else return query select * from outbox.consumer_health();
            end case;
        exception
            when lock_not_available then
                -- The checks that need the table are left out.
                locked_since := '0';
                exit;
            when transaction_rollback then
                -- Whoever asks has to begin the transaction anew, and then gets an answer.
                raise;
            when others then
                get stacked diagnostics help = pg_exception_hint;
                return query select part || 's', 'fail', format('This cannot be looked at: %s.', sqlerrm),
                    coalesce(case when sqlstate = '55000' then nullif(help, '') end,
                        case when sqlstate like '42%' then 'Something of the extension was changed: see the checks "functions", "tables" and "columns".'
                            else 'It may be due to a setting of this session: SELECT name, setting, source FROM pg_settings WHERE source IN (''client'', ''session'', ''user'', ''database'', ''database user''); Otherwise see the server''s log.' end);
        end;
    end loop;
    return query select * from outbox.lock_health(locked_since);
end
$$;
comment on function outbox.health(interval) is 'Health checks: one row for each check, with status ok, warn or fail, the finding, and what helps. A transaction that is open for longer than "old" counts as old. Cheap enough to be called every 10 s; readable by pg_monitor.';
