-- Who owns a backend's streams: guard keys, copies, taking over.

create function outbox.expect_backend(name text) returns outbox.backends
    language plpgsql stable set search_path = pg_catalog, pg_temp
    as $$
declare
    found_backend outbox.backends;
begin
    select * into found_backend from outbox.backends b where b.name = expect_backend.name;
    if not found then
        perform outbox.expect_backend_name(name);
    end if;
    return found_backend;
end
$$;
comment on function outbox.expect_backend(text) is 'The backend of this name. Raises an ERROR with an explanation if there is none.';

create function outbox.guard_key(backend text, stream text) returns text
    language sql stable security definer set search_path = pg_catalog, pg_temp
    as $$
select format('outbox_relay:guard:%s:%s:%s', i.id, d.oid, b.number)
    || case when b.mode = 'cluster' then
        format(':{%s}', outbox.hash_tag(outbox.hash_slot(coalesce(guard_key.stream, b.own_stream)))) else '' end
from outbox.installation i, pg_catalog.pg_database d, outbox.expect_backend(backend) b
where d.datname = current_database()
$$;
comment on function outbox.guard_key(text, text) is 'In a cluster, the key of the backend''s guard in the hash slot of this stream. NULL means the backend''s own stream.';

create function outbox.guard_key(backend text) returns text
    language sql stable security definer set search_path = pg_catalog, pg_temp
    as $$
select outbox.guard_key(backend, null)
$$;
comment on function outbox.guard_key(text) is 'Key of a backend''s guard in Redis: a hash that names the owner of the streams and the last batch. In a cluster, the guard in the hash slot of the backend''s own stream.';

create function outbox.publish_held(b outbox.backends, only_id uuid default null, only_branch smallint default null) returns bigint
    language plpgsql set search_path = pg_catalog, pg_temp
    as $$
declare
    accepted bigint;
begin
    with gone as (
        delete from outbox.held_events h where h.backend = b.name
            and (only_id is null or (h.event_id, h.branch) = (only_id, only_branch)) returning h.*
    )
    insert into outbox.events (xid, seq, created_at, event_id, backend_number, branch, event_type, source, backend, data, subject, stream,
            data_schema, publisher_config, max_retries)
        select pg_current_xact_id(), outbox.draw_seq(), g.created_at, g.event_id, b.number, g.branch, g.event_type, g.source, b.name, g.data,
            g.subject, g.stream, g.data_schema, g.publisher_config, g.max_retries
        -- Sorted last, because a join (since Postgres 16 a right anti-join) need not keep the order of its input.
        from (select * from gone
            where not exists (select from outbox.events e where e.event_id = gone.event_id and e.branch = gone.branch)
                and not exists (select from outbox.failed_events f where f.event_id = gone.event_id and f.branch = gone.branch)
            order by gone.seq) g;
    get diagnostics accepted = row_count;
    return accepted;
end
$$;
comment on function outbox.publish_held(outbox.backends, uuid, smallint) is 'Part of outbox.accept_held(): publishes held events, all of a backend or one. Returns how many.';

create function outbox.accept_held(backend text) returns bigint
    language plpgsql security definer set search_path = pg_catalog, pg_temp
    as $$
declare
    b outbox.backends := outbox.expect_backend(backend);
    sent bigint;
    accepted bigint;
    refused bigint := 0;
    scheduled bigint;
    held record;
    reason text;
begin
    perform outbox.silence_triggers();
    -- The other server has sent these, as far as that is known.
    delete from outbox.held_events h
        where h.backend = b.name
            and not exists (select from outbox.held_refused r where r.seq = h.seq)
            and exists (select from outbox.held_cursors c
                where c.backend_number = h.backend_number
                    and (c.slot = outbox.hash_slot(coalesce(h.stream, b.own_stream, ''))
                        or c.slot = -1 and not exists (select from outbox.held_cursors l where l.backend_number = c.backend_number and l.slot >= 0))
                    and (pg_visible_in_snapshot(h.xid, c.from_snapshot)
                        or pg_visible_in_snapshot(h.xid, c.to_snapshot) and h.seq <= c.last_seq));
    get diagnostics sent = row_count;
    begin
        accepted := outbox.publish_held(b);
    exception when data_exception or integrity_constraint_violation or program_limit_exceeded or data_corrupted
        or index_corrupted or internal_error or plpgsql_error or undefined_object or insufficient_privilege then
        -- One of them is refused here. It fails alone, and the others are published, each in a subtransaction.
        accepted := 0;
        for held in select h.event_id, h.branch from outbox.held_events h where h.backend = b.name order by h.seq loop
            begin
                accepted := accepted + outbox.publish_held(b, held.event_id, held.branch);
            exception when data_exception or integrity_constraint_violation or program_limit_exceeded or data_corrupted
                or index_corrupted or internal_error or plpgsql_error or undefined_object or insufficient_privilege then
                reason := sqlerrm;
                with gone as (
                    delete from outbox.held_events h where (h.event_id, h.branch) = (held.event_id, held.branch) returning h.*
                )
                insert into outbox.failed_events (seq, xid, created_at, event_id, backend_number, branch, event_type, source, backend, data,
                        subject, stream, data_schema, publisher_config, max_retries, published_by, attempts, last_error)
                    select g.seq, g.xid, g.created_at, g.event_id, b.number, g.branch, g.event_type, g.source, b.name, g.data,
                        g.subject, g.stream, g.data_schema, g.publisher_config, g.max_retries, g.published_by, 0, reason
                    from gone g
                    on conflict (event_id, seq) do nothing;
                refused := refused + 1;
            end;
        end loop;
    end;
    if accepted > 0 then
        -- Some may already be in their streams, so the worker looks for them first.
        insert into outbox.restores (backend_number, xid) values (b.number, pg_current_xact_id());
    end if;
    with due as (
        delete from outbox.held_scheduled h using outbox.scheduled_events s
            where s.event_id = h.event_id and s.branch = h.branch and s.backend = b.name returning h.*
    )
    update outbox.scheduled_events s
        set scheduled_at = d.scheduled_at, backend_number = b.number,
            xid = case when d.scheduled_at <= clock_timestamp() then '0'::xid8 else pg_current_xact_id() end
        from due d where s.event_id = d.event_id and s.branch = d.branch;
    get diagnostics scheduled = row_count;
    delete from outbox.held_refused r where not exists (select from outbox.held_events h where h.seq = r.seq);
    if refused > 0 then
        raise warning using message = format('%s held events are refused here, and have failed', refused),
            detail = format('The last was refused: %s.', reason),
            hint = 'They are in outbox.failed_events. When the reason is removed, call outbox.retry_failed().';
    end if;
    if sent + accepted + refused + scheduled > 0 then
        raise log using message = format('backend "%s" continues in place of another server: %s held events are published, %s had been sent, %s are scheduled',
            regexp_replace(b.name, '[[:cntrl:]]', ' ', 'g'), accepted, sent, scheduled);
    end if;
    return sent + accepted + refused + scheduled;
end
$$;
comment on function outbox.accept_held(text) is 'Publishes those events of a backend that a subscription has brought and that the other server has not sent. outbox.take_over() calls it.';

create function outbox.database_made_by(out xid bigint, out is_certain boolean) returns setof record
    language c volatile
    as 'MODULE_PATHNAME', 'database_made_by_wrapper';
comment on function outbox.database_made_by() is 'The transaction that created this database. It is not certain if the database''s row of pg_database was changed since.';

create function outbox.note_copy() returns boolean
    language plpgsql security definer set search_path = pg_catalog, pg_temp
    as $$
declare
    reason constant text := 'it was pending when this database was copied, so only the original may send it';
    here oid;
    original oid;
    made_in xid8;
    is_certain boolean;
    made_at timestamptz;
    oldest xid8;
    low bigint;
begin
    perform outbox.silence_triggers();
    select d.oid into here from pg_database d where d.datname = current_database();
    select i.database into original from outbox.installation i where i.database <> here for update;
    if not found then
        return false;
    end if;
    -- Events that the original published have ids below that of the transaction which made this database. Events that
    -- are published here have ids above it.
    select m.xid::text::xid8, m.is_certain into made_in, is_certain from outbox.database_made_by() m;
    if not is_certain then
        -- The row was changed, perhaps after the first event was published here. Then the files tell the age of the
        -- copy.
        select f.modification into made_at
            from pg_stat_file(regexp_replace(pg_relation_filepath('pg_catalog.pg_class'), '[^/]*$', 'PG_VERSION')) f;
        made_in := least(made_in,
            (select e.xid from outbox.events e where e.created_at > made_at order by e.xid limit 1),
            (select s.xid from outbox.scheduled_events s where s.created_at > made_at order by s.xid limit 1));
    end if;
    low := coalesce((select e.seq from outbox.events e where e.xid < made_in order by e.seq desc limit 1), 0);
    -- A template database that was never used has sent nothing, so copies of it need no take-over.
    if not exists (select from pg_database d where d.oid = original and d.datistemplate)
        or exists (select from outbox.events e where e.xid < made_in)
        or exists (select from outbox.scheduled_events e where e.xid < made_in)
        or exists (select from outbox.failed_events e where e.xid < made_in)
        or exists (select from outbox.cursors c where c.published_total > 0) then
        insert into outbox.copied_backends (backend_number, original, is_database)
            select b.number, format('the database with OID %s', original), true from outbox.backends b
            on conflict (backend_number) do update
            set original = excluded.original, is_database = true, copied_at = excluded.copied_at;
    end if;

    -- Events that waited when the copy was made are not sent from here.
    oldest := case
        when exists (select from outbox.backends b where not exists (select from outbox.cursors c where c.backend_number = b.number)) then '3'
        else (select pg_snapshot_xmin(c.from_snapshot) from outbox.cursors c
            where exists (select from outbox.backends b where b.number = c.backend_number) order by 1 limit 1)
    end;
    insert into outbox.failed_events (seq, xid, created_at, event_id, backend_number, branch, event_type, source, backend, data, subject, stream,
            data_schema, publisher_config, max_retries, published_by, attempts, last_error)
        select e.seq, e.xid, e.created_at, e.event_id, e.backend_number, e.branch, e.event_type, e.source, e.backend, e.data, e.subject, e.stream,
            e.data_schema, e.publisher_config, e.max_retries, e.published_by, r.attempts, reason
        from outbox.refused_events r join outbox.events e on e.seq = r.seq
        where r.accepted_in is null
        on conflict (event_id, seq) do nothing;
    insert into outbox.failed_events (seq, xid, created_at, event_id, backend_number, branch, event_type, source, backend, data, subject, stream,
            data_schema, publisher_config, max_retries, published_by, attempts, last_error)
        select e.seq, e.xid, e.created_at, e.event_id, e.backend_number, e.branch, e.event_type, e.source, e.backend, e.data, e.subject, e.stream,
            e.data_schema, e.publisher_config, e.max_retries, e.published_by, 0, reason
        from outbox.events e join outbox.backends b on b.number = e.backend_number
        where e.xid >= oldest and e.xid < made_in
            and not coalesce((select outbox.is_delivered(c, e.xid, e.seq) from outbox.cursors c
                where c.backend_number = e.backend_number and c.slot in (-1, outbox.hash_slot(coalesce(e.stream, b.own_stream, '')))
                order by c.slot desc limit 1), false)
        on conflict (event_id, seq) do nothing;
    with gone as (
        delete from outbox.scheduled_events s where s.xid < made_in returning s.*
    )
    insert into outbox.failed_events (seq, xid, created_at, event_id, backend_number, branch, event_type, source, backend, data, subject, stream,
            data_schema, publisher_config, max_retries, published_by, attempts, last_error)
        select e.seq, e.xid, e.created_at, e.event_id, e.backend_number, e.branch, e.event_type, e.source, e.backend, e.data, e.subject, e.stream,
            e.data_schema, e.publisher_config, e.max_retries, e.published_by, 0, reason
        from gone e
        on conflict (event_id, seq) do nothing;
    with gone as (
        delete from outbox.held_events returning *
    )
    insert into outbox.failed_events (seq, xid, created_at, event_id, backend_number, branch, event_type, source, backend, data, subject, stream,
            data_schema, publisher_config, max_retries, published_by, attempts, last_error)
        select e.seq, e.xid, e.created_at, e.event_id, e.backend_number, e.branch, e.event_type, e.source, e.backend, e.data, e.subject, e.stream,
            e.data_schema, e.publisher_config, e.max_retries, e.published_by, 0, reason
        from gone e
        on conflict (event_id, seq) do nothing;
    delete from outbox.held_scheduled;
    delete from outbox.held_cursors;
    delete from outbox.held_refused;
    delete from outbox.refused_events;
    delete from outbox.take_overs;
    delete from outbox.restores;

    -- Each reader starts where the database was made. Its guard does not exist yet.
    insert into outbox.cursors (backend_number, from_snapshot, from_next_xid, from_low_seq, from_high_seq, saved_at, state)
        select b.number, '3:3:', '3', 0, 0, clock_timestamp(), 'idle' from outbox.backends b
        on conflict (backend_number, slot) do nothing;
    update outbox.cursors c
        set from_snapshot = format('%s:%s:', made_in, made_in)::pg_snapshot, from_next_xid = made_in, from_low_seq = low, from_high_seq = low,
            to_snapshot = null, to_next_xid = null, to_low_seq = null, to_high_seq = null, last_seq = 0,
            batch_number = 0, epoch = 0, saved_at = clock_timestamp(), state = 'idle', events_per_second = 0,
            last_error = null, last_hint = null, last_error_at = null, next_attempt_at = null, address = null
        where exists (select from outbox.backends b where b.number = c.backend_number);
    update outbox.former_lanes c
        set from_snapshot = format('%s:%s:', made_in, made_in)::pg_snapshot, from_next_xid = made_in, from_low_seq = low, from_high_seq = low,
            to_snapshot = null, to_next_xid = null, to_low_seq = null, to_high_seq = null, last_seq = 0,
            batch_number = 0, epoch = 0, last_error = null, last_hint = null, last_error_at = null, address = null, take_over_of = null;
    update outbox.installation set id = gen_random_uuid(), database = here;
    return true;
end
$$;
comment on function outbox.note_copy() is 'Records that this database is a copy of another one, if it is and that is not recorded yet; returns whether it has done so. Events that waited in the original fail here, and the copy sends nothing before outbox.take_over().';

create function outbox.take_over(backend text) returns void
    language plpgsql security definer set search_path = pg_catalog, pg_temp
    as $$
declare
    b outbox.backends := outbox.expect_backend(backend);
    copied outbox.copied_backends;
    held bigint;
begin
    perform outbox.silence_triggers();
    -- Without a worker, a copy may not have been noticed yet.
    perform outbox.note_copy();
    held := outbox.accept_held(backend);
    delete from outbox.copied_backends c where c.backend_number = b.number returning c.* into copied;
    -- A copied database has guards of its own. Without a guard there is no owner to replace.
    if copied.is_database or (b.delivery <> 'exactly_once' and (copied.backend_number is not null or held > 0)) then
        return;
    end if;
    if b.delivery <> 'exactly_once' then
        raise exception using errcode = 'object_not_in_prerequisite_state',
            message = format('backend "%s" cannot be taken over', backend),
            detail = format('With delivery = ''%s'' a backend has no owner.', b.delivery);
    end if;
    insert into outbox.take_overs (backend_number) values (b.number)
        on conflict (backend_number) do update set asked_at = excluded.asked_at, asked_of = excluded.asked_of;
end
$$;
comment on function outbox.take_over(text) is 'Makes this server the owner of the backend''s streams, whoever owns them now. A copy of a database begins to send events that are published in it. A backend that halted because its guard was missing continues.';
