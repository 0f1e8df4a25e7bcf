-- The ledger: what each transaction published, written down in that transaction. What stands in it after all is the truth.

create schema chaos;

create table chaos.aggregates (key text primary key, version bigint not null default 0) with (fillfactor = 50);
insert into chaos.aggregates select 'k' || n from generate_series(0, 63) n;

create table chaos.ledger (
    event_id  uuid not null,
    -- The order of publishing within a transaction.
    seq       bigint generated always as identity,
    xid       xid8 not null default pg_current_xact_id(),
    -- One connection, and the number of its transaction.
    session   text not null,
    turn      bigint not null,
    -- Committed at another time than the connection's next transaction can know of.
    detached  boolean not null,
    scheduled boolean not null,
    backend   text not null,
    stream    text,
    key       text not null,
    version   bigint not null,
    event_type text not null,
    source    text not null,
    subject   text,
    data      jsonb not null,
    config    jsonb,
    -- An event that routes lead to two streams is two of the ledger's.
    place     text generated always as (event_id::text || case when event_type like 'routed.%' then '@' || stream else '' end) stored
);

-- Events that TRUNCATE took away, and whether a cursor had passed them.
create table chaos.truncated (event_id uuid not null, stream text, delivered boolean not null, unique nulls not distinct (event_id, stream));

-- A log of what is inserted into outbox.events, as tools that rewrite a table under load keep one; what stood there before; what it missed.
create table chaos.event_log (event_id uuid not null, line text not null);
create table chaos.before_log (event_id uuid not null, seq bigint not null);
create table chaos.unlogged (event_id uuid not null, seq bigint not null, logged text);
create function chaos.log_event() returns trigger
    language plpgsql as $$
begin
    insert into chaos.event_log values (new.event_id, new::text);
    return null;
end
$$;

-- Its changes are events.
create table chaos.items (key text primary key, version bigint not null, text text) with (fillfactor = 50);
select outbox.attach_table('chaos.items', event_type => 'item', source => 'chaos/items', backend => 'rows');

-- Publishes `count` events of one aggregate, whose row it locks first: so that its events are in the order of its versions.
create function chaos.publish(
    session text, turn bigint, detached boolean, key text, count integer, backend text, stream text, how text,
    padding integer, due_in interval
) returns void
    language plpgsql as $$
declare
    line chaos.ledger;
    lines chaos.ledger[] := '{}';
    changed jsonb;
    operation text;
begin
    for n in 1 .. count loop
        update chaos.aggregates a set version = a.version + 1 where a.key = publish.key
            returning a.version into strict line.version;
        line.session := publish.session;
        line.turn := publish.turn;
        line.detached := publish.detached;
        line.scheduled := due_in is not null;
        line.backend := publish.backend;
        line.stream := publish.stream;
        line.key := publish.key;
        line.event_type := how || '.' || line.version;
        line.source := 'chaos/' || publish.session;
        line.subject := case when line.version % 3 > 0 or publish.backend = 'templated' or how = 'routed' then publish.key end;
        line.data := jsonb_build_object('key', publish.key, 'version', line.version,
            'text', E'\u00fc "quoted" \\ \n' || repeat('x', padding));
        line.config := case when line.version % 5 = 0 then jsonb_build_object('tenant', 't' || line.version) end;
        if how = 'batch' then
            line.event_id := gen_random_uuid();
            lines := lines || line;
            continue;
        elsif how = 'routed' then
            if line.version % 2 = 0 then
                line.event_id := outbox.publish_event(line.event_type, line.source, line.data, line.subject, publisher_config => line.config);
            else
                insert into outbox.events (event_type, source, data, subject, publisher_config)
                    values (line.event_type, line.source, line.data, line.subject, line.config) returning event_id into line.event_id;
            end if;
            line.backend := 'second';
            line.stream := 'routed';
            perform chaos.note(line);
            line.backend := 'third';
            line.stream := 'routed' || outbox.stream_part(line.subject, 2);
        elsif how = 'row' then
            operation := 'delete';
            delete from chaos.items i where i.key = publish.key and line.version % 4 = 0 returning to_jsonb(i) into changed;
            if changed is null then
                operation := 'update';
                update chaos.items i set version = line.version, text = line.data ->> 'text' where i.key = publish.key
                    returning to_jsonb(i) into changed;
            end if;
            if changed is null then
                operation := 'insert';
                insert into chaos.items as i values (publish.key, line.version, line.data ->> 'text') returning to_jsonb(i) into changed;
            end if;
            line.event_type := 'item.' || operation;
            line.source := 'chaos/items';
            line.subject := publish.key;
            line.data := changed;
            line.config := null;
            -- Its row is the one that was published last.
            select p.event_id into strict line.event_id
                from outbox.published_here() with ordinality p (event_id, event_type, source, subject, backend, stream, data, place)
                order by p.place desc limit 1;
        elsif how = 'insert' then
            insert into outbox.events (event_type, source, data, subject, backend, stream, publisher_config)
                values (line.event_type, line.source, line.data, line.subject, line.backend, line.stream, line.config)
                returning event_id into line.event_id;
        else
            line.event_id := outbox.publish_event(line.event_type, line.source, line.data, line.subject, line.backend,
                stream => line.stream, publisher_config => line.config, scheduled_at => clock_timestamp() + due_in);
        end if;
        perform chaos.note(line);
    end loop;
    if how = 'batch' then
        perform outbox.publish_events((select jsonb_agg(jsonb_strip_nulls(jsonb_build_object(
            'event_id', l.event_id, 'event_type', l.event_type, 'source', l.source, 'subject', l.subject, 'data', l.data,
            'backend', l.backend, 'stream', l.stream, 'publisher_config', l.config)) order by l.version) from unnest(lines) l));
        foreach line in array lines loop
            perform chaos.note(line);
        end loop;
    end if;
end
$$;

create function chaos.note(line chaos.ledger) returns void
    language plpgsql as $$
begin
    insert into chaos.ledger (event_id, session, turn, detached, scheduled, backend, stream, key, version, event_type, source, subject,
            data, config)
        values (line.event_id, line.session, line.turn, line.detached, line.scheduled, line.backend, line.stream, line.key,
            line.version, line.event_type, line.source, line.subject, line.data, line.config);
end
$$;
