-- Passwords of backends, and the rights of publishers.

create function outbox.hide_statement() returns void
    language c volatile
    as 'MODULE_PATHNAME', 'hide_statement_wrapper';
comment on function outbox.hide_statement() is 'Part of outbox.set_backend_password(): pg_stat_activity no longer shows the statement that is running.';

create function outbox.set_backend_password(name text, password text) returns void
    language plpgsql security definer set search_path = pg_catalog, pg_temp
    -- With a custom plan, each plan would contain the password, and would be logged where plans are (auto_explain).
    set plan_cache_mode = force_generic_plan
    as $$
declare
    b outbox.backends;
    before jsonb;
    setting text;
begin
    -- When the caller's statement has ended, its log line may show its parameters, and auto_explain may show its plan
    -- with them. It also shows the caller's statements as the context of those below: so these are assignments, which
    -- are evaluated without a plan, and come first. The very first one refuses an owner that is no superuser.
    setting := outbox.silence_triggers();
    setting := set_config('log_parameter_max_length', '0', true);
    if current_setting('auto_explain.log_min_duration', true) is not null then
        setting := set_config('auto_explain.log_min_duration', '-1', true);
    end if;
    perform outbox.hide_statement();
    b := outbox.expect_backend(name);
    if password is null then
        delete from outbox.backend_passwords p where p.backend_number = b.number;
    else
        select p.destination into before from outbox.backend_passwords p
            where p.backend_number = b.number and p.destination <> outbox.destination(b);
        if found then
            raise warning using message = format('backend "%s" connects to another destination than when its password was set', b.name),
                detail = format('It was %s and is now %s.', before, outbox.destination(b)),
                hint = 'Remove the password again if it does not belong to the new destination.';
        end if;
        insert into outbox.backend_passwords as p (backend_number, password, destination)
            values (b.number, outbox.seal_password(b.number, set_backend_password.password), outbox.destination(b))
            on conflict (backend_number) do update set password = excluded.password, destination = excluded.destination;
    end if;
end
$$;
comment on function outbox.set_backend_password(text, text) is 'Sets the password with which the worker logs in to the backend''s present destination. NULL removes it. It is stored sealed, nobody can read it, and dumps do not contain it. The server may log the statement that sets it; contrib/set_backend_password.sql and password_file avoid that.';

create function outbox.publisher_rights(out right_to text, out object text) returns setof record
    language sql immutable parallel safe set search_path = pg_catalog, pg_temp
    as $$
values
    ('usage', 'schema outbox'),
    ('execute', 'function outbox.publish_event(text, text, jsonb, text, text, timestamptz, integer, jsonb, text, text, uuid, bytea)'),
    ('execute', 'function outbox.publish_event(outbox.any_text, text, outbox.any_value, text, text, timestamptz, outbox.any_number, outbox.any_value, text, text, outbox.any_value, bytea)'),
    ('execute', 'function outbox.publish_event(outbox.any_text, outbox.any_text, outbox.any_value, outbox.any_subject, text, outbox.any_time, outbox.any_number, outbox.any_value, text, text, outbox.any_value, bytea)'),
    -- Views, defaults and function bodies that call it name these types.
    ('usage', 'type outbox.any_text'),
    ('usage', 'type outbox.any_value'),
    ('usage', 'type outbox.any_number'),
    ('usage', 'type outbox.any_subject'),
    ('usage', 'type outbox.any_time'),
    -- Called when an argument is converted to one of those types.
    ('execute', 'function outbox.any_value_in(cstring)'),
    ('execute', 'function outbox.any_value(boolean)'),
    ('execute', 'function outbox.refuse_value(anyelement)'),
    ('execute', 'function outbox.any_number_in(cstring)'),
    ('execute', 'function outbox.refuse_number(anyelement)'),
    ('execute', 'function outbox.any_subject_in(cstring)'),
    ('execute', 'function outbox.any_time_in(cstring, oid, integer)'),
    ('execute', 'function outbox.any_time(timestamp)'),
    ('execute', 'function outbox.any_time(date)'),
    ('execute', 'function outbox.refuse_time(anyelement)'),
    ('execute', 'function outbox.publish_events(jsonb)'),
    ('execute', 'function outbox.binary_data(bytea)'),
    ('execute', 'function outbox.published_here()'),
    ('execute', 'function outbox.wait_published(uuid, interval)'),
    ('execute', 'function outbox.wait_for_event(uuid, double precision)'),
    -- They also require ownership of a table.
    ('execute', 'function outbox.attach_table(regclass, text, text, text, text[], text[], text, text, text)'),
    ('execute', 'function outbox.detach_table(regclass)'),
    ('execute', 'function outbox.family_of(regclass)'),
    ('execute', 'function outbox.row_events(regclass, text, text, text, text[], text[], text[], text, text)'),
    ('execute', 'function outbox.write_row_function(regclass, text, jsonb, boolean)'),
    ('execute', 'function outbox.expect_backend_name(text)'),
    ('execute', 'function outbox.condition_query(regclass, text)'),
    ('execute', 'function outbox.analyse_as(oid, text)'),
    ('execute', 'function outbox.expect_condition(regclass, text, oid)'),
    ('insert (event_id, event_type, source, backend, data, subject, stream, data_schema, publisher_config, max_retries)', 'table outbox.events')
$$;
comment on function outbox.publisher_rights() is 'What outbox.grant_publisher() grants, as parts of a GRANT statement.';

create function outbox.expect_role(name text) returns regrole
    language plpgsql stable set search_path = pg_catalog, pg_temp
    as $$
declare
    found_role regrole;
begin
    if name is null then
        raise exception using errcode = 'null_value_not_allowed', message = 'role must not be null',
            detail = 'It is the role that may publish.', hint = 'Pass the name of a role, as pg_roles shows it.';
    end if;
    select r.oid into found_role from pg_roles r where r.rolname = expect_role.name;
    if not found then
        -- Reads the name as regrole does: in lower case unless it is quoted. From Postgres 16 on it takes any number,
        -- too.
        begin
            select r.oid into found_role from pg_roles r where r.oid = to_regrole(name);
        exception when invalid_name or syntax_error then
            null;
        end;
    end if;
    if found_role is null then
        raise exception using errcode = 'undefined_object', message = format('role "%s" does not exist', name),
            detail = 'Roles are listed in pg_roles. Names are case-sensitive.',
            hint = case when lower(name) = 'public' then 'Publishing is granted to a role, not to PUBLIC: create one, and grant it to whoever publishes.'
                else format('Check the name, or run CREATE ROLE %I LOGIN first.', name) end;
    end if;
    return found_role;
end
$$;
comment on function outbox.expect_role(text) is 'The role of this name. Raises an ERROR with an explanation if there is none.';

-- Not in SQL: PL/pgSQL would keep until the transaction ends what such a function has made of its plan, and each GRANT
-- that follows has it made anew.
create function outbox.expect_role(role regrole) returns regrole
    language plpgsql stable set search_path = pg_catalog, pg_temp
    as $$
begin
    return outbox.expect_role(coalesce((select p.rolname::text from pg_roles p where p.oid = role), role::text));
end
$$;
comment on function outbox.expect_role(regrole) is 'The same for a role that may have been dropped, or NULL.';

create function outbox.grant_rights(role regrole, rights name) returns void
    language plpgsql set search_path = pg_catalog, pg_temp
    as $$
declare
    r record;
    grantee text := outbox.expect_role(role)::text;
begin
    for r in execute format('select * from outbox.%I()', rights) loop
        execute format('grant %s on %s to %s', r.right_to, r.object, grantee);
    end loop;
end
$$;
comment on function outbox.grant_rights(regrole, name) is 'Part of outbox.grant_publisher() and outbox.grant_consumer(): grants what the function of this name lists.';

create function outbox.revoke_rights(role regrole, rights name) returns void
    language plpgsql set search_path = pg_catalog, pg_temp
    as $$
declare
    r record;
    grantee text := outbox.expect_role(role)::text;
begin
    for r in execute format('select * from outbox.%I()', rights) loop
        -- The role may have been granted something else in the schema: see outbox.revoke_usage().
        if r.object <> 'schema outbox' then
            execute format('revoke %s on %s from %s', r.right_to, r.object, grantee);
        end if;
    end loop;
end
$$;
comment on function outbox.revoke_rights(regrole, name) is 'Part of outbox.revoke_publisher() and outbox.revoke_consumer(): revokes what the function of this name lists, except the use of the schema.';

create function outbox.limit_publisher(role regrole, backends text[], streams text[]) returns void
    language plpgsql set search_path = pg_catalog, pg_temp
    as $$
begin
    if array_position(backends, null) is not null or array_position(streams, null) is not null then
        raise exception using errcode = 'null_value_not_allowed', message = 'patterns of backends and streams must not be null',
            hint = 'Pass NULL instead of an array to allow any.';
    end if;
    -- A role that was granted EXECUTE on these functions, but no rights on this table, cannot change limits.
    if num_nonnulls(backends, streams) > 0
        or (has_table_privilege('outbox.publisher_limits', 'select') and has_table_privilege('outbox.publisher_limits', 'delete')) then
        delete from outbox.publisher_limits l
            where l.role::oid = limit_publisher.role::oid or not exists (select from pg_roles r where r.oid = l.role::oid);
    end if;
    if num_nonnulls(backends, streams) > 0 then
        insert into outbox.publisher_limits (role, backends, streams)
            values (limit_publisher.role::oid, limit_publisher.backends, limit_publisher.streams);
    end if;
end
$$;
comment on function outbox.limit_publisher(regrole, text[], text[]) is 'Part of outbox.grant_publisher() and outbox.revoke_publisher(): sets or removes a role''s row of outbox.publisher_limits, and removes those of roles that were dropped.';

create function outbox.grant_publisher(role regrole, backends text[], streams text[] default null) returns void
    language plpgsql set search_path = pg_catalog, pg_temp
    as $$
begin
    perform outbox.expect_role(role);
    perform outbox.limit_publisher(role, backends, streams);
    perform outbox.grant_rights(role, 'publisher_rights');
end
$$;
comment on function outbox.grant_publisher(regrole, text[], text[]) is 'Lets a role publish to backends whose names match one of these patterns, into streams that match one of these: ''{orders,audit-*}''. NULL: any. The last call replaces earlier ones; see outbox.publisher_limits.';

create function outbox.grant_publisher(role text, backends text[], streams text[] default null) returns void
    language sql set search_path = pg_catalog, pg_temp
    as $$
select outbox.grant_publisher(outbox.expect_role(role), backends, streams)
$$;
comment on function outbox.grant_publisher(text, text[], text[]) is 'The same, with the role''s name as pg_roles shows it.';

create function outbox.grant_publisher(role regrole) returns void
    language sql set search_path = pg_catalog, pg_temp
    as $$
select outbox.grant_publisher(role, null::text[], null::text[])
$$;
comment on function outbox.grant_publisher(regrole) is 'Lets a role publish, see what its own transaction has published, and wait until its own events are sent; nothing else. See outbox.revoke_publisher(), and allowed_streams of outbox.backends.';

create function outbox.grant_publisher(role text) returns void
    language sql set search_path = pg_catalog, pg_temp
    as $$
select outbox.grant_publisher(outbox.expect_role(role))
$$;
comment on function outbox.grant_publisher(text) is 'The same, with the role''s name as pg_roles shows it: ''Shop-App'', or current_user.';

create function outbox.revoke_usage(role regrole) returns void
    language plpgsql set search_path = pg_catalog, pg_temp
    as $$
begin
    if not exists (
        select from pg_class c, aclexplode(c.relacl) a where c.relnamespace = 'outbox'::regnamespace and a.grantee = role::oid
        union all
        select from pg_proc p, aclexplode(p.proacl) a where p.pronamespace = 'outbox'::regnamespace and a.grantee = role::oid
        union all
        select from pg_attribute t join pg_class c on c.oid = t.attrelid, aclexplode(t.attacl) a
            where c.relnamespace = 'outbox'::regnamespace and a.grantee = role::oid) then
        execute format('revoke usage on schema outbox from %s', role);
    end if;
end
$$;
comment on function outbox.revoke_usage(regrole) is 'Part of outbox.revoke_publisher() and outbox.revoke_consumer(): revokes the use of the schema, unless the role has been granted something else in it.';

create function outbox.revoke_publisher(role regrole) returns void
    language plpgsql set search_path = pg_catalog, pg_temp
    as $$
begin
    perform outbox.revoke_rights(role, 'publisher_rights');
    perform outbox.limit_publisher(role, null, null);
    perform outbox.revoke_usage(role);
end
$$;
comment on function outbox.revoke_publisher(regrole) is 'Revokes what outbox.grant_publisher() has granted to a role, and removes its limits. The role keeps what it has as a member of other roles.';

create function outbox.revoke_publisher(role text) returns void
    language sql set search_path = pg_catalog, pg_temp
    as $$
select outbox.revoke_publisher(outbox.expect_role(role))
$$;
comment on function outbox.revoke_publisher(text) is 'The same, with the role''s name as pg_roles shows it.';
