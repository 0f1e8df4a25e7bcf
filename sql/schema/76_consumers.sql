-- Consumers: which roles may add events to the inbox.

create function outbox.consumer_rights(out right_to text, out object text) returns setof record
    language sql immutable parallel safe set search_path = pg_catalog, pg_temp
    as $$
values
    ('usage', 'schema outbox'),
    ('execute', 'function outbox.consume_once(text, uuid)'),
    ('execute', 'function outbox.consume_once(bpchar, outbox.event_ids)'),
    ('execute', 'function outbox.consume_once(outbox.any_text, outbox.written_id)'),
    -- Called when a value is converted to event_ids through its text, and back.
    ('execute', 'function outbox.event_ids_in(cstring)'),
    ('execute', 'function outbox.event_ids_out(outbox.event_ids)'),
    ('insert (consumer, event_id)', 'table outbox.inbox'),
    ('select', 'table outbox.consumer_grants')
$$;
comment on function outbox.consumer_rights() is 'What outbox.grant_consumer() grants, as parts of a GRANT statement.';

create function outbox.grant_consumer(role regrole, consumers text[] default '{*}') returns void
    language plpgsql set search_path = pg_catalog, pg_temp
    as $$
begin
    perform outbox.expect_role(role);
    if consumers is null or array_position(consumers, null) is not null then
        raise exception using errcode = 'null_value_not_allowed', message = 'patterns of consumers must not be null',
            hint = 'Omit them to allow any name.';
    end if;
    delete from outbox.consumer_grants g
        where g.role::oid = grant_consumer.role::oid or not exists (select from pg_roles p where p.oid = g.role::oid);
    insert into outbox.consumer_grants (role, consumer)
        select distinct grant_consumer.role::oid, c.name from unnest(consumers) c (name);
    perform outbox.grant_rights(role, 'consumer_rights');
end
$$;
comment on function outbox.grant_consumer(regrole, text[]) is 'Lets a role call outbox.consume_once() for consumers whose names match one of these patterns (* and ?); by default for any. The role cannot read the inbox. The last call replaces earlier ones. Grant different names to keep consumers apart: a role can mark events as handled for every consumer that it may name.';

create function outbox.grant_consumer(role text, consumers text[] default '{*}') returns void
    language sql set search_path = pg_catalog, pg_temp
    as $$
select outbox.grant_consumer(outbox.expect_role(role), consumers)
$$;
comment on function outbox.grant_consumer(text, text[]) is 'The same, with the role''s name as pg_roles shows it: ''Shop-App'', or current_user.';

create function outbox.revoke_consumer(role regrole) returns void
    language plpgsql set search_path = pg_catalog, pg_temp
    as $$
begin
    perform outbox.revoke_rights(role, 'consumer_rights');
    delete from outbox.consumer_grants g where g.role::oid = revoke_consumer.role::oid;
    perform outbox.revoke_usage(role);
end
$$;
comment on function outbox.revoke_consumer(regrole) is 'Revokes what outbox.grant_consumer() has granted to a role. The role keeps what it has as a member of other roles.';

create function outbox.revoke_consumer(role text) returns void
    language sql set search_path = pg_catalog, pg_temp
    as $$
select outbox.revoke_consumer(outbox.expect_role(role))
$$;
comment on function outbox.revoke_consumer(text) is 'The same, with the role''s name as pg_roles shows it.';
