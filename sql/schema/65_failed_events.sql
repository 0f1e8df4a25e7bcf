-- Acting on failed events: publish them again, or discard them.

create function outbox.publish_failed(seqs bigint[], event_ids uuid[]) returns bigint
    language plpgsql set search_path = pg_catalog, pg_temp
    -- A few rows of tables that may be large: by their indexes, whatever the planner knows of a table that has just
    -- grown.
    set enable_seqscan = off set enable_hashjoin = off set enable_mergejoin = off set jit = off
    as $$
declare
    free_seqs bigint[];
    free_ids uuid[];
    free_branches smallint[];
    published bigint;
begin
    -- What is there under the same id, and is not a row of the same event for another stream, is another event. As long
    -- as that waits to be sent it stays, and this one waits for it; once it has been published, or has failed too, its
    -- row makes room. Of several with one id, the first is published.
    select array_agg(k.seq), array_agg(k.event_id), array_agg(k.branch) into free_seqs, free_ids, free_branches
    from (
        select distinct on (f.event_id, f.branch) f.seq, f.event_id, f.branch
        from unnest(seqs, event_ids) g (seq, event_id) join outbox.failed_events f on f.event_id = g.event_id and f.seq = g.seq
        where not exists (select from outbox.scheduled_events s where s.event_id = f.event_id and s.branch = f.branch)
            and not exists (select from outbox.events e left join outbox.backends b on b.number = e.backend_number
                where e.event_id = f.event_id and e.branch = f.branch and e.seq <> f.seq
                    and not exists (select from outbox.failed_events o where o.event_id = e.event_id and o.seq = e.seq)
                    and (exists (select from outbox.refused_events r where r.seq = e.seq and r.accepted_in is null)
                        or not coalesce((select outbox.is_delivered(k, e.xid, e.seq) from outbox.cursors k
                            where k.backend_number in (e.backend_number, case when b.number is null then 0 end)
                                and k.slot in (-1, outbox.hash_slot(coalesce(e.stream, b.own_stream, '')))
                            order by k.backend_number desc, k.slot desc limit 1), false)))
        order by f.event_id, f.branch, f.seq
    ) k;
    if free_seqs is null then
        return 0;
    end if;
    delete from outbox.events e using unnest(free_ids, free_branches) k (event_id, branch)
        where e.event_id = k.event_id and e.branch = k.branch;
    -- With all that the trigger fills in: it may be off.
    with gone as (
        delete from outbox.failed_events f using unnest(free_seqs, free_ids) k (seq, event_id)
        where f.event_id = k.event_id and f.seq = k.seq
        returning f.*
    )
    insert into outbox.events (xid, seq, created_at, event_id, backend_number, branch, event_type, source, backend, data, subject, stream, data_schema, publisher_config, max_retries, published_by)
    select pg_current_xact_id(), outbox.draw_seq(), g.created_at, g.event_id, b.number, g.branch, g.event_type, g.source, b.name, g.data, g.subject,
        g.stream, g.data_schema, g.publisher_config, g.max_retries, g.published_by
    from (select * from gone order by seq, event_id) g
        cross join lateral (
            select n.number, n.name from outbox.backends n where n.number = g.backend_number
            union all
            select n.number, n.name from outbox.backends n
            where n.name = g.backend and not exists (select from outbox.backends o where o.number = g.backend_number)
            limit 1) b;
    get diagnostics published = row_count;
    return published;
end
$$;
comment on function outbox.publish_failed(bigint[], uuid[]) is 'Part of outbox.retry_failed(): publishes these failed events again, in their order. Returns how many; the others are left because another event with their event_id waits to be sent.';

create function outbox.retry_piece(backend text, event_type text, event_id uuid, after_seq bigint, after_id uuid, until timestamptz,
        row_count integer, out retried bigint, out used_again bigint, out refused bigint, out reason text, out last_seq bigint, out last_id uuid)
        returns record
    language plpgsql security definer set search_path = pg_catalog, pg_temp
    -- By the index that has their order: a sort would read all of them for each piece.
    set enable_seqscan = off set enable_bitmapscan = off set jit = off
    as $$
declare
    seqs bigint[];
    event_ids uuid[];
begin
    perform outbox.silence_triggers();
    retried := 0;
    refused := 0;
    select array_agg(k.seq order by k.seq, k.event_id), array_agg(k.event_id order by k.seq, k.event_id) into seqs, event_ids
    from (
        select e.seq, e.event_id
        from outbox.failed_events e
        where (e.seq, e.event_id) > (after_seq, after_id) and e.failed_at <= until
            and (retry_piece.event_type is null or e.event_type = retry_piece.event_type)
            and (retry_piece.event_id is null or e.event_id = retry_piece.event_id)
            and (exists (select from outbox.backends b where b.number = e.backend_number and (retry_piece.backend is null or b.name = retry_piece.backend))
                or (exists (select from outbox.backends b where b.name = e.backend and (retry_piece.backend is null or b.name = retry_piece.backend))
                    and not exists (select from outbox.backends n where n.number = e.backend_number)))
        order by e.seq, e.event_id
        limit row_count
        for update of e
    ) k;
    used_again := 0;
    if seqs is null then
        return;
    end if;
    last_seq := seqs[cardinality(seqs)];
    last_id := event_ids[cardinality(seqs)];
    begin
        retried := outbox.publish_failed(seqs, event_ids);
    exception when data_exception or integrity_constraint_violation or program_limit_exceeded or data_corrupted
        or index_corrupted or internal_error or plpgsql_error or undefined_object or insufficient_privilege then
        -- One of them cannot be published. It stays, and the others are published, each in a subtransaction.
        for i in 1..cardinality(seqs) loop
            begin
                retried := retried + outbox.publish_failed(seqs[i:i], event_ids[i:i]);
            exception when data_exception or integrity_constraint_violation or program_limit_exceeded or data_corrupted
                or index_corrupted or internal_error or plpgsql_error or undefined_object or insufficient_privilege then
                refused := refused + 1;
                reason := sqlerrm;
            end;
        end loop;
    end;
    used_again := cardinality(seqs) - retried - refused;
end
$$;
comment on function outbox.retry_piece(text, text, uuid, bigint, uuid, timestamptz, integer) is 'Part of outbox.retry_failed(): publishes up to row_count failed events again that come after this number and id and failed before "until". last_seq is NULL when there are no more.';

create function outbox.say_retried(retried bigint, used_again bigint, refused bigint, reason text) returns void
    language plpgsql set search_path = pg_catalog, pg_temp
    as $$
begin
    if retried > 0 then
        raise log using message = format('%s failed events are published again', retried);
    end if;
    if used_again > 0 then
        raise warning using message = format('%s failed events were not published again', used_again),
            detail = 'Other events with the same event_id wait to be sent.',
            hint = 'Retry them when the others have been published.';
    end if;
    if refused > 0 then
        raise warning using message = format('%s failed events were not published again', refused),
            detail = format('The last was refused: %s.', reason),
            hint = 'They stay in outbox.failed_events.';
    end if;
end
$$;
comment on function outbox.say_retried(bigint, bigint, bigint, text) is 'Part of outbox.retry_failed(): reports what became of the events.';

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
    if backend is not null then
        perform outbox.expect_backend_name(backend);
    end if;
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
comment on function outbox.retry_failed(text, text, uuid) is 'Publishes failed events again, with the same event_id, in their order. Returns how many. An event stays failed if it is refused, or if another event with the same event_id waits to be sent. Everything is one transaction; outbox.retry_all_failed() commits as it goes.';

-- A procedure that commits cannot have a search_path of its own.
create procedure outbox.retry_all_failed(backend text default null, event_type text default null)
    language plpgsql
    as $$
declare
    p record;
    after_seq bigint := '-9223372036854775808';
    after_id pg_catalog.uuid := '00000000-0000-0000-0000-000000000000';
    -- Events that fail again meanwhile must not be retried without end.
    until constant pg_catalog.timestamptz := pg_catalog.clock_timestamp();
    retried bigint := 0;
    used_again bigint := 0;
    refused bigint := 0;
    reason pg_catalog.text;
begin
    if backend is not null then
        perform outbox.expect_backend_name(backend);
    end if;
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
comment on procedure outbox.retry_all_failed(text, text) is 'As outbox.retry_failed(), for very many events: it commits after each 1,000, so that nobody waits for it and the first are sent at once. If it is interrupted, call it again. It ignores events that fail while it runs.';

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
        where (discard_failed.backend is null or discard_failed.backend = coalesce((select b.name from outbox.backends b where b.number = f.backend_number), f.backend))
            and (discard_failed.event_type is null or f.event_type = discard_failed.event_type)
            and (discard_failed.event_id is null or f.event_id = discard_failed.event_id)
        returning f.event_id, f.seq
    ), rows_gone as (
        delete from outbox.events e using gone g where e.event_id = g.event_id and e.seq = g.seq
    )
    select count(*) into discarded from gone g;
    if discarded > 0 then
        raise log '% failed events were discarded', discarded;
    elsif backend is not null then
        perform outbox.expect_backend_name(backend);
    end if;
    return discarded;
end
$$;
comment on function outbox.discard_failed(text, text, uuid) is 'Deletes failed events for good: those of this backend, which may have been deleted, type and id; NULL means any. Returns how many, and logs a line. See outbox.retry_failed(), which publishes them again.';
