-- Logical replication: rows that a subscription brings from another server are held until outbox.take_over().

-- UPDATE and DELETE on a published table need a key.
alter table outbox.installation add primary key (id);

create function outbox.is_applied() returns boolean
    language c volatile
    as 'MODULE_PATHNAME', 'is_applied_wrapper';
comment on function outbox.is_applied() is 'For triggers: whether this process applies their rows for a subscription. False for what triggers of other tables do there.';

create table outbox.held_events (
    like outbox.events,
    number  bigint generated always as identity primary key,
    held_at timestamptz not null default clock_timestamp()
);
alter table outbox.held_events alter column branch set default 0;
create index held_events_backend_idx on outbox.held_events (backend, seq);
create index held_events_number_idx on outbox.held_events (backend_number, seq);
create index held_events_event_id_idx on outbox.held_events (event_id);
comment on table outbox.held_events is 'Events of another server that a subscription has brought, with the numbers of that server. The other server sends them. outbox.take_over() here publishes those that it has not sent.';

create table outbox.held_scheduled (
    event_id     uuid not null,
    branch       smallint not null,
    scheduled_at timestamptz not null,
    primary key (event_id, branch)
);
comment on table outbox.held_scheduled is 'The real times of scheduled events that a subscription has brought. In outbox.scheduled_events they are due in the year 9999 until outbox.take_over().';

create table outbox.held_cursors (
    like outbox.cursors,
    primary key (backend_number, slot)
);
comment on table outbox.held_cursors is 'The cursors of another server, as a subscription reports them, with that server''s numbers of backends. They may lag behind that server, but are never ahead of it.';

create table outbox.held_refused (
    seq bigint primary key
);
comment on table outbox.held_refused is 'Held events that Redis refused on the other server. After outbox.take_over(), the worker looks for them in the streams.';

create function outbox.hold_event() returns trigger
    language plpgsql security definer set search_path = pg_catalog, pg_temp
    as $$
begin
    if not outbox.is_applied() then
        return new;
    end if;
    -- Scheduled on both servers, it has become due on both. (As long as this server is a copy, the other one decides
    -- when it is due.)
    if exists (select from outbox.events e where e.event_id = new.event_id and e.branch = new.branch)
        or exists (select from outbox.scheduled_events s where s.event_id = new.event_id and s.branch = new.branch
            and not exists (select from outbox.copied_backends c where c.backend_number = s.backend_number)) then
        return null;
    end if;
    -- It has become due on the other server, or was retried there.
    delete from outbox.held_scheduled h where h.event_id = new.event_id and h.branch = new.branch;
    delete from outbox.held_events h where h.event_id = new.event_id and h.branch = new.branch;
    insert into outbox.held_events (seq, xid, created_at, event_id, backend_number, branch, event_type, source, backend, data, subject, stream,
            data_schema, publisher_config, max_retries)
        values (new.seq, new.xid, new.created_at, new.event_id, new.backend_number, new.branch, new.event_type, new.source, new.backend, new.data,
            new.subject, new.stream, new.data_schema, new.publisher_config, new.max_retries);
    return null;
end
$$;
comment on function outbox.hold_event() is 'Trigger of outbox.events: holds an event that a subscription brings.';

create function outbox.hold_scheduled() returns trigger
    language plpgsql security definer set search_path = pg_catalog, pg_temp
    as $$
begin
    if not outbox.is_applied() then
        if tg_op = 'DELETE' then
            return old;
        end if;
        return new;
    end if;
    if tg_op <> 'INSERT' and not exists (select from outbox.held_scheduled h where h.event_id = old.event_id and h.branch = old.branch) then
        return null;
    end if;
    if tg_op = 'DELETE' then
        delete from outbox.held_scheduled h where h.event_id = old.event_id and h.branch = old.branch;
        return old;
    end if;
    insert into outbox.held_scheduled as h (event_id, branch, scheduled_at) values (new.event_id, new.branch, new.scheduled_at)
        on conflict (event_id, branch) do update set scheduled_at = excluded.scheduled_at;
    new.scheduled_at := '9999-12-31';
    -- This number is a role of the other server.
    new.published_by := null;
    return new;
end
$$;
comment on function outbox.hold_scheduled() is 'Trigger of outbox.scheduled_events: keeps an event that a subscription brings from becoming due, and keeps the other server''s changes away from events of this server.';

create function outbox.hold_cursor() returns trigger
    language plpgsql security definer set search_path = pg_catalog, pg_temp
    as $$
begin
    if not outbox.is_applied() then
        if tg_op = 'DELETE' then
            return old;
        end if;
        return new;
    end if;
    if tg_op = 'DELETE' then
        -- Until a take-over, the cursor of a deleted backend shows which of its events were sent.
        delete from outbox.held_cursors h where h.backend_number = old.backend_number and h.slot = old.slot
            and not exists (select from outbox.held_events e where e.backend_number = old.backend_number);
        return null;
    end if;
    delete from outbox.held_cursors h where h.backend_number = new.backend_number and h.slot = new.slot;
    insert into outbox.held_cursors select new.*;
    if new.slot = -1 and not exists (select from outbox.held_cursors h where h.backend_number = new.backend_number and h.slot >= 0) then
        delete from outbox.held_events h where h.number = any (array(
            select o.number from outbox.held_events o
            where o.backend_number = new.backend_number
                and not exists (select from outbox.held_refused r where r.seq = o.seq)
            order by o.seq limit 5000)) and pg_visible_in_snapshot(h.xid, new.from_snapshot);
    end if;
    if tg_op = 'INSERT' and new.slot = -1 then
        -- A subscription applies changes only to rows that exist, so this inserts one, with the position of a backend
        -- that has sent nothing. This server's own worker may be inserting that row at the same time.
        perform outbox.put_back(format('insert into outbox.cursors (backend_number, slot, from_snapshot, from_next_xid, from_low_seq,
                from_high_seq, saved_at, state)
            values (%s, -1, ''3:3:'', ''3'', 0, 0, %L, ''idle'') on conflict do nothing', new.backend_number, new.saved_at));
    end if;
    return null;
end
$$;
comment on function outbox.hold_cursor() is 'Trigger of outbox.cursors: stores the positions that a subscription brings in outbox.held_cursors, and deletes held events that the other server has sent.';

create function outbox.hold_refused() returns trigger
    language plpgsql security definer set search_path = pg_catalog, pg_temp
    as $$
begin
    if not outbox.is_applied() then
        return new;
    end if;
    insert into outbox.held_refused (seq) values (new.seq) on conflict do nothing;
    return null;
end
$$;
comment on function outbox.hold_refused() is 'Trigger of outbox.refused_events: records which events Redis refused on another server, as a subscription reports it.';

create function outbox.place_failed() returns trigger
    language plpgsql security definer set search_path = pg_catalog, pg_temp
    as $$
begin
    if outbox.is_applied() then
        -- Its number is one of the other server: here the name decides.
        new.backend_number := coalesce((select b.number from outbox.backends b where b.name = new.backend), -1);
        new.published_by := null;
    end if;
    return new;
end
$$;
comment on function outbox.place_failed() is 'Trigger of outbox.failed_events: assigns an event that a subscription brings to the backend of the same name.';

create function outbox.leave_local() returns trigger
    language c
    as 'MODULE_PATHNAME', 'leave_local';
comment on function outbox.leave_local() is 'Trigger of tables that belong to this server only: ignores what a subscription inserts, updates or deletes.';
