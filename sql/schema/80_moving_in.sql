-- Moving in from another outbox: its waiting rows are imported, and rows that applications continue to insert there
-- become events through a bridge. See docs/moving.md.

create function outbox.refusal(event_type text, source text, data jsonb, subject text, backend text, scheduled_at timestamptz, max_retries integer,
        publisher_config jsonb, stream text, data_schema text, event_id uuid) returns text
    language c volatile
    as 'MODULE_PATHNAME', 'refusal';
comment on function outbox.refusal(text, text, jsonb, text, text, timestamptz, integer, jsonb, text, text, uuid) is 'Why outbox.publish_event would refuse an event, or NULL if it would not. It does not check for a repeated id.';

create function outbox.expect_outbox_table(source regclass, columns text[]) returns void
    language plpgsql stable set search_path = pg_catalog, pg_temp
    as $$
declare
    missing text;
begin
    if source is null then
        raise exception using errcode = 'null_value_not_allowed', message = 'source must not be null',
            detail = 'It is the table from which events are moved.', hint = 'Pass its name, such as ''outbox_events''.';
    end if;
    if not (select r.rolsuper from pg_roles r where r.rolname = current_user) then
        raise exception using errcode = 'insufficient_privilege', message = 'only a superuser may move events in',
            detail = 'Its rows become events with any id, for any backend.', hint = 'Ask the administrator to do it.';
    end if;
    if not exists (select from pg_class c where c.oid = source and c.relkind in ('r', 'p')) then
        raise exception using errcode = 'wrong_object_type', message = format('%s is not a table', source),
            hint = 'Pass the table that the applications insert into.';
    end if;
    select string_agg(c.name, ', ' order by c.place) into missing
    from unnest(columns) with ordinality c (name, place)
    where not exists (select from pg_attribute a where a.attrelid = source and a.attname = c.name and a.attnum > 0 and not a.attisdropped);
    if missing is not null then
        raise exception using errcode = 'undefined_column', message = format('%s is not an outbox of the expected kind', source),
            detail = format('It lacks these columns: %s.', missing), hint = 'Check the name of the table. docs/moving.md says which columns are read.';
    end if;
end
$$;
comment on function outbox.expect_outbox_table(regclass, text[]) is 'Raises an ERROR unless the caller may move events in and this is a table with these columns.';

create function outbox.has_event(event_id uuid) returns boolean
    language sql stable set search_path = pg_catalog, pg_temp
    -- By the indexes, whatever the planner knows: it is asked for each row.
    set enable_seqscan = off set jit = off
    as $$
select exists (select from outbox.events e where e.event_id = has_event.event_id)
    or exists (select from outbox.scheduled_events s where s.event_id = has_event.event_id)
    or exists (select from outbox.failed_events f where f.event_id = has_event.event_id)
$$;
comment on function outbox.has_event(uuid) is 'Whether an event with this id exists: retained, scheduled or failed.';

----------------------------------------------------------------------------------------------------------------------
-- django-broadcaster
----------------------------------------------------------------------------------------------------------------------

-- A moved row is in a state in which the old worker leaves it alone, even if it has fetched the row already: before
-- sending, that worker checks again only for 'processing'.
create function outbox.import_django_broadcaster(source regclass, dry_run boolean default true, ambiguous text default 'leave',
        out event_id uuid, out event_type text, out backend text, out created_at timestamptz, out scheduled_at timestamptz, out attempts integer,
        out status text, out becomes text, out why text) returns setof record
    language plpgsql volatile set search_path = pg_catalog, pg_temp
    as $$
declare
    rows_found constant text := format($sql$
        select o.id, o.event_type::text, coalesce(nullif(o.publisher_backend, ''), current_setting('outbox_relay.default_backend', true), 'default') as backend,
            o.created_at, o.scheduled_at, o.retry_count::integer as attempts, o.status::text, o.last_error, o.max_retries, b.number as backend_number, j.*
        from %1$s o
            left join outbox.backends b
                on b.name = coalesce(nullif(o.publisher_backend, ''), current_setting('outbox_relay.default_backend', true), 'default')
            -- Only for rows that may be moved.
            cross join lateral (select case when o.status in ('pending', 'retry', 'processing', 'failed') then
                    case when o.spec_version <> '1.0' or o.data_content_type <> 'application/json'
                        then format('Entries say specversion 1.0 and datacontenttype application/json. This one has %%s and %%s.', o.spec_version, o.data_content_type)
                        else outbox.refusal(o.event_type, o.source, o.data, o.subject, o.publisher_backend,
                            case when o.status = 'pending' then o.scheduled_at end, null,
                            nullif(o.publisher_config, '[]'), null, o.data_schema, null) end
                    end as refused,
                case when o.status in ('pending', 'retry', 'processing', 'failed') then outbox.has_event(o.id) end as is_here) r
            cross join lateral (select
                case
                    when o.last_error like 'moved to outbox_relay at %%' then 'moved'
                    when o.status = 'published' then 'published'
                    when o.status not in ('pending', 'retry', 'processing', 'failed') then 'refused'
                    when r.is_here then 'moved'
                    when r.refused is not null then 'refused'
                    when o.status = 'failed' then 'failed'
                    when o.status <> 'processing' and o.scheduled_at > greatest(o.created_at, now()) and o.status = 'pending' then 'scheduled'
                    when o.status <> 'processing' or $1 = 'send' then 'pending'
                    when $1 = 'look' and b.delivery = 'exactly_once' then 'pending'
                    else 'ambiguous' end as becomes,
                case
                    when o.last_error like 'moved to outbox_relay at %%' then o.last_error || '.'
                    when o.status = 'published' then 'The old worker has sent it.'
                    when o.status not in ('pending', 'retry', 'processing', 'failed') then format('django-broadcaster has no status %%L.', o.status)
                    when r.is_here then 'An event with this id already exists.'
                    when r.refused is not null then r.refused
                    when o.status = 'failed' then format('It failed after %%s attempts: %%s. It is kept in outbox.failed_events; outbox.retry_failed() sends it.',
                        o.retry_count, o.last_error)
                    when o.status = 'retry' then format('Attempt %%s of %%s failed: %%s. ', o.retry_count, o.max_retries, o.last_error) ||
                        case when b.delivery = 'exactly_once' then 'The worker first looks for it in its stream, because Redis may have accepted it.'
                            else 'It is sent again, as the old worker would.' end
                    when o.status <> 'processing' and o.scheduled_at > greatest(o.created_at, now()) then 'It is not due yet.'
                    when o.status = 'pending' then 'It has not been sent.'
                    when $1 = 'send' then 'The old worker was processing it: it is sent, perhaps for a second time.'
                    when $1 = 'look' and b.delivery = 'exactly_once' then 'The old worker was processing it: it is sent unless it is found in its stream.'
                    when $1 = 'look' then 'The old worker was processing it, and with at_least_once the relay does not look in streams: only ambiguous => ''send'' imports it.'
                    else 'The old worker is processing it, or died while it did: it may be in its stream. Stop that worker, then import with ambiguous => ''look''.'
                    end as why) j
        $sql$, source);
begin
    perform outbox.expect_outbox_table(source, '{id,spec_version,event_type,source,subject,data_content_type,data_schema,data,status,created_at,scheduled_at,retry_count,max_retries,last_error,publisher_backend,publisher_config}');
    if ambiguous is null or ambiguous not in ('leave', 'look', 'send') then
        raise exception using errcode = 'invalid_parameter_value', message = 'ambiguous must be leave, look or send',
            detail = format('It is %s. It decides about rows that the old worker was processing.', coalesce(quote_literal(ambiguous), 'NULL')),
            hint = 'leave: nothing yet. look: they are sent unless they are found in their streams. send: they are sent, perhaps for a second time.';
    end if;
    if coalesce(dry_run, true) then
        return query execute format('select f.id, f.event_type, f.backend, f.created_at, f.scheduled_at, f.attempts, f.status, f.becomes, f.why
            from (%s) f order by f.created_at, f.id', rows_found) using ambiguous;
        return;
    end if;
    -- One import at a time. Readers and writers are not blocked.
    execute format('lock table %s in share update exclusive mode', source);
    perform outbox.silence_triggers();
    return query execute format($sql$
        with found as materialized (%2$s),
        -- A row that its worker or another session has changed meanwhile, or is changing, stays. Waiting for the worker
        -- could deadlock in a transaction that has made the bridge, because the worker waits for the table.
        free as (
            select o.id from %1$s o join found f on o.id = f.id and o.status = f.status and o.last_error is not distinct from f.last_error
            where f.becomes in ('pending', 'scheduled', 'failed') or f.becomes = 'moved' and f.status in ('pending', 'retry')
            for update of o skip locked
        ),
        taken as (
            update %1$s o set status = 'processing', last_error = 'moved to outbox_relay at ' || now()
            from found f join free on free.id = f.id
            where o.id = f.id
            returning o.id, f.becomes, f.status, f.created_at, f.scheduled_at, f.backend, f.backend_number, f.attempts, f.last_error,
                o.event_type::text, o.source::text, nullif(o.subject, '') as subject, nullif(o.data, 'null')::json as data,
                nullif(o.data_schema, '') as data_schema, nullif(nullif(nullif(o.publisher_config, '{}'), '[]'), 'null')::json as publisher_config,
                case when f.becomes = 'failed' then least(greatest(f.max_retries, 1), 1000)
                    else least(greatest(f.max_retries - f.attempts, 1), 1000) end::integer as max_retries
        ),
        -- Rows that are inserted with a transaction id count as restored: the worker looks for them in their streams
        -- before it sends anything.
        pending as (
            insert into outbox.events (event_id, created_at, xid, event_type, source, backend, data, subject, data_schema, publisher_config, max_retries)
            select t.id, t.created_at, case when t.status <> 'pending' and not (t.status = 'processing' and $1 = 'send') then '0'::xid8 end,
                t.event_type, t.source, t.backend, t.data, t.subject, t.data_schema, t.publisher_config, t.max_retries
            from (select * from taken where becomes = 'pending' order by created_at, id) t
        ),
        scheduled as (
            insert into outbox.scheduled_events (event_id, created_at, event_type, source, backend, data, subject, data_schema, publisher_config, max_retries, scheduled_at)
            select t.id, t.created_at, t.event_type, t.source, t.backend, t.data, t.subject, t.data_schema, t.publisher_config, t.max_retries, t.scheduled_at
            from (select * from taken where becomes = 'scheduled' order by created_at, id) t
        ),
        failed as (
            insert into outbox.failed_events (xid, seq, created_at, event_id, backend_number, event_type, source, backend, data, subject, data_schema,
                publisher_config, max_retries, attempts, last_error, stream)
            select pg_current_xact_id(), outbox.draw_seq(), t.created_at, t.id, t.backend_number, t.event_type, t.source, t.backend, t.data, t.subject,
                t.data_schema, t.publisher_config, t.max_retries, t.attempts, t.last_error, outbox.template_stream(t.event_type, t.source, t.subject, t.backend)
            from (select * from taken where becomes = 'failed' order by created_at, id) t
        )
        select f.id, f.event_type, f.backend, f.created_at, f.scheduled_at, f.attempts, f.status,
            case when t.id is null and f.becomes in ('pending', 'scheduled', 'failed') then 'ambiguous' else f.becomes end,
            case when t.id is null and f.becomes in ('pending', 'scheduled', 'failed') then 'Another session, such as the old worker, is changing it: import again.' else f.why end
        from found f left join taken t on t.id = f.id
        order by f.created_at, f.id
        $sql$, source, rows_found) using ambiguous;
end
$$;
comment on function outbox.import_django_broadcaster(regclass, boolean, text) is 'Moves the rows of django-broadcaster''s table that were not sent into this outbox, under their ids and times. Returns a row for each row found: what becomes of it (pending, scheduled, failed; or it stays: published, moved, ambiguous, refused) and why. By default it only reports. Moved rows get the status processing, which that package''s worker leaves alone. ambiguous says what becomes of rows that the old worker had in hand: leave; look, to send those that are not found in their streams; send. Run it again as often as you like: nothing is moved twice.';

create function outbox.mark_bridged_row() returns trigger
    language plpgsql set search_path = pg_catalog, pg_temp
    as $$
begin
    if new.spec_version <> '1.0' or new.data_content_type <> 'application/json' then
        raise exception using errcode = 'invalid_parameter_value',
            message = 'an event with this spec_version or data_content_type cannot be sent',
            detail = format('Entries say specversion 1.0 and datacontenttype application/json. This row has %s and %s.', new.spec_version, new.data_content_type),
            hint = 'Use the defaults of both columns.';
    end if;
    new.status := 'processing';
    new.last_error := 'moved to outbox_relay at ' || now() || ' on INSERT';
    return new;
end
$$;
comment on function outbox.mark_bridged_row() is 'Trigger of django-broadcaster''s table while there is a bridge: marks a row that becomes an event, so that the old worker leaves it alone.';

create function outbox.keep_mark() returns trigger
    language plpgsql set search_path = pg_catalog, pg_temp
    as $$
begin
    new.status := old.status;
    new.last_error := old.last_error;
    return new;
end
$$;
comment on function outbox.keep_mark() is 'Trigger of django-broadcaster''s table while there is a bridge: a moved row stays marked even if the application saves an older object from memory, and no other row gets the mark of a new one by ON CONFLICT DO UPDATE.';

create function outbox.follow_bridged_row() returns trigger
    language plpgsql security definer set search_path = pg_catalog, pg_temp
    as $$
begin
    -- The table's owner could have given the columns types whose functions the owner has written.
    if pg_typeof(old.id) <> 'uuid'::regtype or pg_typeof(old.scheduled_at) <> 'timestamptz'::regtype then
        return null;
    end if;
    perform outbox.silence_triggers();
    if tg_op = 'DELETE' then
        delete from outbox.scheduled_events s where s.event_id = old.id;
    else
        with gone as (delete from outbox.scheduled_events s where s.event_id = old.id returning s.*)
        -- With its own numbers, so that each row of an event that goes to several streams keeps its place.
        insert into outbox.scheduled_events (xid, seq, event_id, backend_number, branch, published_by, created_at, event_type, source, backend, data, subject, stream, data_schema,
            publisher_config, max_retries, scheduled_at)
        select pg_current_xact_id(), outbox.draw_seq(), g.event_id, g.backend_number, g.branch, g.published_by, g.created_at, g.event_type, g.source, g.backend, g.data, g.subject, g.stream, g.data_schema,
            g.publisher_config, g.max_retries, new.scheduled_at
        from (select * from gone order by seq) g;
    end if;
    return null;
end
$$;
comment on function outbox.follow_bridged_row() is 'Trigger of django-broadcaster''s table while there is a bridge: deleting a row that is not due yet cancels its event, and changing scheduled_at reschedules it.';

create function outbox.bridge_django_broadcaster(source regclass) returns void
    language plpgsql volatile set search_path = pg_catalog, pg_temp
    as $$
declare
    moving text;
begin
    perform outbox.expect_outbox_table(source, '{id,spec_version,event_type,source,subject,data_content_type,data_schema,data,status,created_at,scheduled_at,retry_count,max_retries,last_error,publisher_backend,publisher_config}');
    select a.attname into moving from pg_partitioned_table p join pg_attribute a on a.attrelid = p.partrelid and a.attnum = any (p.partattrs::smallint[])
        where p.partrelid = source and a.attname in ('status', 'last_error', 'scheduled_at');
    if found then
        raise exception using errcode = 'feature_not_supported', message = format('%s is partitioned by %s', source, moving),
            detail = 'Rows would move to another partition, which triggers see as a deleted row and a new one.',
            hint = 'Import its rows, and let the application publish by itself.';
    end if;
    execute format($sql$
        create trigger "~outbox_relay_mark" before insert on %1$s for each row
            when (new.status in ('pending', 'retry')) execute function outbox.mark_bridged_row();
        create trigger "~outbox_relay_keep" before update on %1$s for each row
            when (old.last_error like 'moved to outbox_relay at %%' or new.last_error like 'moved to outbox_relay at %% on INSERT')
            execute function outbox.keep_mark();
        -- Rows that were marked earlier, such as those of a dump, do not count as new.
        create trigger outbox_relay_publish after insert on %1$s for each row
            when (new.last_error = 'moved to outbox_relay at ' || now() || ' on INSERT')
            execute function outbox.publish_row('event_id', 'id', 'event_type', 'event_type', 'source', 'source', 'data', 'data', 'subject', 'subject',
                'backend', 'publisher_backend', 'scheduled_at', 'scheduled_at', 'created_at', 'created_at', 'max_retries', 'max_retries',
                'publisher_config', 'publisher_config', 'data_schema', 'data_schema');
        create trigger outbox_relay_reschedule after update on %1$s for each row
            when (old.last_error like 'moved to outbox_relay at %%' and new.scheduled_at is distinct from old.scheduled_at)
            execute function outbox.follow_bridged_row();
        create trigger outbox_relay_cancel after delete on %1$s for each row
            when (old.last_error like 'moved to outbox_relay at %%' and old.scheduled_at > now())
            execute function outbox.follow_bridged_row();
        $sql$, source);
end
$$;
comment on function outbox.bridge_django_broadcaster(regclass) is 'From now on each row that is inserted into django-broadcaster''s table becomes an event, in the same transaction and without further rights, and is marked so that the old worker leaves it alone. Existing rows are unchanged: outbox.import_django_broadcaster() moves them. outbox.end_bridge() ends it.';

----------------------------------------------------------------------------------------------------------------------
-- Outbox tables as Debezium's event router reads them
----------------------------------------------------------------------------------------------------------------------

create function outbox.publish_row() returns trigger
    language c
    as 'MODULE_PATHNAME', 'publish_row';
comment on function outbox.publish_row() is 'Trigger of another product''s outbox table: publishes each row that is inserted. Its arguments are pairs: an argument of outbox.publish_event (or created_at, or stream_prefix), and the column with its value, or = followed by a literal text. As a BEFORE trigger it leaves the row out of the table.';

create function outbox.outbox_row(id text, payload text, out event_id uuid, out data jsonb, out fault text)
    language plpgsql immutable set search_path = pg_catalog, pg_temp
    as $$
begin
    begin
        event_id := id::uuid;
    exception when data_exception then
        fault := format('Its id is not a uuid: %s.', sqlerrm);
        return;
    end;
    data := nullif(payload::jsonb, 'null');
exception when data_exception or program_limit_exceeded then
    fault := format('Its payload is not JSON: %s.', sqlerrm);
end
$$;
comment on function outbox.outbox_row(text, text) is 'Part of outbox.import_debezium(): the id and the payload of a row, or what is wrong with them.';

create function outbox.import_debezium(source regclass, dry_run boolean default true, ambiguous text default 'leave', backend text default null,
        stream_prefix text default null, event_source text default null, id_column text default 'id', type_column text default 'type',
        route_column text default 'aggregatetype', key_column text default 'aggregateid', payload_column text default 'payload',
        order_column text default null,
        out event_id uuid, out event_type text, out subject text, out stream text, out becomes text, out why text) returns setof record
    language plpgsql volatile set search_path = pg_catalog, pg_temp
    as $$
declare
    rows_found constant text := format($sql$
        select o.tableoid, o.ctid, row_number() over (order by %7$s) as place, o.id, o.event_type, o.source, o.subject, o.stream, o.data,
            case when coalesce(o.fault, j.refused) is not null then 'refused' when j.is_here then 'moved' when $1 = 'send' then 'pending' else 'ambiguous' end as becomes,
            case when coalesce(o.fault, j.refused) is not null then coalesce(o.fault, j.refused)
                when j.is_here then 'An event with this id already exists.'
                when $1 = 'send' then 'It is sent, perhaps for a second time: the table does not show what the connector has sent.'
                else 'The connector may have sent it: the table does not show that. Delete the rows that it has sent, then import the rest with ambiguous => ''send''.'
                end as why
        from (
                select o.tableoid, o.ctid, %8$s as order_value, r.event_id as id, o.%3$I::text as event_type, coalesce($3, o.%4$I::text) as source,
                    nullif(o.%5$I::text, '') as subject, nullif($4 || o.%4$I::text, '') as stream, r.data, r.fault
                from %1$s o, outbox.outbox_row(o.%2$I::text, o.%6$I::text) r
            ) o
            cross join lateral (select outbox.refusal(o.event_type, o.source, o.data, o.subject, $2, null, null, null, o.stream, null, null) as refused,
                outbox.has_event(o.id) as is_here) j
        $sql$, source, id_column, type_column, route_column, key_column, payload_column,
        case when order_column is null then 'o.tableoid, o.ctid' else 'o.order_value, o.tableoid, o.ctid' end,
        case when order_column is null then 'null' else format('o.%I', order_column) end);
begin
    perform outbox.expect_outbox_table(source, array_remove(array[id_column, type_column, route_column, key_column, payload_column, order_column], null));
    if ambiguous is null or ambiguous not in ('leave', 'send') then
        raise exception using errcode = 'invalid_parameter_value', message = 'ambiguous must be leave or send',
            detail = format('It is %s. The table does not show which of its rows the connector has sent.', coalesce(quote_literal(ambiguous), 'NULL')),
            hint = 'leave: nothing is moved. send: all rows are sent, perhaps for a second time.';
    end if;
    if coalesce(dry_run, true) then
        return query execute format('select f.id, f.event_type, f.subject, f.stream, f.becomes, f.why from (%s) f order by f.place', rows_found)
            using ambiguous, backend, event_source, stream_prefix;
        return;
    end if;
    -- Nobody may delete or change the rows meanwhile.
    execute format('lock table %s in share row exclusive mode', source);
    perform outbox.silence_triggers();
    return query execute format($sql$
        with found as materialized (%2$s),
        gone as (
            delete from %1$s o using found f where o.tableoid = f.tableoid and o.ctid = f.ctid and f.becomes in ('pending', 'moved')
        ),
        pending as (
            insert into outbox.events (event_id, event_type, source, backend, data, subject, stream)
            select f.id, f.event_type, f.source, $2, f.data::json, f.subject, f.stream
            from (select * from found where becomes = 'pending' order by place) f
        )
        select f.id, f.event_type, f.subject, f.stream, f.becomes, f.why from found f order by f.place
        $sql$, source, rows_found) using ambiguous, backend, event_source, stream_prefix;
end
$$;
comment on function outbox.import_debezium(regclass, boolean, text, text, text, text, text, text, text, text, text, text) is 'Moves the rows of an outbox table that Debezium''s event router read into this outbox, under their ids. Returns a row for each row found: what becomes of it and why. By default it only reports. The table does not show which rows the connector has sent: with ambiguous => ''send'' all are sent. Rows that were moved are deleted. Each event goes to the stream stream_prefix || aggregatetype, or without a prefix to that of the backend.';

create function outbox.bridge_debezium(source regclass, backend text default null, stream_prefix text default null, event_source text default null,
        keep_rows boolean default true, id_column text default 'id', type_column text default 'type', route_column text default 'aggregatetype',
        key_column text default 'aggregateid', payload_column text default 'payload') returns void
    language plpgsql volatile set search_path = pg_catalog, pg_temp
    as $$
declare
    publications text;
    arguments text[];
    unfit text;
begin
    perform outbox.expect_outbox_table(source, array[id_column, type_column, route_column, key_column, payload_column]);
    -- As the trigger reads them: below all domains.
    with recursive base (place, name, type, expected, oid) as (
        select w.place, w.name, a.atttypid, w.expected, a.atttypid
        from (values (1, id_column, 'uuid or a text'), (2, type_column, 'a text, a number or uuid'), (4, key_column, 'a text, a number or uuid'),
                (3, case when event_source is null or stream_prefix is not null then route_column end, 'a text, a number or uuid'),
                (5, payload_column, 'json, jsonb or a text')) w (place, name, expected)
            join pg_attribute a on a.attrelid = source and a.attname = w.name
        union all
        select b.place, b.name, b.type, b.expected, t.typbasetype from base b join pg_type t on t.oid = b.oid and t.typtype = 'd'
    )
    select format('Column "%s" has type %s; expected is %s.', b.name, format_type(b.type, null), b.expected) into unfit
    from base b join pg_type t on t.oid = b.oid and t.typtype <> 'd'
    where not b.oid::regtype = any (case b.place when 1 then '{uuid,text,varchar,bpchar}' when 5 then '{json,jsonb,text,varchar,bpchar}'
        else '{text,varchar,bpchar,uuid,int2,int4,int8,numeric}' end::regtype[])
    order by b.place limit 1;
    if found then
        raise exception using errcode = 'datatype_mismatch', message = format('rows of %s cannot become events', source), detail = unfit,
            hint = 'Name another column, or change the type of this one.';
    end if;
    if backend is not null then
        perform outbox.expect_backend(backend);
    end if;
    -- From here on, no other transaction that has inserted rows is open.
    execute format('lock table %s in share row exclusive mode', source);
    select string_agg(quote_ident(p.pubname), ', ') into publications
    from pg_publication_tables p join pg_class c on c.relname = p.tablename join pg_namespace n on n.oid = c.relnamespace and n.nspname = p.schemaname
    where c.oid = source;
    if keep_rows and publications is not null then
        raise exception using errcode = 'object_not_in_prerequisite_state', message = format('%s is published by %s', source, publications),
            detail = 'A connector that reads this publication would send each event as well.',
            hint = format('Run ALTER PUBLICATION ... DROP TABLE %s; first, in the same transaction. Or pass keep_rows => false: then rows become events but are not stored.', source);
    end if;
    arguments := array['event_id', id_column, 'event_type', type_column, 'source', coalesce('=' || event_source, route_column), 'subject', key_column,
        'data', payload_column];
    if backend is not null then
        arguments := arguments || array['backend', '=' || backend];
    end if;
    if stream_prefix is not null then
        arguments := arguments || array['stream', route_column, 'stream_prefix', '=' || stream_prefix];
    end if;
    execute format('create trigger "~outbox_relay_publish" %s insert on %s for each row execute function outbox.publish_row(%s)',
        case when keep_rows then 'after' else 'before' end, source, (select string_agg(quote_literal(a.text), ', ' order by a.place)
            from unnest(arguments) with ordinality a (text, place)));
end
$$;
comment on function outbox.bridge_debezium(regclass, text, text, text, boolean, text, text, text, text, text) is 'From now on each row that is inserted into an outbox table with the columns of Debezium''s event router becomes an event, in the same transaction and without further rights. keep_rows => false: the row is not stored, so no connector sees it. outbox.end_bridge() ends it.';

----------------------------------------------------------------------------------------------------------------------
-- The end of a bridge
----------------------------------------------------------------------------------------------------------------------

create function outbox.end_bridge(source regclass) returns void
    language plpgsql volatile set search_path = pg_catalog, pg_temp
    as $$
declare
    name text;
    has_bridge boolean := false;
begin
    perform outbox.expect_outbox_table(source, '{}');
    for name in
        select t.tgname from pg_trigger t join pg_proc p on p.oid = t.tgfoid
        where t.tgrelid = source and not t.tgisinternal and p.pronamespace = 'outbox'::regnamespace
            and p.proname in ('publish_row', 'mark_bridged_row', 'keep_mark', 'follow_bridged_row')
    loop
        execute format('drop trigger %I on %s', name, source);
        has_bridge := true;
    end loop;
    if not has_bridge then
        raise exception using errcode = 'undefined_object', message = format('%s has no bridge', source),
            hint = 'outbox.bridge_django_broadcaster() and outbox.bridge_debezium() create one.';
    end if;
end
$$;
comment on function outbox.end_bridge(regclass) is 'Ends the bridge of a table: rows that are inserted after that do not become events. Events that came through it stay.';
