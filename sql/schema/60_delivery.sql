-- Acting on delivery: waking the worker, purging, waiting until events are sent.

create function outbox.wake() returns void
    language c volatile
    as 'MODULE_PATHNAME', 'wake_wrapper';
comment on function outbox.wake() is 'Wakes this database''s worker. A backend in backoff tries again at once, but at most once a second. Its backoff then continues as before.';

create function outbox.purge_piece(backend_number integer, after_seq bigint, row_count integer, out deleted bigint, out last_seq bigint) returns setof record
    language c volatile strict
    as 'MODULE_PATHNAME', 'purge_piece_wrapper';
comment on function outbox.purge_piece(integer, bigint, integer) is 'Deletes some sent events of a backend whose retention has ended. Pass last_seq to the next call; NULL means that all are deleted.';

create function outbox.retention(setting text) returns interval
    language c stable strict
    as 'MODULE_PATHNAME', 'retention_of_wrapper';
comment on function outbox.retention(text) is 'One of the settings outbox_relay.*_retention, even if the library is not preloaded; NULL: everything is kept.';

-- A procedure that commits cannot have a search_path of its own.
create procedure outbox.purge()
    language plpgsql
    as $$
declare
    c record;
    after_seq bigint;
    retention interval;
    -- From here on there are rows. Before it are those that have gone, which are passed one by one while an old
    -- snapshot needs them.
    after_time pg_catalog.timestamptz := '-infinity';
begin
    -- Deleted backends have only ticks.
    for c in select k.backend_number from outbox.cursors k union select t.backend_number from outbox.ticks t order by 1 loop
        after_seq := 0;
        loop
            select p.last_seq into after_seq from outbox.purge_piece(c.backend_number, after_seq, 1000) p;
            commit;
            exit when after_seq is null;
        end loop;
    end loop;
    retention := outbox.retention('failed_retention');
    while retention is not null loop
        with gone as (
            delete from outbox.failed_events f
            where f.ctid operator(pg_catalog.=) any (array(select o.ctid from outbox.failed_events o
                where o.failed_at operator(pg_catalog.>=) after_time
                    and o.failed_at operator(pg_catalog.<) (pg_catalog.clock_timestamp() operator(pg_catalog.-) retention)
                order by o.failed_at limit 1000))
            returning f.failed_at
        )
        select pg_catalog.max(g.failed_at) into after_time from gone g;
        exit when after_time is null;
        commit;
    end loop;
    after_time := '-infinity';
    retention := outbox.retention('inbox_retention');
    while retention is not null loop
        with gone as (
            delete from outbox.inbox i
            where i.ctid operator(pg_catalog.=) any (array(select o.ctid from outbox.inbox o
                where o.consumed_at operator(pg_catalog.>=) after_time
                    and o.consumed_at operator(pg_catalog.<) (pg_catalog.clock_timestamp() operator(pg_catalog.-) retention)
                order by o.consumed_at limit 1000))
            returning i.consumed_at
        )
        select pg_catalog.max(g.consumed_at) into after_time from gone g;
        exit when after_time is null;
        commit;
    end loop;
end
$$;
comment on procedure outbox.purge() is 'Deletes sent and failed events, and entries of the inbox, whose retention has ended, and commits after each step. A worker does the same by itself.';

create function outbox.rest(seconds double precision) returns void
    language c volatile strict
    as 'MODULE_PATHNAME', 'rest_for_wrapper';
comment on function outbox.rest(double precision) is 'As pg_sleep(), which sleeps for as long as somebody puts the clock back meanwhile; this does not.';

create function outbox.wait_for(seen text, seconds double precision) returns boolean
    language c volatile strict
    as 'MODULE_PATHNAME', 'wait_for_wrapper';
comment on function outbox.wait_for(text, double precision) is 'Part of outbox.drain(): waits until no event that a snapshot sees waits to be sent. It looks at what is committed, whatever the isolation of its transaction, and its time passes whatever is done to the clock.';

create function outbox.wait_for_event(event_id uuid, seconds double precision) returns boolean
    language c volatile strict
    as 'MODULE_PATHNAME', 'wait_for_event_wrapper';
comment on function outbox.wait_for_event(uuid, double precision) is 'Part of outbox.wait_published(): the same until an event is sent, if the current user may know of it.';

create function outbox.is_sent(event_id uuid, caller oid) returns boolean
    language plpgsql stable set search_path = pg_catalog, pg_temp
    set enable_seqscan = off set jit = off
    as $$
begin
    -- An event of somebody else is as if it did not exist.
    return (coalesce(has_table_privilege(caller, 'outbox.event_status', 'select'), false)
            or exists (select from outbox.events e where e.event_id = is_sent.event_id and pg_has_role(caller, e.published_by, 'usage')))
        and exists (select from outbox.event_status s where s.event_id = is_sent.event_id and s.status = 'published')
        -- If the event goes to several streams, all of its rows count.
        and not outbox.waits(event_id)
        and not exists (select from outbox.failed_events f where f.event_id = is_sent.event_id
            and not exists (select from outbox.events e where e.event_id = f.event_id and e.branch = f.branch and e.seq <> f.seq));
end
$$;
comment on function outbox.is_sent(uuid, oid) is 'Part of outbox.wait_published(): whether an event of this role, or any event if the role may read outbox.event_status, is known to be in all its streams.';

-- It runs with the rights of its caller: within a function, view or index of somebody else, the session's role is not
-- the one that asks.
create function outbox.wait_published(event_id uuid, timeout interval default '10s') returns boolean
    language plpgsql volatile set search_path = pg_catalog, pg_temp
    as $$
begin
    if event_id is null or timeout is null then
        raise exception using errcode = 'null_value_not_allowed', message = 'event_id and timeout must not be null',
            hint = 'Pass the id that outbox.publish_event returned; it is null if a trigger has left the event out.';
    end if;
    return outbox.wait_for_event(event_id, extract(epoch from timeout)::double precision);
end
$$;
comment on function outbox.wait_published(uuid, interval) is 'Waits until an event is known to be in its stream; if routes send it to several, in all of them. Returns false if that takes longer than the timeout. Call it after the commit. A publisher can wait for events of its own role, or of roles that it is a member of; to wait for any event needs the right to read outbox.event_status, which pg_monitor has.';

create function outbox.waits_since(seen pg_snapshot) returns boolean
    language sql stable set search_path = pg_catalog, pg_temp
    -- By the indexes: of a table that has just grown, or of an id that is not there, the planner expects that a scan of
    -- the table finds one soon.
    set enable_seqscan = off set jit = off
    as $$
-- The cursor of a backend that is paused for long stays where it is. So most events since then lie behind the cursors
-- of their own backends, and one comparison shows that.
with own as materialized (
    select b.number, b.own_stream, min(pg_snapshot_xmin(c.from_snapshot)) as since
    from outbox.backends b left join outbox.cursors c on c.backend_number = b.number
    group by b.number, b.own_stream
)
-- An event that was committed by then and lies behind no cursor.
select exists (
    select from outbox.events e join own o on o.number = e.backend_number and coalesce(o.since, '0') <= e.xid
    where e.xid >= coalesce((select min(f.since) from own f), '0')
        and e.xid < pg_snapshot_xmax(seen) and pg_visible_in_snapshot(e.xid, seen)
        and not coalesce((select outbox.is_delivered(c, e.xid, e.seq) from outbox.cursors c
            where c.backend_number = e.backend_number and c.slot in (-1, outbox.hash_slot(coalesce(e.stream, o.own_stream, '')))
            order by c.slot desc limit 1), false)
) or exists (
    select from outbox.refused_events r join outbox.events e on e.seq = r.seq
    where r.accepted_in is null and r.seq > 0 and pg_visible_in_snapshot(e.xid, seen)
)
$$;
comment on function outbox.waits_since(pg_snapshot) is 'Whether some event that this snapshot sees is not yet known to be in its stream and has not failed.';

create function outbox.drain(timeout interval default '10s') returns boolean
    language plpgsql volatile security definer set search_path = pg_catalog, pg_temp
    as $$
begin
    if timeout is null then
        raise exception using errcode = 'null_value_not_allowed', message = 'timeout must not be null',
            hint = 'Pass how long to wait, such as ''10 s''.';
    end if;
    perform outbox.wake();
    return outbox.wait_for(pg_current_snapshot()::text, extract(epoch from timeout)::double precision);
end
$$;
comment on function outbox.drain(interval) is 'Waits until all events that were committed before it was called are in their streams, or have failed; false if that takes longer than the timeout. It also waits for events of a paused backend and for refused events, but not for scheduled events that are not due. Call it outside a transaction.';
