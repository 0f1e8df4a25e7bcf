-- Dumps contain backends, and events that have not been sent. Cursors mean nothing in another cluster. The inbox is
-- dumped together with the data that its consumers have written: without it, a restored consumer would handle events
-- again.

select pg_catalog.pg_extension_config_dump('outbox.backends', '');
select pg_catalog.pg_extension_config_dump('outbox.backends_number_seq', '');
select pg_catalog.pg_extension_config_dump('outbox.routes', '');
select pg_catalog.pg_extension_config_dump('outbox.routes_number_seq', '');
select pg_catalog.pg_extension_config_dump('outbox.publisher_limits', '');
select pg_catalog.pg_extension_config_dump('outbox.events', $$
    where not coalesce((select outbox.is_delivered(c, events.xid, events.seq) from outbox.cursors c
        where c.backend_number in (events.backend_number,
                case when not exists (select from outbox.backends b where b.number = events.backend_number) then 0 end)
            and c.slot in (-1, outbox.hash_slot(coalesce(events.stream,
                (select b.own_stream from outbox.backends b where b.number = events.backend_number), '')))
        order by c.backend_number desc, c.slot desc limit 1), false)
        or exists (select from outbox.refused_events r where r.seq = events.seq and r.accepted_in is null)
    order by events.seq$$);
select pg_catalog.pg_extension_config_dump('outbox.events_seq_seq', '');
select pg_catalog.pg_extension_config_dump('outbox.scheduled_events', 'order by scheduled_at, seq');
select pg_catalog.pg_extension_config_dump('outbox.failed_events', '');
select pg_catalog.pg_extension_config_dump('outbox.inbox', '');
select pg_catalog.pg_extension_config_dump('outbox.consumer_grants', '');
