-- Row changes as events: the triggers that outbox.attach_table() makes on users' tables. Each attached table has a
-- function of its own, which belongs to the table's owner, whoever attaches it: it publishes with that role's rights,
-- whoever changes the table. So code that the owner controls (the condition, casts of the owner's types to JSON) runs
-- with the owner's rights, and with no others. Triggers and function are objects of the user's schema, and are dumped
-- as such.

create function outbox.row_events(relation regclass, event_type text, source text, backend text, key text[], columns text[], operations text[], condition text, payload text) returns text
    language plpgsql stable set search_path = pg_catalog, pg_temp
    as $$
declare
    -- These are format() templates, in which a % of a name or of the condition is doubled: the published columns of row
    -- "old" or "new". The number that pairs the rows is not a column of the table. "new.*" always means the row; "new"
    -- alone would mean a column of that name, if there is one.
    row_of constant text := case when columns is null then '(to_jsonb(%1$s.*) - ''outbox_relay number'')'
        else '(select to_jsonb(d.*) from (select ' || (select string_agg('%1$s.' || replace(quote_ident(c.name), '%', '%%'), ', ' order by c.place) from unnest(columns) with ordinality c (name, place)) || ') d)' end;
    old_row constant text := format(row_of, 'old');
    new_row constant text := format(row_of, 'new');
    subject_of constant text := case cardinality(coalesce(key, '{}')) when 0 then 'null' when 1 then '%1$s.' || replace(quote_ident(key[1]), '%', '%%') || '::text'
        else format('jsonb_build_array(%s)::text', (select string_agg('%1$s.' || replace(quote_ident(k.name), '%', '%%'), ', ' order by k.place) from unnest(key) with ordinality k (name, place))) end;
    moved constant text := case when cardinality(coalesce(key, '{}')) = 0 or not operations && '{insert,delete}' then 'false'
        else format('(%s is distinct from %s)', format(subject_of, 'old'), format(subject_of, 'new')) end;
    inserted constant text := case payload when 'both' then format('jsonb_build_object(''old'', null, ''new'', %s)', new_row) else new_row end;
    deleted constant text := case payload when 'both' then format('jsonb_build_object(''old'', %s, ''new'', null)', old_row) else old_row end;
    updated constant text := case payload when 'both' then format('jsonb_build_object(''old'', %s, ''new'', %s)', old_row, new_row)
        when 'changed' then format('(select coalesce(jsonb_object_agg(n.key, n.value), ''{}'') from jsonb_each(%s) n join jsonb_each(%s) o on o.key = n.key where n.value <> o.value)', new_row, old_row)
        else new_row end;
    -- An unqualified name in the condition is a column of the row.
    holds constant text := case when condition is null then 'true' else E'(select (' || replace(condition, '%', '%%') || E'\n) from (select %1$s.*) "row")' end;
    no_row constant text := case when condition is null then '' else ' left join (select t.* from %1$s t where false) %2$s on true' end;
    into_events constant text := 'insert into outbox.events (event_type, source, backend, subject, data) ';
    fixed constant text := format('%L, %L', source, backend);
    body text := '#variable_conflict use_column' || E'\nbegin\n';
begin
    -- The owner of a table runs code in this function: casts of its types, and what the condition calls. So the owner
    -- must have the function's rights anyway. Columns of a partition, and so code, come from the owner of the whole
    -- table.
    body := body || format($q$if not exists (select from pg_class c where c.oid = coalesce(pg_partition_root(tg_relid), tg_relid) and pg_has_role(c.relowner, current_user, 'usage')) then
raise exception using errcode = 'insufficient_privilege', message = format(%L, tg_relid::regclass), detail = format(%L, current_user), hint = format(%L, tg_relid::regclass::text);
end if;
$q$, 'table %s has another owner than when it was attached', 'Its events would be published with the rights of "%s".',
        'Let its owner, if that is a publisher, or a superuser attach it again: SELECT outbox.attach_table(%L, ...);');
    body := body || E'if tg_op = ''INSERT'' then\n' || into_events
        || format('select %L, %s, %s, %s::json from outbox_relay_new new%s where %s', event_type || '.insert', fixed, format(subject_of, 'new'), inserted,
            format(no_row, 'outbox_relay_new', 'old'), format(holds, 'new')) || E';\n';
    body := body || E'elsif tg_op = ''DELETE'' then\n' || into_events
        || format('select %L, %s, %s, %s::json from outbox_relay_old old%s where %s', event_type || '.delete', fixed, format(subject_of, 'old'), deleted,
            format(no_row, 'outbox_relay_old', 'new'), format(holds, 'old')) || E';\n';
    body := body || E'elsif tg_op = ''UPDATE'' then\n';
    if exists (select from pg_class c where c.oid = relation and c.relkind = 'p') then
        -- A trigger may leave out a row that moves to another partition. Then old and new rows no longer form pairs.
        body := body || format(E'if (select count(*) from outbox_relay_old) <> (select count(*) from outbox_relay_new) then\nraise exception using errcode = ''feature_not_supported'', message = %L, detail = %L, hint = %L;\nend if;\n',
            'a trigger has left out rows that an UPDATE moves to another partition',
            'Old and new rows of the attached table can then not be paired.', 'Let no trigger of a partition return NULL for a row that moves into it.');
    end if;
    if moved = 'false' and payload = 'new' and condition is null then
        body := body || into_events || format('select %L, %s, %s, %s::json from outbox_relay_new new', event_type || '.update', fixed, format(subject_of, 'new'), new_row) || E';\n';
    else
        -- Old and new rows come in the same order. If keys change, the events of the old keys come first, because a
        -- row's new key may be another row's old key.
        body := body || format($q$with pairs as materialized (
select new."outbox_relay number" as place, %1$s as moved, %2$s as old_subject, %3$s as subject, %4$s as data, case when %1$s then %5$s end as gone, case when %1$s then %6$s end as come
from (select row_number() over () as "outbox_relay number", t.* from outbox_relay_old t) old
join (select row_number() over () as "outbox_relay number", t.* from outbox_relay_new t) new on new."outbox_relay number" = old."outbox_relay number"
where %7$s)
%8$sselect e.event_type, %9$s, e.subject, e.data::json from (
select 0 as turn, p.place, %10$L as event_type, p.old_subject as subject, p.gone as data from pairs p where p.moved and %11$s
union all
select 1, p.place, case when p.moved then %12$L else %13$L end, p.subject, case when p.moved then p.come else p.data end from pairs p where (not p.moved or %14$s) and (p.moved or p.data <> '{}' or %15$s)
) e order by e.turn, e.place;
$q$, moved, format(subject_of, 'old'), format(subject_of, 'new'), updated, deleted, inserted, format(holds, 'new'), into_events, fixed,
        event_type || '.delete', ('delete' = any (operations))::text, event_type || '.insert', event_type || '.update', ('insert' = any (operations))::text, (payload <> 'changed')::text);
    end if;
    body := body || E'else\n' || into_events || format('values (%L, %s, null, null)', event_type || '.truncate', fixed) || E';\nend if;\n';
    return body || E'return null;\nend\n';
end
$$;
comment on function outbox.row_events(regclass, text, text, text, text[], text[], text[], text, text) is 'Part of outbox.attach_table(): the body of the trigger function of a table.';

create function outbox.condition_query(relation regclass, condition text) returns text
    language plpgsql stable set search_path = pg_catalog, pg_temp
    as $$
declare
    -- Without virtual generated columns, because triggers do not see their values.
    seen constant text := case when exists (select from pg_attribute a where a.attrelid = relation and a.attgenerated = 'v')
        then (select string_agg(format('t.%I', a.attname), ', ' order by a.attnum) from pg_attribute a
            where a.attrelid = relation and a.attnum > 0 and not a.attisdropped and a.attgenerated <> 'v') else 't.*' end;
begin
    return format(E'select from (select %3$s from %1$s t) old, (select %3$s from %1$s t) new where false and (select (%2$s\n) from (select new.*) "row")',
        relation, condition, seen);
end
$$;
comment on function outbox.condition_query(regclass, text) is 'Part of outbox.attach_table(): a query that can be parsed if the condition fits the columns of the table.';

create function outbox.analyse_as(role oid, query text) returns void
    language c volatile strict
    as 'MODULE_PATHNAME', 'analyse_as';
comment on function outbox.analyse_as(oid, text) is 'Part of outbox.attach_table(): parses a query with the rights of a role that the caller may SET ROLE to, and does not execute it. Constants of domains within arrays and composite types run the checks of these domains even then.';

create function outbox.write_row_function(relation regclass, function text, said jsonb, replaces boolean) returns void
    language plpgsql set search_path = pg_catalog, pg_temp
    as $$
begin
    -- Without nested loops, because a plan that is made for one row must also serve a million. The settings make values
    -- look the same in all sessions; otherwise a row would have several subjects. And the condition means the same.
    execute format('create %s function %s() returns trigger language plpgsql security definer set search_path = pg_catalog, pg_temp set enable_nestloop = off
            set standard_conforming_strings = on set transform_null_equals = off set array_nulls = on set quote_all_identifiers = off set lc_monetary = ''C''
            set datestyle = ''iso, mdy'' set intervalstyle = postgres set timezone = utc set bytea_output = hex set extra_float_digits = 1 as %L',
        case when replaces then 'or replace' else '' end, function, outbox.row_events(relation, said ->> 'event_type', said ->> 'source', said ->> 'backend',
            array(select jsonb_array_elements_text(said -> 'key')), case when said ? 'columns' then array(select jsonb_array_elements_text(said -> 'columns')) end,
            string_to_array(said ->> 'operations', ','), said ->> 'condition', said ->> 'payload'));
    -- Replacing a function removes its dependency on the extension.
    execute format('alter function %s() depends on extension outbox_relay', function);
    execute format('comment on function %s() is %L', function, 'Publishes rows as events, see outbox.attach_table(): ' || said::text);
end
$$;
comment on function outbox.write_row_function(regclass, text, jsonb, boolean) is 'Part of outbox.attach_table(): creates the trigger function of a table. Its comment holds the arguments.';

create function outbox.family_of("table" regclass) returns setof oid
    language sql stable set search_path = pg_catalog, pg_temp
    as $$
with recursive family (oid) as (
    select "table"::oid union select i.inhrelid from family f join pg_inherits i on i.inhparent = f.oid
)
select f.oid from family f
$$;
comment on function outbox.family_of(regclass) is 'Part of outbox.attach_table() and outbox.detach_table(): the table, its partitions and its children.';

create function outbox.detach_table("table" regclass) returns void
    language plpgsql set search_path = pg_catalog, pg_temp
    as $$
declare
    t record;
    functions oid[] := '{}';
begin
    -- One session at a time. Otherwise several that attach or detach a table wait for each other's locks of it and of
    -- its triggers: a deadlock. This lock lets others write, and only roles that may change the table can take it.
    if exists (select from pg_class c where c.oid = "table" and c.relkind in ('r', 'p')) then
        execute format('lock table %s in share update exclusive mode', "table");
    end if;
    for t in
        select g.tgname, g.tgrelid::regclass as relation, g.tgfoid from outbox.family_of("table") f (oid) join pg_trigger g on g.tgrelid = f.oid
        where not g.tgisinternal and g.tgname ~ '^outbox_relay_(insert|update|delete|truncate)$'
    loop
        execute format('drop trigger %I on %s', t.tgname, t.relation);
        functions := functions || t.tgfoid;
    end loop;
    -- This includes functions of tables that were dropped while they were attached. The table may have been moved from
    -- another schema.
    for t in
        select p.oid::regprocedure as function from pg_class c join pg_proc p on p.pronamespace = c.relnamespace or p.oid = any (functions)
            join pg_depend d on d.classid = 'pg_proc'::regclass and d.objid = p.oid and d.deptype = 'x' and d.refclassid = 'pg_extension'::regclass
            join pg_extension e on e.oid = d.refobjid and e.extname = 'outbox_relay'
        where c.oid = "table" and p.proname like E'outbox\\_events\\_of\\_%' and pg_has_role(p.proowner, 'usage')
            and not exists (select from pg_trigger g where g.tgfoid = p.oid)
    loop
        execute format('drop function %s()', t.function::oid::regproc);
    end loop;
end
$$;
comment on function outbox.detach_table(regclass) is 'The reverse of outbox.attach_table(), for a table with its partitions and children. Published events stay. It does nothing if the table is not attached.';

create function outbox.attach_table("table" regclass, event_type text default null, source text default null, backend text default null, key text[] default null,
        columns text[] default null, operations text default 'insert,update,delete', condition text default null, payload text default 'new') returns void
    -- The condition is tried as it will be read.
    language plpgsql set search_path = pg_catalog, pg_temp set standard_conforming_strings = on set datestyle = 'iso, mdy' set array_nulls = on
    as $$
declare
    c record;
    -- In this order, each operation once.
    wanted constant text[] := array(select o.name from unnest('{insert,update,delete,truncate}'::text[]) with ordinality o (name, place)
        where o.name = any (array(select lower(btrim(w.name)) from unnest(string_to_array(operations, ',')) w (name))) order by o.place);
    name text;
    missing text;
    function text;
    owner name;
    family record;
    operation text;
begin
    select k.relname, k.relkind, k.relpersistence, k.relowner, n.nspname into c from pg_class k join pg_namespace n on n.oid = k.relnamespace where k.oid = "table";
    if not found then
        raise exception using errcode = 'undefined_table', message = 'the table does not exist', hint = 'Pass its name: outbox.attach_table(''orders'').';
    end if;
    if c.relkind not in ('r', 'p') or c.relpersistence = 't' or c.nspname in ('outbox', 'pg_catalog', 'information_schema') then
        raise exception using errcode = 'wrong_object_type', message = format('%s cannot be attached', "table"),
            detail = 'Views, foreign tables, temporary tables, system tables and tables in schema outbox cannot be attached.', hint = 'Attach a table, partitioned or not.';
    end if;
    if not pg_has_role(c.relowner, 'usage') then
        raise exception using errcode = 'insufficient_privilege', message = format('must be owner of table %s', "table"),
            hint = 'Its owner, or a superuser, may attach it.';
    end if;
    owner := pg_get_userbyid(c.relowner);
    if not (has_column_privilege(c.relowner, 'outbox.events', 'event_type', 'insert') and has_schema_privilege(c.relowner, 'outbox', 'usage')) then
        raise exception using errcode = 'insufficient_privilege', message = format('role "%s" may not publish', owner),
            detail = format('The events of table %s are published with the rights of its owner.', "table"),
            hint = format('Ask the administrator to run SELECT outbox.grant_publisher(%L);', owner);
    end if;
    if not has_schema_privilege(c.relowner, c.nspname, 'create') and not (select r.rolsuper from pg_roles r where r.rolname = current_user) then
        raise exception using errcode = 'insufficient_privilege', message = format('role "%s" may not create functions in schema "%s"', owner, c.nspname),
            detail = format('The function that publishes the rows of table %s belongs to the owner of the table.', "table"),
            hint = format('Run GRANT CREATE ON SCHEMA %I TO %I; or let a superuser attach the table.', c.nspname, owner);
    end if;
    if cardinality(wanted) = 0 or cardinality(wanted) <> (select count(distinct lower(btrim(w.name))) from unnest(string_to_array(operations, ',')) w (name)) then
        raise exception using errcode = 'invalid_parameter_value', message = format('operations "%s" are unknown', operations),
            hint = 'Pass one or more of insert, update, delete and truncate, separated by commas.';
    end if;
    if payload is null or payload not in ('new', 'both', 'changed') then
        raise exception using errcode = 'invalid_parameter_value', message = format('payload "%s" is unknown', payload), hint = 'Pass new, both or changed.';
    end if;
    if columns = '{}' or key = '{}' then
        raise exception using errcode = 'invalid_parameter_value', message = 'columns and key must not be empty', hint = 'Omit columns for all columns, and key for the primary key.';
    end if;
    -- As in outbox.detach_table(). Then the table stays as it is while its function is written. If there are triggers
    -- to be dropped, at once with the lock that this takes: one that is raised later could be a deadlock with writers.
    execute format('lock table %s in share update exclusive mode', "table");
    execute format('lock table %s in %s mode', "table", case when exists (select from outbox.family_of("table") f (oid) join pg_trigger g on g.tgrelid = f.oid
        where not g.tgisinternal and g.tgname ~ '^outbox_relay_(insert|update|delete|truncate)$') then 'access exclusive' else 'share row exclusive' end);
    select w.name into missing from unnest(coalesce(columns, '{}') || coalesce(key, '{}')) w (name)
        where not exists (select from pg_attribute a where a.attrelid = "table" and a.attnum > 0 and not a.attisdropped and a.attname = w.name);
    if found then
        raise exception using errcode = 'undefined_column', message = format('column "%s" of table %s does not exist', missing, "table"),
            hint = 'Pass column names of the table.';
    end if;
    select w.name into missing from unnest(coalesce(columns, '{}') || coalesce(key, '{}')) w (name)
        join pg_attribute a on a.attrelid = "table" and a.attname = w.name and a.attgenerated = 'v';
    if found then
        raise exception using errcode = 'feature_not_supported', message = format('column "%s" of table %s is generated and virtual', missing, "table"),
            detail = 'Triggers do not see the values of such columns.', hint = 'Omit it, or generate it as STORED.';
    end if;
    if nullif(backend, '') is not null then
        perform outbox.expect_backend_name(backend);
    end if;
    if key is null then
        key := array(select a.attname from pg_index i cross join unnest(i.indkey::smallint[]) with ordinality k (number, place)
            join pg_attribute a on a.attrelid = i.indrelid and a.attnum = k.number
            where i.indrelid = "table" and i.indisprimary and k.place <= i.indnkeyatts order by k.place);
    end if;
    event_type := coalesce(nullif(event_type, ''), c.relname);
    condition := nullif(btrim(condition, E' \t\r\n'), '');
    source := coalesce(nullif(source, ''), format('/%s/%s', current_database(), c.nspname));
    if length(event_type) > 246 or length(source) > 255 then
        raise exception using errcode = 'invalid_parameter_value', message = case when length(source) > 255 then 'source' else 'event_type' end || ' is too long',
            detail = 'A source has at most 255 characters, and an event type at most 246: the operation is appended to it.', hint = 'Pass a shorter name.';
    end if;
    for family in
        select o.oid::regclass as relation, o.relowner from outbox.family_of("table") f (oid) join pg_class k on k.oid = f.oid
            join pg_class o on o.oid = coalesce(pg_partition_root(f.oid), f.oid)
        where k.relkind in ('r', 'p') and not pg_has_role(o.relowner, c.relowner, 'usage')
    loop
        raise exception using errcode = 'insufficient_privilege', message = format('table %s belongs to "%s", and not to the owner of %s', family.relation, pg_get_userbyid(family.relowner), "table"),
            detail = format('Code of that role would run with the rights of "%s", as whom the rows are published.', owner),
            hint = format('Run ALTER TABLE %s OWNER TO %I; first.', family.relation, owner);
    end loop;
    if condition is not null then
        -- An error here comes from the condition. The owner's types may run code already when it is parsed.
        begin
            perform outbox.analyse_as(c.relowner, outbox.condition_query("table", condition));
        exception when undefined_column then
            if exists (select from pg_attribute a where a.attrelid = "table" and a.attgenerated = 'v') then
                raise exception using errcode = 'feature_not_supported', message = format('the condition does not fit the columns that triggers see: %s', sqlerrm),
                    detail = 'Triggers do not see the values of virtual generated columns.', hint = 'Write the expression of the column instead, or generate it as STORED.';
            end if;
            raise;
        end;
    end if;

    perform outbox.detach_table("table");
    -- A name has at most 63 bytes. To leave as many characters as are appended leaves as many bytes at least.
    select q.name into name from (select left(f.full, length(f.full) - length(s.suffix)) || s.suffix as name, n
            from generate_series(1, 1000) n, (select ('outbox_events_of_' || c.relname)::name::text) f ("full"), lateral (select case when n > 1 then '_' || n else '' end) s (suffix)) q
        where not exists (select from pg_proc p where p.proname = q.name and p.pronamespace = (select k.relnamespace from pg_class k where k.oid = "table"))
        order by q.n limit 1;
    function := format('%I.%I', c.nspname, name);
    perform outbox.write_row_function("table", function, jsonb_strip_nulls(jsonb_build_object('event_type', event_type, 'source', source, 'backend', backend, 'key', key,
        'columns', columns, 'operations', array_to_string(wanted, ','), 'condition', condition, 'payload', payload)), false);
    execute format('revoke all on function %s() from public', function);
    execute format('alter function %s() owner to %I', function, owner);
    -- A statement on a partition fires only the triggers of that partition.
    for family in
        select f.oid::regclass as relation, f.oid = "table" as is_itself from outbox.family_of("table") f (oid) join pg_class k on k.oid = f.oid where k.relkind in ('r', 'p')
    loop
        foreach operation in array wanted loop
            if operation = 'truncate' and not family.is_itself then
                continue;
            end if;
            execute format('create trigger %I after %s on %s %s for each statement execute function %s()', 'outbox_relay_' || operation, operation, family.relation,
                case operation when 'insert' then 'referencing new table as outbox_relay_new' when 'delete' then 'referencing old table as outbox_relay_old'
                    when 'update' then 'referencing old table as outbox_relay_old new table as outbox_relay_new' else '' end, function);
        end loop;
    end loop;
end
$$;
comment on function outbox.attach_table(regclass, text, text, text, text[], text[], text, text, text) is
    'Publishes the rows that statements insert, update and delete in a table as events, in the same transaction: one call of a trigger for a statement, one event for a row, in the order of the rows. The type is event_type (the table''s name) with .insert, .update, .delete or .truncate; the subject is the key (the primary key; several columns as a JSON array). columns: those that are in data, NULL means all. condition: an SQL expression; a name is a column of the new row, or of the deleted one; old.name and new.name tell them apart. Names in it are those of pg_catalog unless they are qualified. payload: new, both ({"old": ..., "new": ...}) or changed (of an UPDATE, what it has changed; nothing if that is nothing). For the table''s owner and for superusers, if the owner is a publisher. Events are published with the owner''s rights, whoever changes the table. Attaching again replaces what was said before. Columns that are named are followed when they are renamed, and cannot be dropped; new partitions and children are published, too.';

create view outbox.attached_tables with (security_barrier) as
select t.tgrelid::regclass as relation,
    pg_catalog.string_agg(pg_catalog.substr(t.tgname::text, 14), ',' order by pg_catalog.strpos('insert,update,delete,truncate', pg_catalog.substr(t.tgname::text, 14))) as operations,
    pg_catalog.pg_get_userbyid(p.proowner) as publisher,
    t.tgfoid::regprocedure as function,
    pg_catalog.bool_and(t.tgenabled in ('O', 'A')) as enabled,
    pg_catalog.obj_description(t.tgfoid, 'pg_proc') as definition
from pg_catalog.pg_trigger t join pg_catalog.pg_proc p on p.oid = t.tgfoid
where not t.tgisinternal and t.tgname operator(pg_catalog.~) '^outbox_relay_(insert|update|delete|truncate)$'
group by t.tgrelid, t.tgfoid, p.proowner;
comment on view outbox.attached_tables is 'Tables whose rows are published, with their partitions and children: see outbox.attach_table().';
