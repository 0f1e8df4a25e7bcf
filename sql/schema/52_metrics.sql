-- Figures for monitoring systems and for a screen.

create function outbox.launcher_pid() returns integer
    language c volatile
    as 'MODULE_PATHNAME', 'launcher_pid_wrapper';
comment on function outbox.launcher_pid() is 'The process id of the launcher, which starts the workers of all databases; NULL: there is none.';

create function outbox.meters(out backend_number integer, out published bigint, out failed bigint, out refused bigint, out retried bigint,
        out healed bigint, out bytes bigint, out batches bigint, out reconnects bigint, out purged bigint,
        out latency_bounds text[], out latency_counts bigint[], out latency_sum double precision,
        out recent_p50 double precision, out recent_p99 double precision) returns setof record
    language c volatile rows 1
    as 'MODULE_PATHNAME', 'meters_wrapper';
comment on function outbox.meters() is 'The counters of each backend in shared memory, for outbox.metrics and outbox.top. They begin at the start of the server, except published and failed, which continue from the saved cursor. The quantiles are those of the last one to two minutes, in seconds. There is room for 2,048 backends in the whole server.';

create function outbox.short_count(count bigint) returns text
    language sql immutable parallel safe set search_path = pg_catalog, pg_temp
    as $$
select case
    when count < 100000 then count::text
    when count < 10000000 then (count / 1000)::text || 'k'
    when count < 10000000000 then (count / 1000000)::text || 'M'
    else (count / 1000000000)::text || 'G' end
$$;
comment on function outbox.short_count(bigint) is 'A count in at most five characters, for outbox.top.';

create function outbox.short_time(seconds double precision) returns text
    language sql immutable parallel safe set search_path = pg_catalog, pg_temp
    as $$
select case
    when seconds is null then null
    when seconds <= 0 then '0s'
    when seconds < 0.001 then trunc(seconds * 1000000)::text || 'us'
    when seconds < 0.01 then trunc((seconds * 1000)::numeric, 1)::text || 'ms'
    when seconds < 1 then trunc(seconds * 1000)::text || 'ms'
    when seconds < 10 then trunc(seconds::numeric, 1)::text || 's'
    when seconds < 60 then trunc(seconds)::text || 's'
    when seconds < 3600 then trunc(seconds / 60)::text || 'm'
    when seconds < 86400 then trunc(seconds / 3600)::text || 'h'
    else least(trunc(seconds / 86400), 9999)::text || 'd' end
$$;
comment on function outbox.short_time(double precision) is 'A time in at most five characters, for outbox.top.';

create function outbox.short_text(value text, columns integer) returns text
    language sql stable parallel safe set search_path = pg_catalog, pg_temp
    as $$
-- What takes three bytes in UTF-8 may be two columns wide. psql writes a control character as several.
select string_agg(s.letter, '' order by s.place)
from (
    select l.letter, l.place, sum(case when octet_length(l.letter) < case getdatabaseencoding() when 'UTF8' then 3 else 2 end then 1 else 2 end)
        over (order by l.place) as columns
    from unnest(string_to_array(regexp_replace(left(value, columns), E'[\\x01-\\x1f\\x7f-\\x9f]', '?', 'g'), null)) with ordinality l (letter, place)
) s
where s.columns <= short_text.columns
$$;
comment on function outbox.short_text(text, integer) is 'The beginning of a text in at most so many columns of a screen, for outbox.top.';

-- Pending events must be counted once for each backend. Otherwise a plan could count them for each row of another
-- table.
create view outbox.top with (security_barrier) as
with s as materialized (select * from outbox.backend_status),
t as (
    select s.*, outbox.short_count(coalesce(r.per_s, 0)) || coalesce('/' || outbox.short_count(s.max_rate), '') as per_s, m.recent_p50, m.recent_p99
    from s
        join outbox.backends b on b.name = s.backend
        left join outbox.meters() m on m.backend_number = b.number
        cross join lateral (
            select pg_catalog.sum(c.events_per_second)::bigint as per_s from outbox.cursors c
            where c.backend_number = b.number and pg_catalog.clock_timestamp() - c.saved_at between interval '0' and interval '5 s'
        ) r
)
select outbox.short_text(t.backend, 10) as backend,
    t.state,
    t.per_s,
    outbox.short_count(t.pending) as pending,
    outbox.short_time(pg_catalog.floor(extract(epoch from t.oldest_pending_age))::double precision) as lag,
    outbox.short_time(t.recent_p50) as p50,
    outbox.short_time(t.recent_p99) as p99,
    -- What a long state and a rate with its maximum take of the screen is taken from the address.
    outbox.short_text(t.address, 14 - greatest(0, pg_catalog.max(pg_catalog.length(t.state)) over ()
        + greatest(5, pg_catalog.max(pg_catalog.length(t.per_s)) over ()) - 18)) as address,
    case when t.state not in ('idle', 'sending') then outbox.short_text(t.last_error, 10) end as last_error
from t
order by t.pending desc, t.backend;
comment on view outbox.top is 'What each backend is doing, on one screen of at most 100 columns, for \watch 1 in psql. per_s: events per second, and after a slash the maximum (max_rate). lag: age of the oldest pending event. p50 and p99: within this time of their commit, half of the events, and 99 of 100, were acknowledged by Redis in the last one to two minutes.';

create view outbox.metrics with (security_barrier) as
with
m as (select * from outbox.meters()),
s as materialized (select * from outbox.backend_status),
b as materialized (select s.*, k.number, m.published, m.failed, m.refused, m.retried, m.healed, m.bytes, m.batches, m.reconnects, m.purged,
        m.latency_bounds, m.latency_counts, m.latency_sum
    from s join outbox.backends k on k.name = s.backend left join m on m.backend_number = k.number),
w as (select * from outbox.worker_status())
select v.name, v.type, pg_catalog.jsonb_build_object('backend', b.backend) as labels, v.value::double precision as value, v.help
from b cross join lateral (values
    ('outbox_relay_published_total', 'counter', coalesce(b.published, b.published_total)::double precision, 'Events that Redis has accepted.'),
    ('outbox_relay_failed_total', 'counter', coalesce(b.failed, b.failed_total), 'Events that have failed for good.'),
    ('outbox_relay_refused_total', 'counter', b.refused, 'How many times Redis has refused an event because of its content.'),
    ('outbox_relay_retried_total', 'counter', b.retried, 'How many times an event was sent again after it had been refused or had waited behind a refused one.'),
    ('outbox_relay_healings_total', 'counter', b.healings, 'How many times Redis came back without entries that it had acknowledged, which were then appended again.'),
    ('outbox_relay_healed_total', 'counter', b.healed, 'Entries that Redis had acknowledged and lost, as far as their number is known.'),
    ('outbox_relay_bytes_total', 'counter', b.bytes, 'Bytes of the batches that Redis has answered.'),
    ('outbox_relay_batches_total', 'counter', b.batches, 'Batches that Redis has answered.'),
    ('outbox_relay_reconnects_total', 'counter', b.reconnects, 'Connections to Redis that came up after an earlier one of the same worker.'),
    ('outbox_relay_purged_total', 'counter', b.purged, 'Events that were deleted after their retention.'),
    ('outbox_relay_pending_events', 'gauge', b.pending, 'Committed events that Redis has not accepted yet: exact up to 10,000, an estimate above.'),
    ('outbox_relay_max_rate', 'gauge', b.max_rate, 'Maximum number of events sent per second; only for backends with such a limit.'),
    ('outbox_relay_oldest_pending_seconds', 'gauge', coalesce(extract(epoch from b.oldest_pending_age), 0), 'Age of the oldest pending event; 0: none is pending.'),
    ('outbox_relay_last_published_timestamp_seconds', 'gauge', extract(epoch from b.last_published_at), 'When Redis last accepted an event.'),
    ('outbox_relay_last_error_timestamp_seconds', 'gauge', extract(epoch from b.last_error_at), 'When the last error occurred.'),
    ('outbox_relay_commit_to_acknowledgement_seconds_sum', 'histogram', b.latency_sum, 'The sum of all times from commit to acknowledgement.'),
    ('outbox_relay_commit_to_acknowledgement_seconds_count', 'histogram', b.latency_counts[pg_catalog.cardinality(b.latency_counts)], 'Events whose time from commit to acknowledgement was counted.')
) v (name, type, value, help)
where v.value is not null
union all
select 'outbox_relay_commit_to_acknowledgement_seconds_bucket', 'histogram', pg_catalog.jsonb_build_object('backend', b.backend, 'le', l.le), l.count,
    'Events that were acknowledged by Redis within "le" seconds of their commit.'
from b cross join lateral rows from (pg_catalog.unnest(b.latency_bounds), pg_catalog.unnest(b.latency_counts)) l (le, count)
union all
select 'outbox_relay_backend_state', 'gauge', pg_catalog.jsonb_build_object('backend', b.backend, 'state', s.state),
    (s.state = b.state)::integer, 'What a backend is doing: 1 for its state, 0 for the others.'
from b cross join pg_catalog.unnest('{idle,sending,backoff,paused,misconfigured,fenced,copy,full,stopped}'::text[]) s (state)
union all
select 'outbox_relay_refused_events', 'gauge', pg_catalog.jsonb_build_object('backend', b.backend),
    (select pg_catalog.count(*) from (select from outbox.refused_events r
        where r.backend_number = b.number and r.accepted_in is null and r.seq > 0 limit 10000) r),
    'Refused events that are retried, and events that wait behind them in their streams: counted up to 10,000.'
from b
union all
select 'outbox_relay_worker_state', 'gauge', pg_catalog.jsonb_build_object('state', s.state), (s.state = w.state)::integer,
    'What the worker is doing, or why no worker runs: 1 for its state, 0 for the others.'
from w cross join (values ('running'), ('hanging'), ('standby'), ('starting'), ('library not in shared_preload_libraries'), ('disabled'),
    ('database not in outbox_relay.databases'), ('connections not allowed'), ('version mismatch'), ('waiting for a background worker process'),
    ('no slot in shared memory'), ('waiting for the launcher'), ('failing to start'), ('stopped')) s (state)
union all
select t.name, 'gauge', '{}'::jsonb, t.value, t.help
from (values
    ('outbox_relay_worker_up', (select (w.state in ('running', 'standby'))::integer::double precision from w),
        '1: this database has a worker, or the server is a standby.'),
    ('outbox_relay_launcher_up', (outbox.launcher_pid() is not null or pg_catalog.pg_is_in_recovery())::integer,
        '1: the process that starts the workers of all databases is running, or the server is a standby.'),
    ('outbox_relay_unmetered_backends', (select pg_catalog.count(*) from b where b.published is null),
        'Backends with fewer metrics, because there are more than shared memory has room for, or because no worker has started yet.'),
    ('outbox_relay_routes', (select pg_catalog.count(*) from outbox.routes r where r.enabled), 'Routes that are enabled.'),
    ('outbox_relay_scheduled_events', (select pg_catalog.count(*) from (select from outbox.scheduled_events limit 10000) s),
        'Events that are not due yet: counted up to 10,000.'),
    ('outbox_relay_failed_events', (select pg_catalog.count(*) from (select from outbox.failed_events limit 10000) f),
        'Retained failed events: counted up to 10,000.'),
    ('outbox_relay_retained_events', (select greatest(c.reltuples, 0) from pg_catalog.pg_class c where c.oid = 'outbox.events'::regclass),
        'Rows of outbox.events, as estimated by the last vacuum or analyze.'),
    ('outbox_relay_retained_bytes', pg_catalog.pg_total_relation_size('outbox.events'), 'Size of outbox.events with its indexes.'),
    ('outbox_relay_oldest_retained_timestamp_seconds', (select extract(epoch from pg_catalog.min(e.created_at)) from outbox.events e),
        'When the oldest retained event was published.'),
    ('outbox_relay_inbox_entries', (select greatest(c.reltuples, 0) from pg_catalog.pg_class c where c.oid = 'outbox.inbox'::regclass),
        'Events that consumers have recorded in the inbox, as estimated by the last vacuum or analyze.'),
    ('outbox_relay_oldest_inbox_timestamp_seconds', (select extract(epoch from pg_catalog.min(i.consumed_at)) from outbox.inbox i),
        'When the oldest event of the inbox was recorded.'),
    ('outbox_relay_read_timestamp_seconds', extract(epoch from pg_catalog.clock_timestamp()),
        'When these figures were read. Some exporters continue to show the last figures while the server does not answer.')
) t (name, value, help)
where t.value is not null;
comment on view outbox.metrics is 'Figures for a monitoring system: name, type (counter, gauge or histogram), labels, value, help. They contain no event ids, streams or payloads. Counters are kept in shared memory, where they survive the worker''s end; published, failed and healings also survive a restart of the server. The histogram outbox_relay_commit_to_acknowledgement_seconds counts events as Prometheus does: _bucket with the label le, _sum and _count.';
