-- Acting on events that were sent or have failed: erase their payload.

create function outbox.waits(event_id uuid) returns boolean
    language sql stable set search_path = pg_catalog, pg_temp
    -- By the indexes: of a table that has just grown, or of an id that is not there, the planner expects that a scan of
    -- the table finds one soon.
    set enable_seqscan = off set jit = off
    as $$
select exists (select from outbox.scheduled_events s where s.event_id = waits.event_id)
    or exists (select from outbox.held_events h where h.event_id = waits.event_id)
    or exists (select from outbox.events e left join outbox.backends b on b.number = e.backend_number
        where e.event_id = waits.event_id
            and not exists (select from outbox.failed_events f where f.event_id = e.event_id and f.seq = e.seq)
            -- No EXISTS here: that might be planned as a hash of all of them.
            and (coalesce((select true from outbox.refused_events r
                    where r.seq = e.seq and r.accepted_in is null limit 1), false)
                or not coalesce((select outbox.is_delivered(c, e.xid, e.seq) from outbox.cursors c
                    where c.backend_number in (e.backend_number, case when b.number is null then 0 end)
                        and c.slot in (-1, outbox.hash_slot(coalesce(e.stream, b.own_stream, '')))
                    order by c.backend_number desc, c.slot desc limit 1), false)))
$$;
comment on function outbox.waits(uuid) is 'Whether an event with this id is scheduled, held, or neither known to be in its stream nor failed.';

create function outbox.erase(event_id uuid) returns boolean
    language plpgsql volatile security definer set search_path = pg_catalog, pg_temp
    set enable_seqscan = off set jit = off
    as $$
declare
    erased bigint := 0;
    changed bigint;
begin
    if event_id is null then
        raise exception using errcode = 'null_value_not_allowed', message = 'event_id must not be null';
    end if;
    perform outbox.silence_triggers();
    for i in 1..40 loop
        -- First, as retry_failed() and discard_failed() do, which then delete rows of outbox.events: in another order,
        -- this would be a deadlock.
        perform from outbox.failed_events f where f.event_id = erase.event_id order by f.seq for update;
        if not outbox.waits(event_id) then
            update outbox.events e set data = null, subject = null, publisher_config = outbox.erased_config()
                where e.event_id = erase.event_id
                    and (e.data is not null or e.subject is not null
                        or e.publisher_config::text is distinct from outbox.erased_config()::text);
            get diagnostics changed = row_count;
            erased := erased + changed;
            update outbox.failed_events f set data = null, subject = null, publisher_config = outbox.erased_config()
                where f.event_id = erase.event_id
                    and (f.data is not null or f.subject is not null
                        or f.publisher_config::text is distinct from outbox.erased_config()::text);
            get diagnostics changed = row_count;
            erased := erased + changed;
            -- A retry or a replay that has just been committed may have moved it.
            if not outbox.waits(event_id) and not exists (select from outbox.events e
                where e.event_id = erase.event_id
                    and e.publisher_config::text is distinct from outbox.erased_config()::text) then
                if erased > 0 then
                    raise log using message = format('the payload of event %s was erased', event_id);
                end if;
                return erased > 0;
            end if;
        end if;
        exit when i = 40 or current_setting('transaction_isolation') not in ('read committed', 'read uncommitted');
        -- The saved cursor may lag behind recent deliveries, so this lets the worker save it.
        perform outbox.wake();
        perform outbox.rest(0.05);
    end loop;
    raise exception using errcode = 'object_not_in_prerequisite_state',
        message = format('event %s waits to be sent', event_id),
        detail = 'Its payload can be erased when the event is known to be in its stream, or has failed.',
        hint = format('Wait for it: SELECT outbox.wait_published(%L);. If it must not be sent, delete it: DELETE FROM outbox.events WHERE event_id = %L; or, if it is scheduled, from outbox.scheduled_events.',
            event_id, event_id);
end
$$;
comment on function outbox.erase(uuid) is 'Erases the payload (data, subject and publisher_config) of an event that was sent or has failed. Returns whether it had one: false also if there is no such event, or not any more. If the event is appended again (healing, replay, retry), its entry has the same event_id, no payload, and the field "erased". An event that waits to be sent is refused. Entries in Redis stay as they are.';
