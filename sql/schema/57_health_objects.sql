-- Part of outbox.health(): whether all that belongs to the extension is there, and as it was made.

create function outbox.missing_table_cure(name text) returns text
    language sql stable set search_path = pg_catalog, pg_temp
    as $$
-- What belongs to the extension, and is not where it should be or has a name that it should not have.
with
lost as (
    select c.oid, n.nspname, c.relname, c.relkind
    from pg_depend d join pg_extension e on e.oid = d.refobjid and e.extname = 'outbox_relay'
        join pg_class c on c.oid = d.objid and c.relkind in ('r', 'S') join pg_namespace n on n.oid = c.relnamespace
    where d.classid = 'pg_class'::regclass and d.refclassid = 'pg_extension'::regclass and d.deptype = 'e'
)
select coalesce(
    (select case
            -- A sequence moves with its table.
            when exists (select from pg_depend o
                where o.classid = 'pg_class'::regclass and o.objid = l.oid
                    and o.refclassid = 'pg_class'::regclass and o.deptype in ('a', 'i'))
                then ''
            else format('Run ALTER TABLE %I.%I SET SCHEMA outbox;', l.nspname, l.relname) end
        from lost l where l.relname = missing_table_cure.name and l.nspname <> 'outbox'),
    (select format('Run ALTER %s outbox.%I RENAME TO %I;',
            case l.relkind when 'S' then 'SEQUENCE' else 'TABLE' end, l.relname, missing_table_cure.name)
        from lost l
        where l.nspname = 'outbox' and case l.relkind
            when 'S' then missing_table_cure.name = 'events_seq_seq' and exists (select from pg_depend o
                where o.classid = 'pg_class'::regclass and o.objid = l.oid and o.deptype = 'a'
                    and o.refobjid = to_regclass('outbox.events'))
            else not exists (select from outbox.made_with() m where m.relation = l.relname)
                and (select array_agg(a.attname::text) from pg_attribute a
                    where a.attrelid = l.oid and a.attnum > 0 and not a.attisdropped)
                    @> (select array_agg(m.name) from outbox.made_with() m
                        where m.relation = missing_table_cure.name and m.kind = 'column') end
        limit 1),
    'It was dropped: restore it, or drop the extension and create it anew.')
$$;
comment on function outbox.missing_table_cure(text) is 'Part of outbox.health(): what brings a table back that is not there under its name.';

-- Before all others, which need functions of the extension.
create function outbox.function_health(out "check" text, out status text, out detail text, out hint text)
    returns setof record
    language plpgsql volatile set search_path = pg_catalog, pg_temp
    as $$
#variable_conflict use_column
begin
    return query
with
made as materialized (select m.kind, m.name, m.value from outbox.made_with() m where m.kind in ('function', 'view')),
here as materialized (select h.* from outbox.functions_here() h),
faults(what, fault, cure) as (
    select 'functions',
        format('outbox.%s %s.', m.name, case when f.oid is null then 'is missing' else 'was changed' end),
        'Run SELECT outbox.restore_objects();'
    from made m left join here f on f.name = m.name
    where m.kind = 'function' and f.digest is distinct from m.value
    union all
    select 'functions', format('The view outbox.%s is missing.', m.name), 'Run SELECT outbox.restore_objects();'
    from made m
    where m.kind = 'view'
        and not exists (select from pg_class c
            where c.relnamespace = 'outbox'::regnamespace and c.relname = m.name and c.relkind = 'v')
    union all
    select 'functions',
        format('outbox.%s belongs to %I, and the extension to %I.', f.name, pg_get_userbyid(f.owner),
            pg_get_userbyid(e.extowner)),
        format('Run ALTER ROUTINE outbox.%s OWNER TO %I;', f.name, pg_get_userbyid(e.extowner))
    from made m join here f on f.name = m.name
        join pg_extension e on e.extname = 'outbox_relay' and e.extowner <> f.owner
    where m.kind = 'function'
),
-- Not hundreds of them.
first_ones as (select f.* from faults f order by f.fault limit 5)
select 'functions', case when exists (select from faults) then 'fail' else 'ok' end,
    coalesce((select string_agg(f.fault, ' ' order by f.fault) from first_ones f)
            || coalesce((select format(' %s more.', count(*) - 5) from faults having count(*) > 5), ''),
        'All functions and views are as they were made.'),
    (select regexp_replace(string_agg(distinct f.cure, ' '), '; Run ', '; ', 'g') from first_ones f);
end
$$;
comment on function outbox.function_health() is 'Part of outbox.health(): whether functions and views of the extension are there, as they were made.';

create function outbox.object_health(out "check" text, out status text, out detail text, out hint text)
    returns setof record
    language plpgsql volatile set search_path = pg_catalog, pg_temp
    as $$
#variable_conflict use_column
begin
    return query
with
ours(name) as (values
    ('events'), ('backends'), ('backend_passwords'), ('moved_backends'), ('routes'), ('publisher_limits'),
    ('scheduled_events'), ('refused_events'), ('failed_events'), ('cursors'), ('former_lanes'), ('ticks'),
    ('installation'), ('incarnations'), ('take_overs'), ('copied_backends'), ('restores'), ('replays'), ('known_triggers'),
    ('held_events'), ('held_scheduled'), ('held_cursors'), ('held_refused'), ('kept_rows'), ('inbox'),
    ('consumer_grants'), ('consumer_groups'), ('events_seq_seq')),
there as (
    select o.name, c.oid, c.relkind, c.relowner, c.relpersistence, c.relrowsecurity, c.relhasrules, c.relreplident,
        c.reltoastrelid
    from ours o left join pg_class c on c.relname = o.name and c.relnamespace = 'outbox'::regnamespace
        and c.relkind in ('r', 'p', 'S')
),
extension as (select e.extowner from pg_extension e where e.extname = 'outbox_relay'),
-- Columns and constraints as they were made.
made as materialized (select m.*, t.oid from outbox.made_with() m
    join there t on t.name = m.relation and t.oid is not null),
faults(what, fault, cure) as (
    select 'tables', format('outbox.%s is missing.', t.name), outbox.missing_table_cure(t.name)
    from there t where t.oid is null
    union all
    -- Somebody has put another one in its place, or has taken it out of the extension.
    select 'tables',
        format('outbox.%s is not the table that this extension made: the views may show another one.', t.name),
        case when m.cure like 'Run ALTER TABLE %'
            then format('Run ALTER TABLE outbox.%I RENAME TO %I; ', t.name, t.name || '_instead') || substr(m.cure, 5)
            else format('Run ALTER EXTENSION outbox_relay ADD TABLE outbox.%I;', t.name) end
    from there t cross join lateral (select outbox.missing_table_cure(t.name) as cure) m
    where t.relkind in ('r', 'p')
        and not exists (select from pg_depend d where d.classid = 'pg_class'::regclass and d.objid = t.oid
        and d.refclassid = 'pg_extension'::regclass and d.deptype = 'e')
    union all
    select 'tables', format('outbox.%s is unlogged: a crash of the server would empty it.', t.name),
        format('Run ALTER TABLE outbox.%s SET LOGGED;', t.name)
    from there t where t.relkind = 'r' and t.relpersistence = 'u'
    union all
    select 'tables',
        format('outbox.%s has the rule "%s": what it does to rows, the relay does not know.', t.name, r.rulename),
        format('Run DROP RULE %I ON outbox.%s;', r.rulename, t.name)
    from there t join pg_rewrite r on r.ev_class = t.oid where t.relhasrules
    union all
    select 'tables',
        format('outbox.%s has row security, so that others than its owner cannot use it as they should.', t.name),
        format('Run ALTER TABLE outbox.%s DISABLE ROW LEVEL SECURITY;', t.name)
    from there t where t.relrowsecurity and t.name not in ('backend_passwords', 'moved_backends')
    union all
    select 'tables',
        format('outbox.%s has no row security any more, so that roles which may read all tables see secrets.', t.name),
        format('Run ALTER TABLE outbox.%s ENABLE ROW LEVEL SECURITY;', t.name)
    from there t where not t.relrowsecurity and t.name in ('backend_passwords', 'moved_backends')
    union all
    select 'tables',
        format('outbox.%s has the policy "%s", which shows rows that nobody should see.', t.name, p.polname),
        format('Run DROP POLICY %I ON outbox.%s;', p.polname, t.name)
    from there t join pg_policy p on p.polrelid = t.oid where t.name in ('backend_passwords', 'moved_backends')
    union all
    select 'columns', case
            when a.attnum is null or a.attisdropped then format('outbox.%s has no column %s.', m.relation, m.name)
            when a.type <> m.type
                then format('Column %s of outbox.%s has type %s instead of %s.', m.name, m.relation, a.type, m.type)
            when m.not_null and not a.attnotnull then format('Column %s of outbox.%s may be NULL.', m.name, m.relation)
            else format('Column %s of outbox.%s has %s instead of %s.', m.name, m.relation,
                coalesce('the default ' || a.value, 'no default'),
                coalesce('the default ' || m.value, 'none')) end,
        case
            when n.attname is not null
                then format('Run ALTER TABLE outbox.%s RENAME COLUMN %I TO %I;', m.relation, n.attname, m.name)
            -- Their columns are known by their places.
            when a.attnum is null and m.relation in ('events', 'scheduled_events') then
                format('Its columns are known by their places: restore outbox.%s, or drop the extension and create it anew.',
                    m.relation)
            when a.attnum is null
                then format('Run ALTER TABLE outbox.%s ADD COLUMN %I %s%s;', m.relation, m.name, m.type,
                    coalesce(' DEFAULT ' || m.value, ''))
            when a.type <> m.type
                then format('Run ALTER TABLE outbox.%s ALTER COLUMN %I TYPE %s USING %I::%s;', m.relation, m.name,
                    m.type, m.name, m.type)
            when m.not_null and not a.attnotnull
                then format('Run ALTER TABLE outbox.%s ALTER COLUMN %I SET NOT NULL;', m.relation, m.name)
            when m.value is null
                then format('Run ALTER TABLE outbox.%s ALTER COLUMN %I DROP DEFAULT;', m.relation, m.name)
            else format('Run ALTER TABLE outbox.%s ALTER COLUMN %I SET DEFAULT %s;', m.relation, m.name, m.value) end
    from made m
        left join lateral (
            select a.attnum, a.attisdropped, a.attnotnull, format_type(a.atttypid, a.atttypmod) as type,
                case when a.atthasdef
                    then (select pg_get_expr(d.adbin, d.adrelid) from pg_attrdef d
                        where d.adrelid = a.attrelid and d.adnum = a.attnum) end as value
            from pg_attribute a where a.attrelid = m.oid and a.attname = m.name and not a.attisdropped
        ) a on true
        -- Somebody has given it another name.
        left join lateral (
            select n.attname from pg_attribute n
                where a.attnum is null and n.attrelid = m.oid and n.attnum = m.number and not n.attisdropped
        ) n on true
    where m.kind = 'column'
        and (a.attnum is null or a.type <> m.type or m.not_null and not a.attnotnull
            or a.value is distinct from m.value)
    union all
    select 'columns',
        format('Column %s of outbox.%s is not of this extension, and must be given by whoever inserts a row.',
            a.attname, t.name),
        format('Run ALTER TABLE outbox.%s ALTER COLUMN %I DROP NOT NULL;', t.name, a.attname)
    from there t join pg_attribute a on a.attrelid = t.oid and a.attnum > 0 and not a.attisdropped and a.attnotnull
        and not a.atthasdef and a.attidentity = ''
    -- By hash: the planner expects few columns, and would compare each one with all others.
    where t.relkind = 'r' and (t.oid, a.attname::text) not in (select m.oid, m.name from made m where m.kind = 'column')
        -- Renamed: its cure is above.
        and (t.oid, a.attnum::integer) not in (select m.oid, m.number from made m where m.kind = 'column')
    union all
    select 'constraints', format('outbox.%s has no constraint "%s".', m.relation, m.name),
        format('Run ALTER TABLE outbox.%s ADD CONSTRAINT %I %s;', m.relation, m.name, m.value)
    from made m
    where m.kind = 'constraint'
        and not exists (select from pg_constraint c
            where c.conrelid = m.oid and c.conname = m.name and c.contype in ('c', 'f'))
    union all
    select 'constraints',
        format('outbox.%s has the constraint "%s", which is not of this extension: rows that it refuses are not published.',
            t.name, c.conname),
        format('If it is not meant, run ALTER TABLE outbox.%s DROP CONSTRAINT %I;', t.name, c.conname)
    from there t join pg_constraint c on c.conrelid = t.oid and c.contype in ('c', 'f', 'x')
    where not exists (select from made m where m.oid = t.oid and m.kind = 'constraint' and m.name = c.conname)
    union all
    select 'constraints',
        format('%s is a unique index that is not of this extension: rows that it refuses are not published.',
            i.indexrelid::regclass),
        format('If it is not meant, run %s;', coalesce(
            (select format('ALTER TABLE outbox.%s DROP CONSTRAINT %I', t.name, c.conname) from pg_constraint c
                where c.conindid = i.indexrelid and c.contype = 'u'),
            format('DROP INDEX %s', i.indexrelid::regclass)))
    from there t join pg_index i on i.indrelid = t.oid and i.indisunique and not i.indisprimary
    where t.name in ('events', 'scheduled_events', 'failed_events', 'cursors')
        and not exists (select from made m where m.oid = t.oid and m.kind = 'unique' and m.value = i.indkey::text)
    union all
    -- The worker and our functions delete rows without its triggers.
    select distinct 'constraints',
        format('%s has the foreign key "%s" on outbox.%s, which is not heeded when rows of that table are deleted.',
            c.conrelid::regclass, c.conname, t.name),
        format('Run ALTER TABLE %s DROP CONSTRAINT %I;', c.conrelid::regclass, c.conname)
    from there t join pg_depend d on d.refclassid = 'pg_class'::regclass and d.refobjid = t.oid
            and d.classid = 'pg_constraint'::regclass
        join pg_constraint c on c.oid = d.objid and c.contype = 'f' and c.confrelid = t.oid and c.conparentid = 0
    where c.conrelid not in (select o.oid from there o where o.oid is not null)
    union all
    select 'indexes', format('%s is not valid.', i.indexrelid::regclass),
        -- REINDEX CONCURRENTLY leaves such an index when it is interrupted.
        format(case when x.relname ~ '_cc(new|old)[0-9]*$' then 'Run DROP INDEX CONCURRENTLY %s;'
            else 'Run REINDEX INDEX CONCURRENTLY %s;' end, i.indexrelid::regclass)
    from there t cross join lateral (values (t.oid), (t.reltoastrelid)) r (oid)
        join pg_index i on i.indrelid = r.oid join pg_class x on x.oid = i.indexrelid
        where not i.indisvalid or not i.indisready
    union all
    select 'indexes', format('outbox.events has no index on (%s).', w.columns), w.cure
    from there t cross join (values
            ('seq', 'Run ALTER TABLE outbox.events ADD PRIMARY KEY (seq) INCLUDE (backend_number);'),
            ('xid, seq',
                'Run CREATE INDEX CONCURRENTLY events_xid_idx ON outbox.events (xid, seq) INCLUDE (backend_number);'),
            ('event_id, branch',
                'Run CREATE UNIQUE INDEX CONCURRENTLY events_event_id_idx ON outbox.events (event_id, branch);'),
            ('created_at', 'Run CREATE INDEX CONCURRENTLY events_created_at_idx ON outbox.events (created_at);')
        ) w (columns, cure)
    where t.name = 'events' and t.oid is not null and not exists (
        select from pg_index i where i.indrelid = t.oid and i.indpred is null and i.indisvalid and w.columns = (
            select string_agg(a.attname::text, ', ' order by k.n)
            from unnest(i.indkey::smallint[]) with ordinality k (attnum, n)
                join pg_attribute a on a.attrelid = t.oid and a.attnum = k.attnum
            where k.n <= i.indnkeyatts))
    union all
    -- Of other tables, what writing needs, and what keeps looking cheap.
    select 'indexes', format('outbox.%s has no %s (%s).', w.relation, w.kind, w.columns),
        case w.kind when 'INDEX ON'
            then format('Run CREATE INDEX CONCURRENTLY ON outbox.%s (%s);', w.relation, w.columns)
            else format('Run ALTER TABLE outbox.%s ADD %s (%s);', w.relation, w.kind, w.columns) end
    from (values
            ('backends', 'PRIMARY KEY', 'name'), ('backends', 'UNIQUE', 'number'),
            ('backend_passwords', 'PRIMARY KEY', 'backend_number'),
            ('cursors', 'PRIMARY KEY', 'backend_number, slot'),
            ('former_lanes', 'PRIMARY KEY', 'backend_number, slot'), ('ticks', 'PRIMARY KEY', 'backend_number, reached_at'),
            ('failed_events', 'PRIMARY KEY', 'event_id, seq'), ('failed_events', 'INDEX ON', 'failed_at'),
            ('failed_events', 'INDEX ON', 'seq, event_id'), ('refused_events', 'PRIMARY KEY', 'seq'),
            ('scheduled_events', 'PRIMARY KEY', 'event_id, branch'),
            ('scheduled_events', 'INDEX ON', 'scheduled_at, seq'), ('inbox', 'PRIMARY KEY', 'consumer, event_id'),
            ('inbox', 'INDEX ON', 'consumed_at'), ('take_overs', 'PRIMARY KEY', 'backend_number'),
            ('publisher_limits', 'PRIMARY KEY', 'role'), ('installation', 'PRIMARY KEY', 'id')
        ) w (relation, kind, columns)
        join there t on t.name = w.relation and t.oid is not null
    where not exists (
        select from pg_index i
            where i.indrelid = t.oid and i.indpred is null and i.indisvalid and (i.indisunique or w.kind = 'INDEX ON')
            and w.columns = (
            select string_agg(a.attname::text, ', ' order by k.n)
            from unnest(i.indkey::smallint[]) with ordinality k (attnum, n)
                join pg_attribute a on a.attrelid = t.oid and a.attnum = k.attnum
            where k.n <= i.indnkeyatts))
    union all
    select 'sequence', 'outbox.events_seq_seq has other parameters than it needs.',
        'Run ALTER SEQUENCE outbox.events_seq_seq AS bigint INCREMENT 1 NO MAXVALUE CACHE 1 NO CYCLE;'
    from pg_sequence s join there t on t.oid = s.seqrelid
    where s.seqtypid <> 'bigint'::regtype or s.seqincrement <> 1 or s.seqcache <> 1 or s.seqcycle
        or s.seqmax <> 9223372036854775807
    union all
    select 'owner', format('The owner of the extension, %I, is no superuser.', pg_get_userbyid(e.extowner)),
        format('Run ALTER ROLE %I SUPERUSER;', pg_get_userbyid(e.extowner))
    from pg_extension e join pg_roles r on r.oid = e.extowner where e.extname = 'outbox_relay' and not r.rolsuper
    union all
    select 'owner',
        format('outbox.%s belongs to %I, and the extension to %I.', t.name, pg_get_userbyid(t.relowner),
            pg_get_userbyid(e.extowner)),
        format('Run ALTER TABLE outbox.%s OWNER TO %I;', t.name, pg_get_userbyid(e.extowner))
    from there t join extension e on e.extowner <> t.relowner where t.relkind = 'r'
    union all
    select 'triggers', format('The trigger "%s" of outbox.%s is %s.', b.name, b.relation, b.found),
        'The worker mends it. If it cannot, the server''s log says why.'
    from outbox.broken_triggers() b
    union all
    select 'foreign triggers',
        format('outbox.%s has the trigger "%s", which is not of this extension.', t.name, g.tgname),
        format('If it is not meant, run DROP TRIGGER %I ON outbox.%s;', g.tgname, t.name)
    from there t join pg_trigger g on g.tgrelid = t.oid
    where not g.tgisinternal
        and not exists (select from outbox.our_triggers() o where o.relation = t.name and o.name = g.tgname)
    union all
    select 'publications',
        format('The publication "%s" has outbox.%s, which must not leave this server.', p.pubname, t.name),
        format('Run ALTER PUBLICATION %I DROP TABLE outbox.%s;', p.pubname, t.name)
    from there t join pg_publication_rel r on r.prrelid = t.oid join pg_publication p on p.oid = r.prpubid
    where t.name not in ('events', 'scheduled_events', 'failed_events', 'refused_events', 'cursors', 'inbox',
        'consumer_grants')
    union all
    select 'publications',
        format('The publication "%s" has all tables of schema outbox, of which some must not leave this server.',
            p.pubname),
        format('Run ALTER PUBLICATION %I DROP TABLES IN SCHEMA outbox;', p.pubname)
    from pg_publication_namespace n join pg_publication p on p.oid = n.pnpubid where n.pnnspid = 'outbox'::regnamespace
    union all
    select 'publications',
        format('The publication "%s" has all tables, also those of schema outbox that must not leave this server.',
            p.pubname),
        format('If nobody needs it, run DROP PUBLICATION %I; otherwise make it anew for the tables that are to be published.',
            p.pubname)
    from pg_publication p where p.puballtables
    union all
    select 'publications',
        format('outbox.%s has REPLICA IDENTITY NOTHING, so that its rows cannot be changed or deleted while a publication has it.',
            t.name),
        format('Run ALTER TABLE outbox.%s REPLICA IDENTITY %s;', t.name,
            case when exists (select from pg_index i where i.indrelid = t.oid and i.indisprimary) then 'DEFAULT'
                else 'FULL' end)
    from there t
    where t.relkind = 'r' and t.relreplident = 'n'
        and exists (select from pg_publication p where (p.pubupdate or p.pubdelete) and (p.puballtables
        or exists (select from pg_publication_rel r where r.prpubid = p.oid and r.prrelid = t.oid)
        or exists (select from pg_publication_namespace n
            where n.pnpubid = p.oid and n.pnnspid = 'outbox'::regnamespace)))
    union all
    -- An attached table's partitions and children: statements on them fire their own triggers alone. One that is
    -- attached by itself, or as another parent's child, publishes as that one.
    select distinct 'attached tables',
        format('%s is attached, and its partition or child %s is not.', a.tgrelid::regclass, i.inhrelid::regclass),
        format('Run SELECT outbox.attach_table(%L, ...); again, as the comment of %s says.', a.tgrelid::regclass,
            a.tgfoid::regprocedure)
    from pg_trigger a join pg_inherits i on i.inhparent = a.tgrelid
        join pg_class k on k.oid = i.inhrelid and k.relkind in ('r', 'p')
    where not a.tgisinternal and a.tgname ~ '^outbox_relay_(insert|update|delete)$'
        and not exists (select from pg_trigger o
            where o.tgrelid = i.inhrelid and case o.tgfoid when a.tgfoid then o.tgname = a.tgname
                else starts_with(obj_description(o.tgfoid, 'pg_proc'),
                    'Publishes rows as events, see outbox.attach_table(): {') end)
    union all
    select 'attached tables',
        format('The trigger "%s" of %s does not fire for each statement.', a.tgname, a.tgrelid::regclass),
        format('Run ALTER TABLE %s ENABLE TRIGGER %I;', a.tgrelid::regclass, a.tgname)
    from pg_trigger a join pg_class k on k.oid = a.tgrelid
    where not a.tgisinternal and a.tgname ~ '^outbox_relay_(insert|update|delete|truncate)$' and k.relpersistence <> 't'
        and a.tgenabled in ('D', 'R')
    union all
    select distinct 'attached tables',
        format('%s publishes as "%s", which may not publish.', a.tgrelid::regclass, pg_get_userbyid(p.proowner)),
        format('If it is meant to, run SELECT outbox.grant_publisher(%L);', pg_get_userbyid(p.proowner))
    from pg_trigger a join pg_proc p on p.oid = a.tgfoid join pg_class k on k.oid = a.tgrelid
    where not a.tgisinternal and a.tgname ~ '^outbox_relay_(insert|update|delete|truncate)$'
        -- Anybody may give a trigger of its own such a name, on a temporary table too, which cannot be attached.
        and k.relpersistence <> 't' and not has_column_privilege(p.proowner, 'outbox.events', 'event_type', 'insert')
    union all
    -- Its owner has changed since. Members of the former one have its rights. Of a partition, the owner of the whole
    -- counts.
    select distinct 'attached tables',
        format('%s belongs to "%s", and publishes as "%s".', k.oid::regclass, pg_get_userbyid(k.relowner),
            pg_get_userbyid(p.proowner)),
        format('Run SELECT outbox.attach_table(%L, ...); again, as the comment of %s says.', k.oid::regclass,
            a.tgfoid::regprocedure)
    from pg_trigger a join pg_proc p on p.oid = a.tgfoid
        join pg_class k on k.oid = coalesce(pg_partition_root(a.tgrelid), a.tgrelid)
    where not a.tgisinternal and a.tgname ~ '^outbox_relay_(insert|update|delete|truncate)$' and k.relpersistence <> 't'
        and not pg_has_role(k.relowner, p.proowner, 'usage')
    union all
    -- Definitions are only searched, not parsed: the owner of a function may write any comment.
    select distinct 'attached tables',
        format('%s is attached for a backend that does not exist: statements on it fail.', k.oid::regclass),
        format('Run SELECT outbox.attach_table(%L, ...); again, with a backend of outbox.backends.', k.oid::regclass)
    from pg_trigger a join pg_class k on k.oid = a.tgrelid
        cross join lateral (select obj_description(a.tgfoid, 'pg_proc') as text) definition
    where not a.tgisinternal and a.tgname ~ '^outbox_relay_(insert|update|delete|truncate)$' and k.relpersistence <> 't'
        and not k.relispartition
        and strpos(definition.text, '"backend": "') > 0 and strpos(definition.text, '"backend": ""') = 0
        and not exists (select from outbox.backends b
            where strpos(definition.text, format('"backend": %s', to_jsonb(b.name))) > 0)
    union all
    -- The arguments of a trigger are separated by zero bytes.
    select 'attached tables',
        format('The bridge of %s names a backend that does not exist: INSERTs into it fail.', a.tgrelid::regclass),
        format('Run SELECT outbox.end_bridge(%1$L); and outbox.bridge_debezium(%1$L, ...); with a backend of outbox.backends.',
            a.tgrelid::regclass)
    from pg_trigger a join pg_proc p on p.oid = a.tgfoid and p.pronamespace = 'outbox'::regnamespace
        cross join (select '\000backend\000='::bytea as named, '\000'::bytea as ends) word
    where not a.tgisinternal and p.proname = 'publish_row'
        and position(word.named in a.tgargs) > 0
        and not exists (select from outbox.backends b where position(
            word.named || convert_to(b.name, getdatabaseencoding()) || word.ends in a.tgargs) > 0)
    union all
    -- Its rows are read one table at a time.
    select 'inheritance', format('%s inherits from %s.', i.inhrelid::regclass, i.inhparent::regclass),
        case k.relkind when 'p'
            then format('Run ALTER TABLE %s DETACH PARTITION %s;', i.inhparent::regclass, i.inhrelid::regclass)
            else format('Run ALTER TABLE %s NO INHERIT %s;', i.inhrelid::regclass, i.inhparent::regclass) end
    from pg_inherits i join pg_class k on k.oid = i.inhparent
    where k.relkind in ('r', 'p')
        and exists (select from there t where t.relkind in ('r', 'p') and t.oid in (i.inhrelid, i.inhparent))
)
select c.name, case when f.what is null then 'ok' else c.severity end, coalesce(f.faults, c.well), f.cure
from (values
        ('tables', 'fail', 'All tables are there.'), ('columns', 'fail', 'All columns are as they were made.'),
        ('constraints', 'warn', 'All constraints are there, and no others.'),
        ('indexes', 'fail', 'All indexes are there and valid.'),
        ('sequence', 'fail', 'The sequence numbers events as it should.'),
        ('owner', 'fail', 'All belongs to one superuser.'),
        ('triggers', 'warn', 'All triggers of the extension are enabled.'),
        ('foreign triggers', 'warn', 'Nobody else has a trigger on the tables.'),
        ('attached tables', 'warn', 'All that is to publish rows does.'),
        ('publications', 'warn', 'No publication has what must not leave this server.'),
        ('inheritance', 'fail', 'No table is inherited.')
    ) c (name, severity, well)
    left join (
        select f.what, string_agg(f.fault, ' ' order by f.fault) as faults,
            -- As one command.
            regexp_replace(string_agg(distinct nullif(f.cure, ''), ' ' order by nullif(f.cure, '')),
                '; (Run|If it is (not meant|meant to), run) ', '; ', 'g') as cure
        from faults f group by f.what
    ) f on f.what = c.name;
end
$$;
comment on function outbox.object_health() is 'Part of outbox.health(): whether all that belongs to the extension is there, as it must be.';

