-- Privileges: PUBLIC has none, pg_monitor may read the views. Nor has anybody what the default privileges of whoever
-- creates the extension grant on each new object: they are not meant for passwords and the events of others.

create function outbox.keep_to_owner(kind text, object text) returns void
    language plpgsql set search_path = pg_catalog, pg_temp
    as $$
declare
    o record;
    others oid;
begin
    if kind in ('table', 'view', 'sequence') then
        select coalesce(c.relacl, acldefault(case c.relkind when 'S' then 's' else 'r' end::"char", c.relowner)) as acl, c.relowner as owner
            into strict o from pg_class c where c.oid = object::regclass;
    elsif kind = 'type' then
        select coalesce(t.typacl, acldefault('T', t.typowner)) as acl, t.typowner as owner
            into strict o from pg_type t where t.oid = object::regtype;
    else
        select coalesce(p.proacl, acldefault('f', p.proowner)) as acl, p.proowner as owner
            into strict o from pg_proc p where p.oid = object::regprocedure;
    end if;
    for others in select distinct a.grantee from aclexplode(o.acl) a where a.grantee <> o.owner loop
        execute format('revoke all on %s %s from %s', case kind when 'view' then 'table' else kind end, object,
            case others when 0 then 'public' else others::regrole::text end);
    end loop;
end
$$;
comment on function outbox.keep_to_owner(text, text) is 'Revokes what PUBLIC and other roles may do with a new object of this extension, by themselves or by default privileges.';

revoke all on schema outbox from public;
do $$
begin
    perform outbox.keep_to_owner(o.kind, o.name)
    from (
        select case c.relkind when 'S' then 'sequence' else 'table' end as kind, c.oid::regclass::text as name
            from pg_class c where c.relnamespace = 'outbox'::regnamespace and c.relkind in ('r', 'v', 'S')
        union all
        select 'routine', p.oid::regprocedure::text from pg_proc p where p.pronamespace = 'outbox'::regnamespace
        union all
        -- Also the types of rows: a table with a column of such a type would stop each ALTER that rewrites our table.
        select 'type', t.oid::regtype::text from pg_type t
            where t.typnamespace = 'outbox'::regnamespace and t.typtype in ('b', 'c', 'd') and t.typcategory <> 'A'
    ) o;
end
$$;
grant usage on schema outbox to pg_monitor;
grant select on outbox.attached_tables, outbox.status, outbox.backend_status, outbox.event_status, outbox.top, outbox.metrics, outbox.consumers to pg_monitor;
grant execute on function outbox.worker_status(), outbox.launcher_pid(), outbox.meters(), outbox.short_count(bigint), outbox.short_time(double precision), outbox.short_text(text, integer), outbox.backlog(integer), outbox.is_delivered(outbox.cursors, xid8, bigint), outbox.hash_slot(text), outbox.common_stream(), outbox.stream_part(text, integer), outbox.health(interval), outbox.drain(interval), outbox.wait_published(uuid, interval), outbox.wait_for_event(uuid, double precision), outbox.want_consumers(), outbox.probe_consumers() to pg_monitor;
