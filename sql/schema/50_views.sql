-- Views: status, top, metrics, the status of each event.

-- The estimates of rows matter: with the default of 1,000, views on these functions look so expensive that they are
-- compiled (JIT), which takes half a second.
create function outbox.worker_status(out worker_pid integer, out state text) returns setof record
    language c volatile rows 1
    as 'MODULE_PATHNAME', 'worker_status_wrapper';
comment on function outbox.worker_status() is 'This database''s worker: its process id, and its state or the reason why there is none.';

create function outbox.backlog(backend_number integer, out pending bigint, out oldest_created_at timestamptz)
    returns setof record
    language c volatile strict rows 1
    as 'MODULE_PATHNAME', 'backlog_wrapper';
comment on function outbox.backlog(integer) is 'How many committed events of a backend lie behind its saved cursor: exact up to 10,000, an estimate above that.';

create view outbox.backend_status with (security_barrier) as
select b.name as backend,
    case
        when h.is_copy or o.is_database or (o.backend_number is not null and b.delivery <> 'exactly_once'
            and coalesce(pg_catalog.current_setting('outbox_relay.take_over', true), 'standby') = 'standby') then 'copy'
        when not b.enabled then 'paused'
        when w.state not in ('running', 'starting', 'standby') then 'stopped'
        -- It is not idle while events wait. For example, its connection is still being made.
        when coalesce(c.state, 'idle') = 'idle' and l.pending > 0
            and not l.oldest_created_at between pg_catalog.clock_timestamp() - interval '2 s'
                and pg_catalog.clock_timestamp() then 'sending'
        else coalesce(c.state, 'idle')
    end as state,
    l.pending + r.waiting as pending,
    -- The clock may have been put back since.
    case when coalesce(l.oldest_created_at, r.oldest_created_at) is not null
        then greatest(pg_catalog.clock_timestamp() - least(l.oldest_created_at, r.oldest_created_at), interval '0')
        end as oldest_pending_age,
    coalesce(c.published_total, 0) as published_total,
    coalesce(c.failed_total, 0) as failed_total,
    c.last_published_at,
    c.last_error,
    c.last_error_at,
    case when b.enabled then c.next_attempt_at end as next_attempt_at,
    coalesce(c.healings, 0) as healings,
    c.address,
    b.max_rate
from outbox.backends b
    cross join outbox.worker_status() w
    left join outbox.copied_backends o on o.backend_number = b.number
    -- No worker has been here yet to record that this is a copy.
    cross join (
        select pg_catalog.bool_or(i.database <> d.oid) as is_copy
        from outbox.installation i, pg_catalog.pg_database d where d.datname = pg_catalog.current_database()
    ) h
    cross join lateral (
        select coalesce(pg_catalog.sum(k.published_total), 0)::bigint as published_total,
            coalesce(pg_catalog.sum(k.failed_total), 0)::bigint as failed_total,
            pg_catalog.max(k.last_published_at) as last_published_at,
            coalesce(pg_catalog.sum(k.healings), 0)::bigint as healings
        from outbox.former_lanes k where k.backend_number = b.number
    ) f
    -- In a cluster this aggregates all lanes: the state of a lane with a problem comes first.
    cross join lateral (
        select (pg_catalog.array_agg(k.state order by pg_catalog.array_position(
                '{fenced,copy,misconfigured,backoff,full,sending,idle}'::text[], k.state)))[1] as state,
            pg_catalog.sum(k.published_total)::bigint + f.published_total as published_total,
            pg_catalog.sum(k.failed_total)::bigint + f.failed_total as failed_total,
            greatest(pg_catalog.max(k.last_published_at), f.last_published_at) as last_published_at,
            (pg_catalog.array_agg(k.last_error order by k.last_error_at desc nulls last))[1] as last_error,
            pg_catalog.max(k.last_error_at) as last_error_at,
            pg_catalog.min(k.next_attempt_at) as next_attempt_at,
            pg_catalog.sum(k.healings)::bigint + f.healings as healings,
            pg_catalog.string_agg(distinct k.address, ', ') as address
        from outbox.cursors k where k.backend_number = b.number
    ) c
    cross join lateral outbox.backlog(b.number) l
    cross join lateral (
        select pg_catalog.count(*) as waiting, pg_catalog.min(w.created_at) as oldest_created_at
        from (select e.created_at from outbox.refused_events f join outbox.events e on e.seq = f.seq
            where f.backend_number = b.number and f.accepted_in is null and f.seq > 0 order by f.seq limit 10000) w
    ) r;
comment on view outbox.backend_status is 'One row for each backend: its state, how many events wait, and its last error.';

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
        where pg_catalog.clock_timestamp() - c.saved_at between interval '0' and interval '5 s') as events_per_second
from outbox.worker_status() w
    cross join (
        select pg_catalog.count(*) as backends, pg_catalog.count(*) filter (where s.state = 'copy') as copies,
            coalesce(pg_catalog.sum(s.pending), 0)::bigint as pending,
            pg_catalog.max(s.oldest_pending_age) as oldest_pending_age,
            coalesce(pg_catalog.sum(s.published_total), 0)::bigint as published_total
        from outbox.backend_status s
    ) b;
comment on view outbox.status is 'The relay of this database in one row.';

-- One branch for each status, so that a query for one status reads nothing else. For a deleted backend without a
-- cursor, cursor 0 shows what was delivered, here and in other functions.
create view outbox.event_status with (security_barrier) as
select f.event_id, f.event_type, f.source, f.subject, coalesce(b.name, f.backend) as backend,
    coalesce(f.stream, b.own_stream, (select outbox.common_stream())) as stream,
    f.created_at, null::timestamptz as scheduled_at, 'failed' as status, f.attempts, f.last_error
-- Failed events are kept here longer than in outbox.events.
from outbox.failed_events f
    left join outbox.backends b on b.number = f.backend_number
union all
select e.event_id, e.event_type, e.source, e.subject, coalesce(b.name, e.backend),
    coalesce(e.stream, b.own_stream, (select outbox.common_stream())),
    e.created_at, e.scheduled_at, 'scheduled', 0, null
from outbox.scheduled_events e
    left join outbox.backends b on b.number = e.backend_number
union all
select e.event_id, e.event_type, e.source, e.subject, coalesce(b.name, e.backend),
    coalesce(e.stream, b.own_stream, (select outbox.common_stream())),
    e.created_at, null, 'pending', r.attempts, r.last_error
from outbox.refused_events r
    join outbox.events e on e.seq = r.seq
    left join outbox.backends b on b.number = e.backend_number
where r.accepted_in is null
    and not exists (select from outbox.failed_events f where f.event_id = e.event_id and f.seq = e.seq)
union all
select e.event_id, e.event_type, e.source, e.subject, coalesce(b.name, e.backend),
    coalesce(e.stream, b.own_stream, (select outbox.common_stream())),
    e.created_at, null, 'pending', 0, null
-- What not all cursors see: events of later transactions, and of transactions that were open for some cursor. A paused
-- backend's cursor stays where it is, so most of these lie behind the cursors of their own backends. (The condition on
-- their numbers is always true; it tells the planner that they are usually few.)
from (
        with own as not materialized (
            -- The first transaction that each backend's cursors do not all see (not materialized, so that the planner
            -- knows that a backend has one row),
            select o.backend_number, min(pg_snapshot_xmax(o.from_snapshot)) as since
            from outbox.cursors o group by o.backend_number offset 0
        ),
        -- and the first that not all cursors see. Without a cursor, a backend has seen nothing.
        common as materialized (
            select case when exists (select from outbox.backends s
                    where not exists (select from own where own.backend_number = s.number)) then '0'
                else coalesce((select own.since from own order by own.since limit 1), '0') end as since
        )
        select n.* from outbox.events n left join own on own.backend_number = n.backend_number
        where n.xid >= (select common.since from common)
            and n.xid <= '18446744073709551615'
            and n.seq between (select -9223372036854775808) and (select 9223372036854775807)
            and (own.since is null or n.xid >= own.since)
        union all
        select l.* from outbox.events l left join own on own.backend_number = l.backend_number
        where exists (select from outbox.cursors k, pg_snapshot_xip(k.from_snapshot))
            and l.xid = any (array(
                select running.xid from outbox.cursors k, pg_snapshot_xip(k.from_snapshot) running(xid)))
            and l.xid < coalesce(own.since, (select common.since from common))
            and l.backend_number between (select -2147483648) and (select 2147483647)
    ) e
    left join outbox.backends b on b.number = e.backend_number
    left join lateral (
        select outbox.is_delivered(k, e.xid, e.seq) as is_delivered
        from outbox.cursors k
        where k.backend_number in (e.backend_number, case when b.number is null then 0 end)
            and k.slot in (-1, outbox.hash_slot(coalesce(e.stream, b.own_stream, '')))
        order by k.backend_number desc, k.slot desc limit 1
    ) c on true
where c.is_delivered is not true
    and not exists (select from outbox.refused_events r where r.seq = e.seq and r.accepted_in is null)
    and not exists (select from outbox.failed_events f where f.event_id = e.event_id and f.seq = e.seq)
union all
(select e.event_id, e.event_type, e.source, e.subject, coalesce(b.name, e.backend),
    coalesce(e.stream, b.own_stream, (select outbox.common_stream())),
    e.created_at, null, 'published', 1, null
from outbox.events e
    left join outbox.backends b on b.number = e.backend_number
    left join lateral (
        select outbox.is_delivered(k, e.xid, e.seq) as is_delivered
        from outbox.cursors k
        where k.backend_number in (e.backend_number, case when b.number is null then 0 end)
            and k.slot in (-1, outbox.hash_slot(coalesce(e.stream, b.own_stream, '')))
        order by k.backend_number desc, k.slot desc limit 1
    ) c on true
where c.is_delivered
    and not exists (select from outbox.refused_events r where r.seq = e.seq and r.accepted_in is null)
    and not exists (select from outbox.failed_events f where f.event_id = e.event_id and f.seq = e.seq)
-- This order finds the latest few events at once.
order by e.created_at desc);
comment on view outbox.event_status is 'One row for each event, without its payload. Queries are fast by event_id, by status (except published), and for the latest events by created_at. For all other queries, add a condition on created_at.';
