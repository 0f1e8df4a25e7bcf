-- Consumers: how far the consumer groups of the streams are, according to Redis.

create table outbox.consumer_groups (
    backend_number    integer not null,
    -- As in outbox.cursors.
    slot              integer not null,
    stream            text not null,
    length            bigint not null,
    -- NULL: the stream has no group, or Redis could not be asked about it.
    consumer_group    text,
    consumers         bigint,
    pending           bigint,
    lag               bigint,
    unread            bigint,
    oldest_pending_at timestamptz,
    -- Why Redis could not be asked about the stream.
    error             text,
    asked_at          timestamptz not null
) with (autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 1000);
create index consumer_groups_stream_idx on outbox.consumer_groups (backend_number, slot, stream);
-- For the streams that were asked about last, and those that were not for long.
create index consumer_groups_asked_at_idx on outbox.consumer_groups (backend_number, slot, asked_at);
comment on table outbox.consumer_groups is 'The last answers of Redis about the consumer groups of each stream. See outbox.consumers.';

create function outbox.want_consumers() returns boolean
    language c volatile
    as 'MODULE_PATHNAME', 'want_consumers_wrapper';
comment on function outbox.want_consumers() is 'Makes the worker ask Redis about consumer groups once a second, for a minute. outbox.consumers calls it.';

create function outbox.probe_consumers() returns boolean
    language c volatile
    as 'MODULE_PATHNAME', 'probe_consumers_wrapper';
comment on function outbox.probe_consumers() is 'Makes the worker ask Redis about consumer groups each five seconds, for a minute. True: it did so before. outbox.health() calls it.';

create view outbox.consumers with (security_barrier) as
select b.name as backend, g.stream, g.consumer_group, g.consumers, g.pending, g.lag, g.unread,
    case when g.pending > 0 then greatest(pg_catalog.clock_timestamp() - g.oldest_pending_at, interval '0') end as oldest_pending_age,
    g.asked_at as updated_at
from outbox.consumer_groups g
    join outbox.backends b on b.number = g.backend_number
where g.consumer_group is not null
    -- Evaluated first, even if there are no rows.
    and (select outbox.want_consumers());
comment on view outbox.consumers is 'The consumer groups of each backend''s streams: consumers, pending (delivered, not acknowledged), lag (as Redis counts it, from 7.0 on), unread (not delivered, as far as that is known). The worker asks Redis once a second while somebody reads this view, and for a minute after; updated_at is the time of the last answer. outbox.health() reports why Redis cannot be asked.';
