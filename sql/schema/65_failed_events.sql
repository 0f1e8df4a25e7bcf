-- Acting on failed events: publish them again, or discard them.

create function outbox.publish_failed(failed outbox.failed_events, backend text) returns boolean
    language plpgsql set search_path = pg_catalog, pg_temp
    as $$
begin
    -- What is there under the same id, and is not a row of the same event for another stream, is another event. As long as that waits to be sent it stays, and this one waits
    -- for it; once it has been published, or has failed too, its row makes room.
    if exists (select from outbox.scheduled_events s where s.event_id = failed.event_id and s.branch = failed.branch)
        or exists (select from outbox.events e left join outbox.backends b on b.number = e.backend_number
            where e.event_id = failed.event_id and e.branch = failed.branch and e.seq <> failed.seq
                and not exists (select from outbox.failed_events o where o.event_id = e.event_id and o.seq = e.seq)
                and (exists (select from outbox.refused_events r where r.seq = e.seq and r.accepted_in is null)
                    or not coalesce((select outbox.is_delivered(k, e.xid, e.seq) from outbox.cursors k
                        where k.backend_number in (e.backend_number, case when b.number is null then 0 end)
                            and k.slot in (-1, outbox.hash_slot(coalesce(e.stream, b.own_stream, '')))
                        order by k.backend_number desc, k.slot desc limit 1), false))) then
        return false;
    end if;
    delete from outbox.failed_events e where e.event_id = failed.event_id and e.seq = failed.seq;
    delete from outbox.events e where e.event_id = failed.event_id and e.branch = failed.branch;
    -- With all that the trigger fills in: it may be off.
    insert into outbox.events (xid, seq, created_at, event_id, backend_number, branch, event_type, source, backend, data, subject, stream, data_schema, publisher_config, max_retries, published_by)
        values (pg_current_xact_id(), outbox.draw_seq(), failed.created_at, failed.event_id, (outbox.expect_backend(publish_failed.backend)).number,
            failed.branch, failed.event_type, failed.source, publish_failed.backend, failed.data, failed.subject,
            failed.stream, failed.data_schema, failed.publisher_config, failed.max_retries, failed.published_by);
    return found;
end
$$;
comment on function outbox.publish_failed(outbox.failed_events, text) is 'Publishes one failed event again; false if another event with its event_id waits to be sent.';

create function outbox.retry_piece(backend text, event_type text, event_id uuid, after_seq bigint, after_id uuid, until timestamptz,
        row_count integer, out retried bigint, out used_again bigint, out refused bigint, out reason text, out last_seq bigint, out last_id uuid)
        returns record
    language plpgsql security definer set search_path = pg_catalog, pg_temp
    as $$
declare
    f record;
    one_by_one boolean := false;
begin
    perform outbox.silence_triggers();
    loop
        retried := 0;
        used_again := 0;
        refused := 0;
        last_seq := null;
        last_id := null;
        begin
            for f in
                select e as event, b.name as backend_name, e.seq, e.event_id
                from outbox.failed_events e
                    join outbox.backends b on b.number = e.backend_number
                        or (b.name = e.backend and not exists (select from outbox.backends n where n.number = e.backend_number))
                where (e.seq, e.event_id) > (after_seq, after_id) and e.failed_at <= until
                    and (retry_piece.backend is null or b.name = retry_piece.backend)
                    and (retry_piece.event_type is null or e.event_type = retry_piece.event_type)
                    and (retry_piece.event_id is null or e.event_id = retry_piece.event_id)
                order by e.seq, e.event_id
                limit row_count
                for update of e
            loop
                last_seq := f.seq;
                last_id := f.event_id;
                if one_by_one then
                    begin
                        if outbox.publish_failed(f.event, f.backend_name) then
                            retried := retried + 1;
                        else
                            used_again := used_again + 1;
                        end if;
                    exception when data_exception or integrity_constraint_violation or program_limit_exceeded or data_corrupted
                        or index_corrupted or internal_error or plpgsql_error or undefined_object or insufficient_privilege then
                        refused := refused + 1;
                        reason := sqlerrm;
                    end;
                elsif outbox.publish_failed(f.event, f.backend_name) then
                    retried := retried + 1;
                else
                    used_again := used_again + 1;
                end if;
            end loop;
            return;
        exception when data_exception or integrity_constraint_violation or program_limit_exceeded or data_corrupted
            or index_corrupted or internal_error or plpgsql_error or undefined_object or insufficient_privilege then
            if one_by_one then
                raise;
            end if;
            -- One of them cannot be published. It stays, and the others are published, each in a subtransaction.
            one_by_one := true;
        end;
    end loop;
end
$$;
comment on function outbox.retry_piece(text, text, uuid, bigint, uuid, timestamptz, integer) is 'Part of outbox.retry_failed(): publishes up to row_count failed events again that come after this number and id, and failed until then. last_seq is NULL when there are no more.';

create function outbox.say_retried(retried bigint, used_again bigint, refused bigint, reason text) returns void
    language plpgsql set search_path = pg_catalog, pg_temp
    as $$
begin
    if retried > 0 then
        raise log using message = format('%s failed events are published again', retried);
    end if;
    if used_again > 0 then
        raise warning using message = format('%s failed events were not published again', used_again),
            detail = 'Other events with their event_id wait to be sent.',
            hint = 'Retry them when those have been published.';
    end if;
    if refused > 0 then
        raise warning using message = format('%s failed events were not published again', refused),
            detail = format('The last was refused: %s.', reason),
            hint = 'They stay in outbox.failed_events.';
    end if;
end
$$;
comment on function outbox.say_retried(bigint, bigint, bigint, text) is 'Part of outbox.retry_failed(): tells what became of the events.';

create function outbox.retry_failed(backend text default null, event_type text default null, event_id uuid default null) returns bigint
    language plpgsql security definer set search_path = pg_catalog, pg_temp
    as $$
declare
    p record;
    after_seq bigint := -9223372036854775808;
    after_id uuid := '00000000-0000-0000-0000-000000000000';
    retried bigint := 0;
    used_again bigint := 0;
    refused bigint := 0;
    reason text;
begin
    loop
        select * into p from outbox.retry_piece(backend, event_type, event_id, after_seq, after_id, 'infinity', 1000) r;
        exit when p.last_seq is null;
        after_seq := p.last_seq;
        after_id := p.last_id;
        retried := retried + p.retried;
        used_again := used_again + p.used_again;
        refused := refused + p.refused;
        reason := coalesce(p.reason, reason);
    end loop;
    perform outbox.say_retried(retried, used_again, refused, reason);
    return retried;
end
$$;
comment on function outbox.retry_failed(text, text, uuid) is 'Publishes failed events again, with the same event_id, in their order. Returns how many. An event stays failed if it is refused, or if another event with its event_id waits to be sent. All are one transaction; outbox.retry_all_failed() commits as it goes.';

-- A procedure that commits cannot have a search_path of its own.
create procedure outbox.retry_all_failed(backend text default null, event_type text default null)
    language plpgsql
    as $$
declare
    p record;
    after_seq bigint := '-9223372036854775808';
    after_id pg_catalog.uuid := '00000000-0000-0000-0000-000000000000';
    -- Events that fail again meanwhile are not retried without end.
    until constant pg_catalog.timestamptz := pg_catalog.clock_timestamp();
    retried bigint := 0;
    used_again bigint := 0;
    refused bigint := 0;
    reason pg_catalog.text;
begin
    loop
        select * into p from outbox.retry_piece(backend, event_type, null, after_seq, after_id, until, 1000) r;
        commit;
        exit when p.last_seq is null;
        after_seq := p.last_seq;
        after_id := p.last_id;
        retried := retried operator(pg_catalog.+) p.retried;
        used_again := used_again operator(pg_catalog.+) p.used_again;
        refused := refused operator(pg_catalog.+) p.refused;
        reason := coalesce(p.reason, reason);
    end loop;
    perform outbox.say_retried(retried, used_again, refused, reason);
end
$$;
comment on procedure outbox.retry_all_failed(text, text) is 'As outbox.retry_failed(), for very many events: commits after each 1,000, so that nobody waits for it and the first are sent at once. If it is interrupted, call it again. Events that fail while it runs are left.';

create function outbox.discard_failed(backend text default null, event_type text default null, event_id uuid default null) returns bigint
    language plpgsql security definer set search_path = pg_catalog, pg_temp
    as $$
declare
    discarded bigint;
begin
    perform outbox.silence_triggers();
    -- With their rows among the others: these would look like published ones, and be replayed.
    with gone as (
        delete from outbox.failed_events f
        where (discard_failed.backend is null or f.backend = discard_failed.backend)
            and (discard_failed.event_type is null or f.event_type = discard_failed.event_type)
            and (discard_failed.event_id is null or f.event_id = discard_failed.event_id)
        returning f.event_id, f.seq
    ), rows_gone as (
        delete from outbox.events e using gone g where e.event_id = g.event_id and e.seq = g.seq
    )
    select count(*) into discarded from gone g;
    if discarded > 0 then
        raise log '% failed events were discarded', discarded;
    end if;
    return discarded;
end
$$;
comment on function outbox.discard_failed(text, text, uuid) is 'Deletes failed events for good: those of this backend, type and id, NULL means any. Returns how many; the server''s log has a line. See outbox.retry_failed(), which publishes them again.';
