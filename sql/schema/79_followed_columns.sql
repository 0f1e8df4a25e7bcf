-- Follows columns of attached tables that are renamed or dropped, and new partitions and children. The arguments of
-- outbox.attach_table() are in the comment of the table's function, with the present names of the columns.

create function outbox.expect_condition(relation regclass, condition text, publisher oid) returns void
    language plpgsql set search_path = pg_catalog, pg_temp set standard_conforming_strings = on set datestyle = 'iso, mdy' set array_nulls = on
    as $$
begin
    if condition is not null then
        -- Neither runs with the rights of the role that changes the table, which may have more of them than the owner,
        -- who wrote the condition.
        perform outbox.analyse_as(publisher, outbox.condition_query(relation, condition));
    end if;
exception when others then
    raise exception using errcode = 'dependent_objects_still_exist', message = format('the condition of attached table %s would no longer fit its columns', relation),
        detail = format('%s. The condition is: %s', sqlerrm, condition),
        hint = format('In one transaction, run SELECT outbox.detach_table(%L);, this statement, and outbox.attach_table() with another condition.', relation::text);
end
$$;
comment on function outbox.expect_condition(regclass, text, oid) is 'Raises an ERROR if the condition of an attached table does not fit its columns. It is parsed with the rights of this role.';

create function outbox.follow_attached() returns event_trigger
    language plpgsql set search_path = pg_catalog, pg_temp
    as $$
declare
    d record;
    was_named text;
    said jsonb;
    list text;
begin
    -- Most roles that alter tables have no rights in schema outbox: so only the catalog is read before the body of the
    -- loop. A column that is named in the comment but does not exist in the table is the renamed column, under its
    -- former name. A partitioned table comes before its partitions, because the body of the function depends on that.
    for d in
        -- Only comments of the altered tables' triggers are parsed, and of roles whose rights the table's owner has:
        -- anybody may write what he likes on a function of his own, and whoever was granted TRIGGER may make it a
        -- trigger.
        with altered as materialized (
            select f.oid, f.oid = c.objid as is_itself, k.relkind, g.tgfoid, p.proowner, a.attname, obj_description(g.tgfoid, 'pg_proc') as comment
            from pg_event_trigger_ddl_commands() c join pg_attribute a on a.attrelid = c.objid and a.attnum = c.objsubid
                cross join lateral (with recursive family (oid) as (
                    -- A renamed attribute of a type is one of the tables that were created OF it.
                    (select c.objid union select k.oid from pg_class y join pg_class k on k.reloftype = y.reltype
                        where y.oid = c.objid and y.relkind = 'c')
                    union select i.inhrelid from family f join pg_inherits i on i.inhparent = f.oid
                ) select oid from family) f
                join pg_class k on k.oid = f.oid join pg_trigger g on g.tgrelid = f.oid join pg_proc p on p.oid = g.tgfoid
            where c.classid = 'pg_class'::regclass and c.objsubid > 0 and not g.tgisinternal
                and g.tgname ~ '^outbox_relay_(insert|update|delete|truncate)$' and pg_has_role(k.relowner, p.proowner, 'usage')
        ), attached as materialized (
            select l.*, substr(l.comment, 54)::jsonb as said
            from altered l where l.comment like E'Publishes rows as events, see outbox.attach\\_table(): {%'
        )
        select distinct on (t.tgfoid) t.oid::regclass as relation, t.tgfoid as function, t.proowner, t.said, t.attname as now_named,
            array(select distinct n.name from jsonb_array_elements_text(coalesce(t.said -> 'key', '[]') || coalesce(t.said -> 'columns', '[]')) n (name)
                where not exists (select from pg_attribute a where a.attrelid = t.oid and a.attname = n.name and a.attnum > 0 and not a.attisdropped)) as missing
        from attached t
        order by t.tgfoid, t.is_itself desc, t.relkind = 'p' desc
    loop
        was_named := case cardinality(d.missing) when 1 then d.missing[1] end;
        continue when was_named is null and not d.said ? 'condition';
        if not has_schema_privilege('outbox', 'usage') or not pg_has_role(d.proowner, 'usage') then
            raise exception using errcode = 'insufficient_privilege', message = format('columns of attached table %s cannot be renamed by "%s"', d.relation, current_user),
                detail = format('The role "%s" publishes the table.', pg_get_userbyid(d.proowner)),
                hint = 'That role, if it is a publisher, or a superuser may rename them.';
        end if;
        perform outbox.expect_condition(d.relation, d.said ->> 'condition', d.proowner);
        continue when was_named is null;
        said := d.said;
        foreach list in array '{key,columns}'::text[] loop
            if said ? list then
                said := jsonb_set(said, array[list], coalesce((select jsonb_agg(case n.name when was_named then d.now_named else n.name end order by n.place)
                    from jsonb_array_elements_text(said -> list) with ordinality n (name, place)), '[]'));
            end if;
        end loop;
        perform outbox.write_row_function(d.relation, d.function::regproc::text, said, true);
    end loop;
end
$$;
comment on function outbox.follow_attached() is 'Event trigger: an attached table follows a renamed column that is named in its key or columns. If its condition names it, the statement is refused.';

create function outbox.keep_attached() returns event_trigger
    language plpgsql set search_path = pg_catalog, pg_temp
    as $$
declare
    d record;
begin
    -- Most dropped objects are not columns.
    if not exists (select from pg_event_trigger_dropped_objects() o where o.object_type = 'table column') then
        return;
    end if;
    for d in
        -- As above, only these tables' comments are parsed. Columns that go with a parent's are among them, and come
        -- after it.
        with dropped as materialized (
            select distinct o.objid, p.proowner, obj_description(g.tgfoid, 'pg_proc') as comment, o.address_names[3] as name, o.original
            from pg_event_trigger_dropped_objects() o join pg_class k on k.oid = o.objid join pg_trigger g on g.tgrelid = k.oid join pg_proc p on p.oid = g.tgfoid
            where o.object_type = 'table column' and not g.tgisinternal and g.tgname ~ '^outbox_relay_(insert|update|delete|truncate)$'
                and pg_has_role(k.relowner, p.proowner, 'usage')
        )
        select l.objid::regclass as relation, l.proowner, substr(l.comment, 54)::jsonb as said, l.name, l.original
        from dropped l where l.comment like E'Publishes rows as events, see outbox.attach\\_table(): {%'
        order by l.original desc
    loop
        if coalesce(d.said -> 'key', '[]') || coalesce(d.said -> 'columns', '[]') ? d.name then
            raise exception using errcode = 'dependent_objects_still_exist', message = format('column "%s" of attached table %s is published', d.name, d.relation),
                detail = 'The column is in the key or in the columns that were passed to outbox.attach_table().',
                hint = format('In one transaction, run SELECT outbox.detach_table(%L);, this statement, and outbox.attach_table() without the column.', d.relation::text);
        end if;
        if d.said ? 'condition' and not (has_schema_privilege('outbox', 'usage') and pg_has_role(d.proowner, 'usage')) then
            raise exception using errcode = 'insufficient_privilege', message = format('columns of attached table %s cannot be dropped by "%s"', d.relation, current_user),
                detail = format('The role "%s" publishes the table, with a condition.', pg_get_userbyid(d.proowner)),
                hint = 'That role, if it is a publisher, or a superuser may drop them.';
        end if;
        if d.said ? 'condition' then
            perform outbox.expect_condition(d.relation, d.said ->> 'condition', d.proowner);
        end if;
    end loop;
end
$$;
comment on function outbox.keep_attached() is 'Event trigger: refuses to drop a column that is named in the key, the columns or the condition of an attached table.';

create function outbox.attach_children() returns event_trigger
    language plpgsql set search_path = pg_catalog, pg_temp
    as $$
declare
    t record;
begin
    -- Most new tables have no parent.
    if tg_tag <> 'ALTER TABLE' and not exists (select from pg_event_trigger_ddl_commands() c join pg_inherits i on i.inhrelid = c.objid) then
        return;
    end if;
    -- Only links that this transaction has made after the parent's triggers: a restore makes links before the triggers,
    -- and restores the children's triggers itself.
    for t in select i.inhrelid::regclass as relation, g.tgname, g.tgoldtable, g.tgnewtable, g.tgfoid, p.proowner,
            k.relowner = o.relowner and pg_has_role(o.relowner, p.proowner, 'usage') and pg_has_role(p.proowner, 'usage') as is_ours
        from (select distinct c.objid from pg_event_trigger_ddl_commands() c where c.classid = 'pg_class'::regclass and c.objsubid = 0) d
            join pg_inherits i on d.objid in (i.inhparent, i.inhrelid)
            join pg_class k on k.oid = i.inhrelid and k.relkind in ('r', 'p') join pg_class o on o.oid = i.inhparent
            join pg_trigger g on g.tgrelid = i.inhparent join pg_proc p on p.oid = g.tgfoid
        where age(i.xmin) <= 0
            and case when i.xmin = g.xmin then i.cmin::text::bigint > g.cmin::text::bigint else age(g.xmin) > age(i.xmin) end
            and not g.tgisinternal and g.tgname ~ '^outbox_relay_(insert|update|delete)$'
            and not exists (select from pg_trigger h where h.tgrelid = i.inhrelid and h.tgname = g.tgname)
        order by is_ours desc, g.oid
    loop
        -- No table gets a trigger that belongs to another role in this way.
        if not t.is_ours then
            raise warning using message = format('statements on %s itself are not published', t.relation),
                detail = format('The role "%s" publishes its parent, or the parent has another owner.', pg_get_userbyid(t.proowner)),
                hint = 'That role or a superuser must attach the parent again.';
            exit;
        end if;
        execute format('create trigger %I after %s on %s referencing %s %s for each statement execute function %s()', t.tgname, substr(t.tgname, 14), t.relation,
            case when t.tgoldtable is not null then 'old table as outbox_relay_old' else '' end,
            case when t.tgnewtable is not null then 'new table as outbox_relay_new' else '' end, t.tgfoid::regproc);
    end loop;
end
$$;
comment on function outbox.attach_children() is 'Event trigger: a new partition or child of an attached table gets the triggers of its parent.';

create event trigger outbox_relay_follow on ddl_command_end when tag in ('ALTER TABLE', 'ALTER FOREIGN TABLE', 'ALTER TYPE') execute function outbox.follow_attached();
create event trigger outbox_relay_children on ddl_command_end when tag in ('ALTER TABLE', 'CREATE TABLE', 'CREATE SCHEMA') execute function outbox.attach_children();
create event trigger outbox_relay_keep on sql_drop execute function outbox.keep_attached();
comment on event trigger outbox_relay_follow is 'Follows renamed columns of attached tables, see outbox.attach_table().';
comment on event trigger outbox_relay_children is 'Attaches new partitions and children of attached tables, see outbox.attach_table().';
comment on event trigger outbox_relay_keep is 'Protects published columns of attached tables, see outbox.attach_table().';
-- They also fire when triggers are disabled for a restore or for logical replication.
alter event trigger outbox_relay_follow enable always;
alter event trigger outbox_relay_children enable always;
alter event trigger outbox_relay_keep enable always;
