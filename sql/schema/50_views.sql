-- What can be looked at: status, top, metrics, the status of each event.

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
