-- What the extension was made with: columns, constraints and unique indexes of its tables, its functions and views.
-- outbox.health() compares with it. These are functions, so that nobody changes them together with the tables. An
-- upgrade script ends with this part, too.

create function outbox.functions_here(out name text, out oid oid, out owner oid, out digest text) returns setof record
    language plpgsql stable set search_path = pg_catalog, pg_temp
    as $$
#variable_conflict use_column
begin
    -- PL/pgSQL, because it caches the plan, which an SQL function does not.
    return query
-- Of what it is set to, only the path matters: the rest may be somebody's tuning.
select p.proname || '(' || oidvectortypes(p.proargtypes) || ')', p.oid, p.proowner,
    md5(concat_ws('|', p.prosrc, p.probin, p.prosecdef,
        (select c from unnest(p.proconfig) c where c like 'search_path=%')))
from pg_proc p where p.pronamespace = 'outbox'::regnamespace and p.proname not in ('made_with', 'definitions');
end
$$;
comment on function outbox.functions_here() is 'Part of outbox.health(): the functions of schema outbox, and a digest of what each one does, without those that hold what the extension was made with.';
select outbox.keep_to_owner('function', 'outbox.functions_here()');

create function outbox.restore_objects() returns bigint
    language plpgsql volatile set search_path = pg_catalog, pg_temp set standard_conforming_strings = on
        set quote_all_identifiers = off set work_mem = '4MB'
    as $$
declare
    made record;
    kind text;
    count bigint := 0;
    extension_owner name := (select pg_get_userbyid(e.extowner) from pg_extension e where e.extname = 'outbox_relay');
begin
    for made in
        select d.* from outbox.definitions() d join outbox.made_with() m on m.kind = d.kind and m.name = d.name
            left join outbox.functions_here() f on d.kind = 'function' and f.name = d.name
        where case d.kind when 'function' then f.digest is distinct from m.value
            else not exists (select from pg_class c
                where c.relnamespace = 'outbox'::regnamespace and c.relname = d.name and c.relkind = 'v') end
        -- That function is called here.
        order by d.name <> 'keep_to_owner(text, text)', d.number
    loop
        execute made.definition;
        kind := made.object_kind || ' outbox.' || made.name;
        if not exists (select from pg_depend d where d.deptype = 'e' and d.refclassid = 'pg_extension'::regclass
                and d.objid = case made.kind when 'function' then to_regprocedure('outbox.' || made.name)::oid
                    else to_regclass('outbox.' || made.name)::oid end) then
            perform outbox.keep_to_owner(made.object_kind, 'outbox.' || made.name);
            execute 'alter extension outbox_relay add ' || kind;
        end if;
        execute format('alter %s owner to %I', kind, extension_owner);
        execute made.rights;
        raise log using message = format('outbox_relay: %s was restored', kind);
        count := count + 1;
    end loop;
    return count;
end
$$;
comment on function outbox.restore_objects() is 'Makes functions and views of this extension anew that were dropped or changed, as outbox.health() says in its check "functions", and returns how many. For superusers. Roles that may publish get their rights again by outbox.grant_publisher().';
select outbox.keep_to_owner('function', 'outbox.restore_objects()');

do $$
declare
    made text;
begin
    select string_agg(
        format('(%L, %L, %L, %s, %L, %L)', w.kind, w.object_kind, w.name, row_number, w.definition, w.rights), ', ')
    into strict made
    from (
        select o.*, row_number() over (order by o.oid) from (
            select 'function' as kind, k.object_kind, f.name, f.oid,
                pg_get_functiondef(f.oid)
                    || format('; comment on %s outbox.%s is %L',
                        k.object_kind, f.name, obj_description(f.oid, 'pg_proc')) as definition,
                coalesce((select string_agg(format('grant execute on %s outbox.%s to %s', k.object_kind, f.name,
                        case a.grantee when 0 then 'public' else a.grantee::regrole::text end), '; ')
                    from aclexplode(coalesce(p.proacl, acldefault('f', p.proowner))) a
                    where a.grantee <> p.proowner), '') as rights
            from outbox.functions_here() f join pg_proc p on p.oid = f.oid
                cross join lateral (
                    select case p.prokind when 'p' then 'procedure' else 'function' end as object_kind
                ) k
            where f.name not in ('restore_objects()', 'functions_here()') and p.prokind in ('f', 'p')
            union all
            select 'view', 'view', c.relname::text, c.oid,
                format('create or replace view outbox.%1$I %2$s as %3$s; comment on view outbox.%1$I is %4$L',
                    c.relname, 'with (' || array_to_string(c.reloptions, ', ') || ')',
                    rtrim(pg_get_viewdef(c.oid), ';'), obj_description(c.oid, 'pg_class')),
                coalesce((select string_agg(format('grant select on outbox.%I to %s', c.relname,
                        case a.grantee when 0 then 'public' else a.grantee::regrole::text end), '; ')
                    from aclexplode(c.relacl) a where a.grantee <> c.relowner and a.privilege_type = 'SELECT'), '')
            from pg_class c where c.relnamespace = 'outbox'::regnamespace and c.relkind = 'v'
        ) o
    ) w;
    execute format($function$
        create or replace function outbox.definitions(out kind text, out object_kind text, out name text,
            out number integer, out definition text, out rights text)
            returns setof record language plpgsql immutable set search_path = pg_catalog, pg_temp
            as %L
        $function$, format('begin return query select v.* from (values %s) v (kind, object_kind, name, number, definition, rights); end',
            made));
end
$$;
comment on function outbox.definitions() is 'Statements that make the functions and views of this extension, for outbox.restore_objects().';
select outbox.keep_to_owner('function', 'outbox.definitions()');

do $$
declare
    made text;
begin
    select string_agg(
        format('(%L, %L, %L, %s, %L, %L, %L)', w.kind, w.relation, w.name, w.number, w.type, w.not_null, w.value), ', '
        order by w.relation, w.kind, w.number, w.name)
    into strict made
    from (
        select 'column' as kind, c.relname as relation, a.attname::text as name, a.attnum as number,
            format_type(a.atttypid, a.atttypmod) as type, a.attnotnull as not_null,
            (select pg_get_expr(d.adbin, d.adrelid) from pg_attrdef d
                where d.adrelid = c.oid and d.adnum = a.attnum) as value
        from pg_class c join pg_attribute a on a.attrelid = c.oid and a.attnum > 0 and not a.attisdropped
        where c.relnamespace = 'outbox'::regnamespace and c.relkind = 'r'
        union all
        select 'constraint', c.relname, k.conname::text, 0, null, null, pg_get_constraintdef(k.oid)
        from pg_class c join pg_constraint k on k.conrelid = c.oid and k.contype in ('c', 'f')
        where c.relnamespace = 'outbox'::regnamespace
        union all
        -- By what they are on: indexes are made anew under other names.
        select 'unique', c.relname, x.relname::text, 0, null, null, i.indkey::text
        from pg_class c join pg_index i on i.indrelid = c.oid and i.indisunique and not i.indisprimary
            join pg_class x on x.oid = i.indexrelid
        where c.relnamespace = 'outbox'::regnamespace and c.relkind = 'r'
        union all
        select 'function', '', f.name, 0, null, null, f.digest from outbox.functions_here() f
        union all
        select 'view', '', c.relname::text, 0, null, null, null from pg_class c
            where c.relnamespace = 'outbox'::regnamespace and c.relkind = 'v'
    ) w;
    execute format($function$
        create or replace function outbox.made_with(out kind text, out relation text, out name text, out number integer,
            out type text, out not_null boolean, out value text)
            returns setof record language plpgsql immutable set search_path = pg_catalog, pg_temp
            as %L
        $function$, format('begin return query select v.kind, v.relation, v.name, v.number, v.type, v.not_null::boolean, v.value
    from (values %s) v (kind, relation, name, number, type, not_null, value); end', made));
end
$$;
comment on function outbox.made_with() is 'The columns, constraints and unique indexes that the tables of this extension were made with, its functions and its views.';
select outbox.keep_to_owner('function', 'outbox.made_with()');
