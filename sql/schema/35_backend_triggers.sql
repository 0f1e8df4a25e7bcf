-- The triggers of outbox.backends and outbox.backend_passwords.

create function outbox.silence_triggers() returns void
    language c
    as 'MODULE_PATHNAME', 'silence_triggers_wrapper';
comment on function outbox.silence_triggers() is 'Keeps the triggers of others from firing until the calling function ends. For functions that write with the owner''s rights. The owner must be a superuser.';

create function outbox.has_waiting_events(backend_number integer) returns boolean
    language c strict
    as 'MODULE_PATHNAME', 'has_waiting_events_wrapper';
comment on function outbox.has_waiting_events(integer) is 'Whether events of a backend wait to be delivered, are scheduled, or are being tried again.';

create function outbox.check_stream_name() returns trigger
    language c
    as 'MODULE_PATHNAME', 'check_stream_name';
comment on function outbox.check_stream_name() is 'Trigger of outbox.backends: refuses a stream_name that is not a valid template (23514), and fills in own_stream; for a cluster''s backend also stream_name, from outbox_relay.redis_stream_name.';

create function outbox.check_backend() returns trigger
    language plpgsql set search_path = pg_catalog, pg_temp
    as $$
declare
    present outbox.backends;
    defaults jsonb;
    node text;
    file_column text;
begin
    -- The stream that a template gives is stored with each event, so it need not stay the same.
    if tg_op = 'UPDATE' and old.mode = 'cluster' and (new.mode <> 'cluster' or new.own_stream is distinct from old.own_stream) then
        -- Checked only in this case, so that other changes do not wait for a lock on that table.
        if exists (select from outbox.cursors c where c.backend_number = old.number) then
            raise exception using errcode = 'object_not_in_prerequisite_state',
                message = format('mode and stream_name of backend "%s" cannot be changed', old.name),
                detail = 'Delivery is recorded for each hash slot of its cluster, and its stream_name decides the hash slot of its events.',
                hint = 'Rename it, and insert another backend under its name.';
        end if;
    end if;
    if tg_op = 'UPDATE' and new.number <> old.number then
        raise exception using errcode = 'feature_not_supported',
            message = format('number of backend "%s" cannot be changed', old.name),
            detail = 'Events refer to it.';
    end if;
    foreach file_column in array array['password_file', 'tls_ca_file', 'tls_cert_file', 'tls_key_file'] loop
        if to_jsonb(new) ->> file_column is not null
            and (tg_op = 'INSERT' or to_jsonb(new) ->> file_column is distinct from to_jsonb(old) ->> file_column)
            and not pg_has_role('pg_read_server_files', 'usage') then
            raise exception using errcode = 'insufficient_privilege',
                message = format('permission denied to set %s', file_column),
                detail = 'The server reads that file.',
                hint = 'Only roles with the privileges of pg_read_server_files may set it.';
        end if;
    end loop;
    foreach node in array coalesce(new.nodes, '{}') loop
        if node !~ '^([^][[:space:]:]+|[[][0-9a-fA-F:.]+(%[^][[:space:]:]+)?[]]):[0-9]{1,5}$'
            or pg_catalog.substring(node, '[0-9]+$')::integer not between 1 and 65535 then
            raise exception using errcode = 'invalid_parameter_value',
                message = format('"%s" is not a valid node of backend "%s"', node, new.name),
                detail = 'A node is a host and a port, such as 10.0.0.1:26379.',
                hint = 'Write an IPv6 address in brackets: [::1]:26379.';
        end if;
    end loop;
    if tg_op = 'INSERT' then
        -- A dump contains its own "default", which replaces the one that CREATE EXTENSION made.
        select b.* into present from outbox.backends b where b.name = new.name;
        if found and present.number = new.number then
            -- All columns except name and number, so that a new option needs no change here.
            execute (
                select format('update outbox.backends b set (%s) = row(%s) where b.name = ($1).name',
                    string_agg(quote_ident(a.attname), ', '), string_agg('($1).' || quote_ident(a.attname), ', '))
                from pg_attribute a
                where a.attrelid = 'outbox.backends'::regclass and a.attnum > 0 and not a.attisdropped and a.attgenerated = ''
                    and a.attname not in ('name', 'number')
            ) using new;
            return null;
        elsif found then
            -- The default values of all columns, including columns that are added later.
            execute (
                select format('select jsonb_strip_nulls(jsonb_build_object(%s))',
                    string_agg(format('%L, %s', a.attname, pg_get_expr(d.adbin, d.adrelid)), ', '))
                from pg_attribute a join pg_attrdef d on d.adrelid = a.attrelid and d.adnum = a.attnum
                where a.attrelid = 'outbox.backends'::regclass and a.attgenerated = ''
            ) into defaults;
            if jsonb_strip_nulls(to_jsonb(present)) - '{name,number}'::text[] = defaults then
                -- A separate statement, because only roles that restore dumps have the rights that it needs.
                if not exists (select from outbox.events e where e.backend_number = present.number)
                    and not exists (select from outbox.backend_passwords p where p.backend_number = present.number)
                    and not exists (select from outbox.routes r where r.backend = present.name)
                    and not outbox.has_waiting_events(present.number) then
                    delete from outbox.backends b where b.name = new.name;
                end if;
            end if;
        end if;
    end if;
    return new;
end
$$;
comment on function outbox.check_backend() is 'Trigger of outbox.backends: numbers never change, a cluster''s backend keeps its own stream, nodes are host:port, file columns need pg_read_server_files, and a restored "default" replaces an unchanged one.';

create function outbox.check_number() returns trigger
    language plpgsql security definer set search_path = pg_catalog, pg_temp
    as $$
declare
    drawn integer;
begin
    begin
        drawn := currval('outbox.backends_number_seq');
    exception when object_not_in_prerequisite_state then
        null;
    end;
    if new.number is distinct from drawn then
        raise exception using errcode = 'insufficient_privilege',
            message = format('permission denied to choose the number of backend "%s"', new.name),
            detail = 'Events refer to backends, including deleted ones, by their numbers.',
            hint = 'Omit number: it comes from a sequence.';
    end if;
    -- The sequence may have been set back.
    while exists (select from outbox.backends b where b.number = new.number)
        or exists (select from outbox.cursors c where c.backend_number = new.number)
        or exists (select from outbox.installation i where i.deleted_backends @> new.number) loop
        new.number := nextval('outbox.backends_number_seq');
    end loop;
    return new;
end
$$;
comment on function outbox.check_number() is 'Trigger of outbox.backends: only a superuser, or a role that may execute this function, may choose a backend''s number, as a restore does. All others get the next number that was never used.';

-- It runs with the owner's rights: a role that may delete backends need not have the right to read the other tables.
create function outbox.check_backend_deletion() returns trigger
    language plpgsql security definer set search_path = pg_catalog, pg_temp
    as $$
begin
    perform outbox.silence_triggers();
    if exists (select from outbox.routes r where r.backend = old.name) then
        raise exception using errcode = 'object_in_use',
            message = format('backend "%s" has routes', old.name),
            detail = 'Rows of outbox.routes name it.',
            hint = format('Delete them first: DELETE FROM outbox.routes WHERE backend = %L;', old.name);
    end if;
    -- The saved cursor may lag behind recent deliveries, so this lets the worker save it.
    for i in 1..20 loop
        if not outbox.has_waiting_events(old.number) then
            delete from outbox.backend_passwords p where p.backend_number = old.number;
            delete from outbox.moved_backends m where m.backend_number = old.number;
            delete from outbox.copied_backends c where c.backend_number = old.number;
            return old;
        end if;
        exit when i = 20 or pg_catalog.current_setting('transaction_isolation') not in ('read committed', 'read uncommitted');
        perform outbox.wake();
        perform outbox.rest(0.05);
    end loop;
    raise exception using errcode = 'object_in_use',
        message = format('backend "%s" has waiting events', old.name),
        detail = 'Events are pending, scheduled or being tried again.',
        hint = 'Wait until outbox.backend_status shows none pending, or delete its rows from outbox.events, outbox.scheduled_events and outbox.refused_events.';
end
$$;
comment on function outbox.check_backend_deletion() is 'Trigger of outbox.backends: refuses to delete a backend that has waiting events or that a route names.';

-- The triggers' WHEN conditions check who may do this. They are evaluated with the rights of the role that changes the
-- backend; the functions have the owner's rights.
create function outbox.keep_password() returns trigger
    language plpgsql security definer set search_path = pg_catalog, pg_temp
    as $$
begin
    if outbox.destination(old) <> outbox.destination(new)
        and exists (select from outbox.backend_passwords p where p.backend_number = old.number and p.destination = outbox.destination(old)) then
        perform outbox.silence_triggers();
        update outbox.backend_passwords p set destination = outbox.destination(new) where p.backend_number = old.number;
    end if;
    return null;
end
$$;
comment on function outbox.keep_password() is 'Trigger of outbox.backends: when a role that may set passwords changes a backend''s destination, the stored password is valid for the new one.';

create function outbox.note_move() returns trigger
    language plpgsql security definer set search_path = pg_catalog, pg_temp
    as $$
begin
    if tg_op = 'INSERT' then
        perform outbox.silence_triggers();
        insert into outbox.moved_backends (backend_number, destination) values (new.number, '{}') on conflict do nothing;
    elsif outbox.destination(old) <> outbox.destination(new)
        and not exists (select from outbox.moved_backends m where m.backend_number = old.number) then
        perform outbox.silence_triggers();
        insert into outbox.moved_backends (backend_number, destination) values (old.number, outbox.destination(old));
    end if;
    return null;
end
$$;
comment on function outbox.note_move() is 'Trigger of outbox.backends: records which backends a role that may not read the server''s files has created or moved.';

create function outbox.forget_move() returns trigger
    language plpgsql security definer set search_path = pg_catalog, pg_temp
    as $$
begin
    -- A role that changes another column of a moved backend has not confirmed its destination.
    if exists (select from outbox.moved_backends m where m.backend_number = old.number
        and (new.password_file <> coalesce(old.password_file, '')
            or (m.destination in ('{}', outbox.destination(old)) and outbox.destination(old) <> outbox.destination(new)))) then
        perform outbox.silence_triggers();
        delete from outbox.moved_backends m where m.backend_number = old.number;
    end if;
    return null;
end
$$;
comment on function outbox.forget_move() is 'Trigger of outbox.backends: removes the record of outbox.note_move() when a role that may read the server''s files sets a file or a destination.';

create function outbox.backends_changed() returns trigger
    language c
    as 'MODULE_PATHNAME', 'backends_changed';
comment on function outbox.backends_changed() is 'Trigger of outbox.backends and outbox.backend_passwords: notifies sessions and the worker.';

create function outbox.expect_room() returns trigger
    language c
    as 'MODULE_PATHNAME', 'expect_room';
comment on function outbox.expect_room() is 'Trigger of outbox.backends and outbox.routes, whose rows are kept in memory: refuses more than 5,000 rows, and more than 4 MiB of texts (54000).';

create function outbox.rescheduled() returns trigger
    language c
    as 'MODULE_PATHNAME', 'rescheduled';
comment on function outbox.rescheduled() is 'Trigger of outbox.scheduled_events: notifies the worker that the times of scheduled events have changed.';
