-- The inbox: which events a consumer has handled in this database.

create table outbox.inbox (
    -- Type text, because bpchar would lose trailing blanks.
    consumer    text not null check (length(consumer) between 1 and 255 and right(consumer, 1) <> ' '),
    event_id    uuid not null,
    consumed_at timestamptz not null default clock_timestamp(),
    primary key (consumer, event_id)
);
-- For purging.
create index inbox_consumed_at_idx on outbox.inbox (consumed_at);
comment on table outbox.inbox is 'The events that each consumer has handled in this database, recorded by outbox.consume_once(). Entries are kept for outbox_relay.inbox_retention, and are dumped and replicated like the data that consumers write.';
comment on column outbox.inbox.consumer is 'The name that a consumer has chosen, such as the name of its consumer group: 1 to 255 characters.';

create table outbox.consumer_grants (
    role     outbox.role_name not null,
    consumer text not null check (length(consumer) between 1 and 255),
    -- The same pattern for LIKE.
    pattern  text not null generated always as (replace(replace(replace(replace(replace(consumer,
        E'\\', E'\\\\'), '%', E'\\%'), '_', E'\\_'), '*', '%'), '?', '_')) stored,
    primary key (role, consumer)
);
comment on table outbox.consumer_grants is 'The consumer names that a role may use in outbox.consume_once(), see outbox.grant_consumer(). Members of the role may use them too.';
comment on column outbox.consumer_grants.consumer is 'A glob pattern (* and ?) of consumers'' names.';

-- It runs with the rights of the inserting role, which may read outbox.consumer_grants. The name is checked before the
-- index is read, so that nobody can learn what another consumer has handled.
create function outbox.check_consumer() returns trigger
    language plpgsql set search_path = pg_catalog, pg_temp
    as $$
begin
    if not exists (select from outbox.consumer_grants g where new.consumer like g.pattern and pg_has_role(g.role::oid, 'usage'))
        and not exists (select from pg_roles r where r.rolname = current_user and r.rolsuper) then
        raise exception using errcode = 'insufficient_privilege',
            message = format('permission denied for consumer "%s"', new.consumer),
            detail = format('Role "%s" has not been granted that name.', current_user),
            hint = format('Ask the administrator to run SELECT outbox.grant_consumer(%L); with or without a list of names.', current_user);
    end if;
    return new;
end
$$;
comment on function outbox.check_consumer() is 'Trigger of outbox.inbox: a role may note events only for consumers that it was granted.';

-- It does not need the library, because a consumer's database may have no worker.
create function outbox.consume_once(consumer text, event_id uuid) returns boolean
    language plpgsql volatile parallel unsafe set search_path = pg_catalog, pg_temp
    as $$
begin
    if consumer is null or event_id is null then
        raise exception using errcode = 'null_value_not_allowed', message = 'consumer and event_id must not be null',
            hint = 'Pass the consumer''s name, and the event_id of the entry.';
    end if;
    insert into outbox.inbox (consumer, event_id) values (consume_once.consumer, consume_once.event_id) on conflict do nothing;
    return found;
end
$$;
comment on function outbox.consume_once(text, uuid) is
    'The inbox: true if this consumer has not handled the event before, and false afterwards. Call it in the transaction that writes the effects, and acknowledge the entry after its commit. It waits for another transaction that is handling the same event; if that is rolled back, it returns true. In REPEATABLE READ and SERIALIZABLE, the other''s commit is a serialization failure (40001).';

-- The arguments have other types here, because otherwise a call with two untyped texts, as many drivers send, would be
-- ambiguous. Of the two functions, Postgres prefers the one above, whose first argument is a text.
create type outbox.event_ids;
create function outbox.event_ids_in(cstring) returns outbox.event_ids language internal immutable strict parallel safe as 'textin';
create function outbox.event_ids_out(outbox.event_ids) returns cstring language internal immutable strict parallel safe as 'textout';
create type outbox.event_ids (input = outbox.event_ids_in, output = outbox.event_ids_out, like = text, category = 'U');
comment on type outbox.event_ids is 'The argument of outbox.consume_once for several events: uuid[] or text[]. No other function accepts it.';
comment on function outbox.event_ids_in(cstring) is 'Input of type outbox.event_ids, the same as that of text.';
comment on function outbox.event_ids_out(outbox.event_ids) is 'Output of type outbox.event_ids, the same as that of text.';
create cast (uuid[] as outbox.event_ids) with inout as implicit;
create cast (text[] as outbox.event_ids) with inout as implicit;
create cast (varchar[] as outbox.event_ids) with inout as implicit;
create cast (outbox.event_ids as uuid[]) with inout as assignment;

create function outbox.consume_once(consumer bpchar, event_ids outbox.event_ids) returns setof uuid
    language plpgsql volatile parallel unsafe set search_path = pg_catalog, pg_temp
    as $$
declare
    ids uuid[] := event_ids::uuid[];
    new_ids uuid[] := '{}';
    id uuid;
begin
    if consumer is null or event_ids is null or array_position(ids, null) is not null then
        raise exception using errcode = 'null_value_not_allowed', message = 'consumer and event_ids must not be null',
            hint = 'Pass the consumer''s name, and the event_id of each entry.';
    end if;
    -- All calls use the same order, so that two calls with common ids do not deadlock.
    for id in select distinct u.id from unnest(ids) u (id) order by u.id loop
        insert into outbox.inbox (consumer, event_id) values (consume_once.consumer, id) on conflict do nothing;
        if found then
            new_ids := new_ids || id;
        end if;
    end loop;
    return query select n.id from unnest(new_ids) n (id) join unnest(ids) with ordinality u (id, place) on u.id = n.id
        group by n.id order by min(u.place);
end
$$;
comment on function outbox.consume_once(bpchar, outbox.event_ids) is
    'The same for several events, as uuid[]: returns those that this consumer has not handled before, each once, in the order given.';

-- The same for an id that a driver types as text: entries have it as text. Its type is one of its own for the reason
-- above.
create type outbox.written_id;
create function outbox.written_id_in(cstring) returns outbox.written_id language internal immutable strict parallel safe as 'textin';
create function outbox.written_id_out(outbox.written_id) returns cstring language internal immutable strict parallel safe as 'textout';
create type outbox.written_id (input = outbox.written_id_in, output = outbox.written_id_out, like = text, category = 'U');
comment on type outbox.written_id is 'The argument of outbox.consume_once for an event''s id that is typed as text. No other function accepts it.';
comment on function outbox.written_id_in(cstring) is 'Input of type outbox.written_id, the same as that of text.';
comment on function outbox.written_id_out(outbox.written_id) is 'Output of type outbox.written_id, the same as that of text.';
create cast (text as outbox.written_id) without function as implicit;
create cast (varchar as outbox.written_id) without function as implicit;
create cast (bpchar as outbox.written_id) without function as implicit;
create cast (outbox.written_id as text) without function as assignment;

create function outbox.consume_once(consumer outbox.any_text, event_id outbox.written_id) returns boolean
    language sql volatile parallel unsafe set search_path = pg_catalog, pg_temp
    as $$
select outbox.consume_once(consumer::text, event_id::text::uuid)
$$;
comment on function outbox.consume_once(outbox.any_text, outbox.written_id) is 'The same, for an id that a driver sends as text.';
