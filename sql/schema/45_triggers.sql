-- All triggers: they are created from one list, and the worker repairs them.

create table outbox.known_triggers (
    only_row boolean primary key default true check (only_row),
    triggers text,
    filenode oid,
    snapshot pg_snapshot not null,
    next_xid xid8 not null,
    low_seq  bigint not null,
    high_seq bigint not null
);
comment on table outbox.known_triggers is 'The result of outbox.trigger_state() when all rows of outbox.events were last known to have passed its trigger, with the tick of that time.';
comment on column outbox.known_triggers.triggers is 'NULL: the worker is looking for rows that did not pass the trigger, up to this tick.';

create table outbox.kept_rows (
    number   bigint generated always as identity primary key,
    relation text not null,
    kept     text not null
);
comment on table outbox.kept_rows is 'Rows of this server while a subscription truncates a table of the extension; they are then put back. Empty at all other times.';

create function outbox.keep_rows() returns trigger
    language plpgsql security definer set search_path = pg_catalog, pg_temp
    as $$
begin
    if outbox.is_applied() then
        if tg_table_name = 'events' then
            delete from outbox.held_events;
        end if;
        execute format('insert into outbox.kept_rows (relation, kept) select %1$L, t::text from outbox.%1$I t', tg_table_name);
    end if;
    return null;
end
$$;
comment on function outbox.keep_rows() is 'Trigger of all tables: saves the rows of this server when a subscription applies the TRUNCATE of another.';

create function outbox.put_rows_back() returns trigger
    language plpgsql security definer set search_path = pg_catalog, pg_temp
    as $$
begin
    if outbox.is_applied() then
        perform outbox.put_back(format('insert into outbox.%1$I overriding system value
            select (k.kept::outbox.%1$I).* from outbox.kept_rows k where k.relation = %1$L order by k.number', tg_table_name));
        delete from outbox.kept_rows k where k.relation = tg_table_name;
    end if;
    return null;
end
$$;
comment on function outbox.put_rows_back() is 'Trigger of all tables: see outbox.keep_rows().';

create function outbox.put_back(statement text) returns void
    language c strict volatile
    as 'MODULE_PATHNAME', 'put_back_wrapper';
comment on function outbox.put_back(text) is 'Executes an INSERT of rows of this server while a subscription applies changes. The rows are inserted unchanged.';

create function outbox.our_triggers(out relation text, out name text, out definition text) returns setof record
    language plpgsql immutable set search_path = pg_catalog, pg_temp
    as $$
#variable_conflict use_column
begin
    -- PL/pgSQL, because it caches the plan, which an SQL function does not.
    return query
values
    ('events', 'applied_truncate', 'before truncate on outbox.events for each statement execute function outbox.keep_rows()'),
    ('events', 'applied_truncated', 'after truncate on outbox.events for each statement execute function outbox.put_rows_back()'),
    ('scheduled_events', 'applied_truncate', 'before truncate on outbox.scheduled_events for each statement execute function outbox.keep_rows()'),
    ('scheduled_events', 'applied_truncated', 'after truncate on outbox.scheduled_events for each statement execute function outbox.put_rows_back()'),
    ('refused_events', 'applied_truncate', 'before truncate on outbox.refused_events for each statement execute function outbox.keep_rows()'),
    ('refused_events', 'applied_truncated', 'after truncate on outbox.refused_events for each statement execute function outbox.put_rows_back()'),
    ('failed_events', 'applied_truncate', 'before truncate on outbox.failed_events for each statement execute function outbox.keep_rows()'),
    ('failed_events', 'applied_truncated', 'after truncate on outbox.failed_events for each statement execute function outbox.put_rows_back()'),
    ('cursors', 'applied_truncate', 'before truncate on outbox.cursors for each statement execute function outbox.keep_rows()'),
    ('cursors', 'applied_truncated', 'after truncate on outbox.cursors for each statement execute function outbox.put_rows_back()'),
    ('backends', 'applied_truncate', 'before truncate on outbox.backends for each statement execute function outbox.keep_rows()'),
    ('backends', 'applied_truncated', 'after truncate on outbox.backends for each statement execute function outbox.put_rows_back()'),
    ('backend_passwords', 'applied_truncate', 'before truncate on outbox.backend_passwords for each statement execute function outbox.keep_rows()'),
    ('backend_passwords', 'applied_truncated', 'after truncate on outbox.backend_passwords for each statement execute function outbox.put_rows_back()'),
    ('moved_backends', 'applied_truncate', 'before truncate on outbox.moved_backends for each statement execute function outbox.keep_rows()'),
    ('moved_backends', 'applied_truncated', 'after truncate on outbox.moved_backends for each statement execute function outbox.put_rows_back()'),
    ('routes', 'applied_truncate', 'before truncate on outbox.routes for each statement execute function outbox.keep_rows()'),
    ('routes', 'applied_truncated', 'after truncate on outbox.routes for each statement execute function outbox.put_rows_back()'),
    ('publisher_limits', 'applied_truncate', 'before truncate on outbox.publisher_limits for each statement execute function outbox.keep_rows()'),
    ('publisher_limits', 'applied_truncated', 'after truncate on outbox.publisher_limits for each statement execute function outbox.put_rows_back()'),
    ('ticks', 'applied_truncate', 'before truncate on outbox.ticks for each statement execute function outbox.keep_rows()'),
    ('ticks', 'applied_truncated', 'after truncate on outbox.ticks for each statement execute function outbox.put_rows_back()'),
    ('former_lanes', 'applied_truncate', 'before truncate on outbox.former_lanes for each statement execute function outbox.keep_rows()'),
    ('former_lanes', 'applied_truncated', 'after truncate on outbox.former_lanes for each statement execute function outbox.put_rows_back()'),
    ('installation', 'applied_truncate', 'before truncate on outbox.installation for each statement execute function outbox.keep_rows()'),
    ('installation', 'applied_truncated', 'after truncate on outbox.installation for each statement execute function outbox.put_rows_back()'),
    ('incarnations', 'applied_truncate', 'before truncate on outbox.incarnations for each statement execute function outbox.keep_rows()'),
    ('incarnations', 'applied_truncated', 'after truncate on outbox.incarnations for each statement execute function outbox.put_rows_back()'),
    ('take_overs', 'applied_truncate', 'before truncate on outbox.take_overs for each statement execute function outbox.keep_rows()'),
    ('take_overs', 'applied_truncated', 'after truncate on outbox.take_overs for each statement execute function outbox.put_rows_back()'),
    ('restores', 'applied_truncate', 'before truncate on outbox.restores for each statement execute function outbox.keep_rows()'),
    ('restores', 'applied_truncated', 'after truncate on outbox.restores for each statement execute function outbox.put_rows_back()'),
    ('replays', 'applied_truncate', 'before truncate on outbox.replays for each statement execute function outbox.keep_rows()'),
    ('replays', 'applied_truncated', 'after truncate on outbox.replays for each statement execute function outbox.put_rows_back()'),
    ('known_triggers', 'applied_truncate', 'before truncate on outbox.known_triggers for each statement execute function outbox.keep_rows()'),
    ('known_triggers', 'applied_truncated', 'after truncate on outbox.known_triggers for each statement execute function outbox.put_rows_back()'),
    -- It runs before all others, because of its name.
    ('events', 'applied_event', 'before insert on outbox.events for each row when (current_setting(''session_replication_role'') = ''replica'') execute function outbox.hold_event()'),
    ('events', 'applied_change', 'before update or delete on outbox.events for each row execute function outbox.leave_local()'),
    ('scheduled_events', 'applied_event', 'before insert or update or delete on outbox.scheduled_events for each row when (current_setting(''session_replication_role'') = ''replica'') execute function outbox.hold_scheduled()'),
    ('cursors', 'applied_cursor', 'before insert or update or delete on outbox.cursors for each row when (outbox.is_applied()) execute function outbox.hold_cursor()'),
    ('refused_events', 'applied_event', 'before insert on outbox.refused_events for each row when (outbox.is_applied()) execute function outbox.hold_refused()'),
    ('refused_events', 'applied_change', 'before update or delete on outbox.refused_events for each row execute function outbox.leave_local()'),
    ('failed_events', 'applied_event', 'before insert on outbox.failed_events for each row when (outbox.is_applied()) execute function outbox.place_failed()'),
    ('backends', 'applied_change', 'before insert or update or delete on outbox.backends for each row execute function outbox.leave_local()'),
    ('backend_passwords', 'applied_change', 'before insert or update or delete on outbox.backend_passwords for each row execute function outbox.leave_local()'),
    ('ticks', 'applied_change', 'before insert or update or delete on outbox.ticks for each row execute function outbox.leave_local()'),
    ('former_lanes', 'applied_change', 'before insert or update or delete on outbox.former_lanes for each row execute function outbox.leave_local()'),
    ('installation', 'applied_change', 'before insert or update or delete on outbox.installation for each row execute function outbox.leave_local()'),
    ('incarnations', 'applied_change', 'before insert or update or delete on outbox.incarnations for each row execute function outbox.leave_local()'),
    ('take_overs', 'applied_change', 'before insert or update or delete on outbox.take_overs for each row execute function outbox.leave_local()'),
    ('known_triggers', 'applied_change', 'before insert or update or delete on outbox.known_triggers for each row execute function outbox.leave_local()'),
    ('restores', 'applied_change', 'before insert or update or delete on outbox.restores for each row execute function outbox.leave_local()'),
    ('replays', 'applied_change', 'before insert or update or delete on outbox.replays for each row execute function outbox.leave_local()'),
    ('events', 'complete_event', 'before insert on outbox.events for each row execute function outbox.complete_event()'),
    -- Triggers fire in the order of their names: this name comes after those of other triggers.
    ('events', '~confirm_event', 'before insert on outbox.events for each row execute function outbox.confirm_event()'),
    ('events', 'fan_out', 'after insert on outbox.events for each statement execute function outbox.fan_out()'),
    ('events', 'refuse_update', 'before update on outbox.events for each row execute function outbox.refuse_update()'),
    ('scheduled_events', 'complete_event', 'before insert on outbox.scheduled_events for each row execute function outbox.complete_event()'),
    ('scheduled_events', 'fan_out', 'after insert on outbox.scheduled_events for each statement execute function outbox.fan_out()'),
    ('scheduled_events', 'rescheduled', 'after update on outbox.scheduled_events for each statement execute function outbox.rescheduled()'),
    ('inbox', 'check_consumer', 'before insert on outbox.inbox for each row execute function outbox.check_consumer()'),
    -- It runs before check_backend, because of its name.
    ('backends', 'backend_stream', 'before insert or update on outbox.backends for each row execute function outbox.check_stream_name()'),
    ('backends', 'check_backend', 'before insert or update on outbox.backends for each row execute function outbox.check_backend()'),
    -- It runs after check_backend, because of its name.
    ('backends', 'check_number', 'before insert on outbox.backends for each row when (not pg_catalog.has_function_privilege(''outbox.check_number()'', ''execute'')) execute function outbox.check_number()'),
    ('backends', 'check_backend_deletion', 'before delete on outbox.backends for each row execute function outbox.check_backend_deletion()'),
    ('backends', 'keep_password', 'after update on outbox.backends for each row when (pg_catalog.has_function_privilege(''outbox.set_backend_password(pg_catalog.text, pg_catalog.text)'', ''execute'')) execute function outbox.keep_password()'),
    ('backends', 'note_move', 'after insert or update on outbox.backends for each row when (not pg_catalog.pg_has_role(''pg_read_server_files'', ''usage'')) execute function outbox.note_move()'),
    ('backends', 'forget_move', 'after update on outbox.backends for each row when (pg_catalog.pg_has_role(''pg_read_server_files'', ''usage'')) execute function outbox.forget_move()'),
    ('backends', 'backends_changed', 'after insert or update or delete or truncate on outbox.backends for each statement execute function outbox.backends_changed()'),
    ('backends', 'expect_room', 'after insert or update on outbox.backends for each statement execute function outbox.expect_room()'),
    ('backend_passwords', 'backends_changed', 'after insert or update or delete or truncate on outbox.backend_passwords for each statement execute function outbox.backends_changed()'),
    ('take_overs', 'backends_changed', 'after insert or update on outbox.take_overs for each statement execute function outbox.backends_changed()'),
    ('moved_backends', 'applied_change', 'before insert or update or delete on outbox.moved_backends for each row execute function outbox.leave_local()'),
    ('routes', 'applied_change', 'before insert or update or delete on outbox.routes for each row execute function outbox.leave_local()'),
    ('routes', 'check_route', 'before insert or update on outbox.routes for each row execute function outbox.check_route()'),
    ('routes', 'expect_room', 'after insert or update on outbox.routes for each statement execute function outbox.expect_room()'),
    ('routes', 'backends_changed', 'after insert or update or delete or truncate on outbox.routes for each statement execute function outbox.backends_changed()'),
    ('publisher_limits', 'applied_change', 'before insert or update or delete on outbox.publisher_limits for each row execute function outbox.leave_local()'),
    ('consumer_grants', 'leave_out_role', 'before insert on outbox.consumer_grants for each row when (new.role::pg_catalog.oid = 0) execute function outbox.leave_out_role()'),
    ('publisher_limits', 'leave_out_role', 'before insert on outbox.publisher_limits for each row when (new.role::pg_catalog.oid = 0) execute function outbox.leave_out_role()'),
    ('publisher_limits', 'backends_changed', 'after insert or update or delete or truncate on outbox.publisher_limits for each statement execute function outbox.backends_changed()'),
    ('copied_backends', 'applied_change', 'before insert or update or delete on outbox.copied_backends for each row execute function outbox.leave_local()'),
    ('copied_backends', 'backends_changed', 'after insert or update or delete or truncate on outbox.copied_backends for each statement execute function outbox.backends_changed()'),
    ('restores', 'backends_changed', 'after insert on outbox.restores for each statement execute function outbox.backends_changed()');
end
$$;
comment on function outbox.our_triggers() is 'The triggers of this extension''s tables. All are ENABLE ALWAYS, so that they also fire when session_replication_role is replica.';

create function outbox.broken_triggers(out relation text, out name text, out found text) returns setof record
    language plpgsql stable set search_path = pg_catalog, pg_temp
    as $$
#variable_conflict use_column
begin
    -- PL/pgSQL, because it caches the plan, which an SQL function does not.
    return query
select o.relation, o.name,
    case t.tgenabled when 'D' then 'disabled' when 'O' then 'not enabled always' when 'R' then 'enabled only for replicas' else 'missing' end
from outbox.our_triggers() o
    left join pg_trigger t on t.tgrelid = to_regclass('outbox.' || o.relation) and t.tgname = o.name and not t.tgisinternal
where t.tgenabled is distinct from 'A' and to_regclass('outbox.' || o.relation) is not null;
end
$$;
comment on function outbox.broken_triggers() is 'Triggers of this extension that are missing or not ENABLE ALWAYS, for example after pg_restore --disable-triggers. The worker repairs them.';

create function outbox.mend_trigger(relation text, name text) returns void
    language plpgsql set search_path = pg_catalog, pg_temp set lock_timeout = '100ms'
    as $$
declare
    o record;
begin
    select * into strict o from outbox.our_triggers() t where t.relation = mend_trigger.relation and t.name = mend_trigger.name;
    if not exists (select from pg_trigger t
        where t.tgrelid = format('outbox.%I', o.relation)::regclass and t.tgname = o.name and not t.tgisinternal) then
        execute format('create trigger %I %s', o.name, o.definition);
    end if;
    execute format('alter table outbox.%I enable always trigger %I', o.relation, o.name);
end
$$;
comment on function outbox.mend_trigger(text, text) is 'Creates one of this extension''s triggers if it is missing, and sets it to ENABLE ALWAYS.';

do $$
begin
    perform outbox.mend_trigger(o.relation, o.name) from outbox.our_triggers() o;
end
$$;

insert into outbox.backends (name) values ('default');

-- Rows that come while triggers are disabled carry ids of another cluster: the worker looks for them when a trigger was
-- changed.

create function outbox.trigger_state(out triggers text, out filenode oid) returns record
    language sql stable set search_path = pg_catalog, pg_temp
    as $$
select (select t.oid || ' ' || t.xmin from pg_trigger t where t.tgrelid = 'outbox.events'::regclass and t.tgname = 'complete_event'),
    pg_relation_filenode('outbox.events')
$$;
comment on function outbox.trigger_state() is 'The identity of the trigger of outbox.events, and of the table''s file. It changes whenever somebody changes the trigger or rewrites the table.';

insert into outbox.known_triggers (triggers, filenode, snapshot, next_xid, low_seq, high_seq)
    select s.triggers, s.filenode, format('%s:%s:', x, x)::pg_snapshot, x, 0, 0
    from outbox.trigger_state() s, pg_snapshot_xmin(pg_current_snapshot()) as x;
