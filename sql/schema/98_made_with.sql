-- What the tables were made with: their columns, constraints and unique indexes. outbox.health() compares with it. A function, so that nobody
-- changes it beside the tables; an upgrade script that changes tables ends with this block, too.

do $$
declare
    made text;
begin
    select string_agg(format('(%L, %L, %L, %s, %L, %L, %L)', w.kind, w.relation, w.name, w.number, w.type, w.not_null, w.value), ', '
            order by w.relation, w.kind, w.number, w.name)
    into strict made
    from (
        select 'column' as kind, c.relname as relation, a.attname as name, a.attnum as number, format_type(a.atttypid, a.atttypmod) as type,
            a.attnotnull as not_null, (select pg_get_expr(d.adbin, d.adrelid) from pg_attrdef d where d.adrelid = c.oid and d.adnum = a.attnum) as value
        from pg_class c join pg_attribute a on a.attrelid = c.oid and a.attnum > 0 and not a.attisdropped
        where c.relnamespace = 'outbox'::regnamespace and c.relkind = 'r'
        union all
        select 'constraint', c.relname, k.conname, 0, null, null, pg_get_constraintdef(k.oid)
        from pg_class c join pg_constraint k on k.conrelid = c.oid and k.contype in ('c', 'f')
        where c.relnamespace = 'outbox'::regnamespace
        union all
        -- By what they are on: indexes are made anew under other names.
        select 'unique', c.relname, x.relname, 0, null, null, i.indkey::text
        from pg_class c join pg_index i on i.indrelid = c.oid and i.indisunique and not i.indisprimary join pg_class x on x.oid = i.indexrelid
        where c.relnamespace = 'outbox'::regnamespace and c.relkind = 'r'
    ) w;
    execute format($function$
        create or replace function outbox.made_with(out kind text, out relation text, out name text, out number integer, out type text, out not_null boolean, out value text)
            returns setof record language plpgsql immutable set search_path = pg_catalog, pg_temp
            as %L
        $function$, format('begin return query select v.kind, v.relation, v.name, v.number, v.type, v.not_null::boolean, v.value
    from (values %s) v (kind, relation, name, number, type, not_null, value); end', made));
end
$$;
comment on function outbox.made_with() is 'The columns, constraints and unique indexes that the tables of this extension were made with.';
revoke all on function outbox.made_with() from public;
