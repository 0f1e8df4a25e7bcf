-- Publishing.

create function outbox.publish_event(
    event_type       text,
    source           text,
    data             jsonb default null,
    subject          text default null,
    backend          text default null,
    scheduled_at     timestamptz default null,
    max_retries      integer default null,
    publisher_config jsonb default null,
    stream           text default null,
    data_schema      text default null,
    event_id         uuid default null,
    data_bytes       bytea default null
) returns uuid
    language c volatile parallel unsafe
    as 'MODULE_PATHNAME', 'publish_event';
comment on function outbox.publish_event(text, text, jsonb, text, text, timestamptz, integer, jsonb, text, text, uuid, bytea) is
    'Publishes an event within the caller''s transaction, and returns its id, or NULL if a trigger on the table left the row out. The event is sent after the commit. An event that names no backend goes where outbox.routes send it, otherwise to outbox_relay.default_backend. backend, subject, stream and data_schema: an empty text counts as NULL. scheduled_at: a time without a zone, as drivers send for a naive one, is taken in the session''s TimeZone; send one with a zone. data_bytes: a payload that is bytes, instead of data; entries have it as data_base64.';

-- The same function for arguments with the types that drivers send, in two more signatures. They never compete with the
-- one above, nor with each other: the first argument of both, and the second of the last, is a domain, which loses to
-- text for a literal, for an untyped parameter and for all text types. The types of the other arguments are of the same
-- categories as those above.
create function outbox.publish_event(
    event_type       outbox.any_text,
    source           text,
    data             outbox.any_value default null,
    subject          text default null,
    backend          text default null,
    scheduled_at     timestamptz default null,
    max_retries      outbox.any_number default null,
    publisher_config outbox.any_value default null,
    stream           text default null,
    data_schema      text default null,
    event_id         outbox.any_value default null,
    data_bytes       bytea default null
) returns uuid
    language c volatile parallel unsafe
    as 'MODULE_PATHNAME', 'publish_event_of_any_types';
comment on function outbox.publish_event(outbox.any_text, text, outbox.any_value, text, text, timestamptz, outbox.any_number, outbox.any_value, text, text, outbox.any_value, bytea) is
    'The same, for arguments that a driver sends with other types: for data json, text or bytea, also a number or a boolean; for max_retries any number or its text; for event_id text.';

create function outbox.publish_event(
    event_type       outbox.any_text,
    source           outbox.any_text,
    data             outbox.any_value default null,
    subject          outbox.any_subject default null,
    backend          text default null,
    scheduled_at     outbox.any_time default null,
    max_retries      outbox.any_number default null,
    publisher_config outbox.any_value default null,
    stream           text default null,
    data_schema      text default null,
    event_id         outbox.any_value default null,
    data_bytes       bytea default null
) returns uuid
    language c volatile parallel unsafe
    as 'MODULE_PATHNAME', 'publish_event_of_any_types';
comment on function outbox.publish_event(outbox.any_text, outbox.any_text, outbox.any_value, outbox.any_subject, text, outbox.any_time, outbox.any_number, outbox.any_value, text, text, outbox.any_value, bytea) is
    'The same, for a subject that is a number or a uuid, and a scheduled_at that is text.';

create function outbox.publish_events(events jsonb) returns setof uuid
    language c volatile strict parallel unsafe
    as 'MODULE_PATHNAME', 'publish_events';
comment on function outbox.publish_events(jsonb) is
    'Publishes an array of objects with the keys of outbox.publish_event (binary payloads as data_base64), in order, and returns their ids. The CONTEXT of an error names the element.';

create function outbox.binary_data(bytes bytea) returns json
    language c immutable strict parallel safe
    as 'MODULE_PATHNAME', 'binary_data';
comment on function outbox.binary_data(bytea) is
    'Encodes a binary payload for the column data of a plain INSERT: base64 as a JSON string, marked by leading whitespace. A cast to jsonb removes the mark, so that the payload is then a string.';

create function outbox.published_here(out event_id uuid, out event_type text, out source text, out subject text, out backend text, out stream text,
        out data jsonb) returns setof record
    language c volatile parallel unsafe
    as 'MODULE_PATHNAME', 'published_here';
comment on function outbox.published_here() is
    'What the calling transaction has published so far, scheduled events too, in order, and nothing else. It is meant for tests that roll back. Only events that were published with the rights of the calling role, or of a role that it is a member of: what a function with SECURITY DEFINER publishes, such as the trigger of an attached table, is shown to members of its owner, and to roles that may read outbox.events.';

create function outbox.template_stream(event_type text, source text, subject text default null, backend text default null) returns text
    language c stable
    as 'MODULE_PATHNAME', 'template_stream';
comment on function outbox.template_stream(text, text, text, text) is 'The stream that the template of a backend (NULL: outbox_relay.default_backend) gives such an event; the errors are those of publish_event. NULL: its stream_name is not a template.';

create function outbox.stream_part(value text, parts integer) returns integer
    language c immutable strict parallel safe
    as 'MODULE_PATHNAME', 'stream_part';
comment on function outbox.stream_part(text, integer) is 'The value of a placeholder such as {subject|16}: the CRC-32 (as in zlib) of the value in UTF-8, modulo the number of parts. This definition never changes.';

create function outbox.complete_event() returns trigger
    language c
    as 'MODULE_PATHNAME', 'complete_event';
comment on function outbox.complete_event() is 'Trigger of outbox.events and outbox.scheduled_events: checks a row as publish_event does, and fills in xid, seq and backend_number.';

create function outbox.draw_seq() returns bigint
    language c volatile
    as 'MODULE_PATHNAME', 'draw_seq_wrapper';
comment on function outbox.draw_seq() is 'Draws the next number after assigning the transaction''s id. For rows that this transaction inserts with both.';

create function outbox.confirm_event() returns trigger
    language c
    as 'MODULE_PATHNAME', 'confirm_event';
comment on function outbox.confirm_event() is 'Trigger of outbox.events: refuses a row in which another trigger has changed seq, xid, backend_number or event_id, or which another trigger has made invalid.';

create function outbox.fan_out() returns trigger
    language c
    as 'MODULE_PATHNAME', 'fan_out';
comment on function outbox.fan_out() is 'Trigger of outbox.events and outbox.scheduled_events: after an INSERT, inserts the further rows of events that outbox.routes send to several streams.';

create function outbox.erased_config() returns json
    language sql immutable parallel safe set search_path = pg_catalog, pg_temp
    as $$
select '{"erased": true}'::json
$$;
comment on function outbox.erased_config() is 'The publisher_config of an event whose payload was erased, which gives its entry the field "erased". See outbox.erase().';

create function outbox.refuse_update() returns trigger
    language plpgsql set search_path = pg_catalog, pg_temp
    as $$
begin
    -- This is the update that outbox.erase() makes.
    if new.data is null and new.subject is null and new.publisher_config::text = outbox.erased_config()::text
        and (new.seq, new.xid, new.created_at, new.event_id, new.backend_number, new.branch, new.published_by, new.event_type, new.source, new.backend,
            new.stream, new.data_schema, new.max_retries)
            is not distinct from (old.seq, old.xid, old.created_at, old.event_id, old.backend_number, old.branch, old.published_by, old.event_type,
            old.source, old.backend, old.stream, old.data_schema, old.max_retries) then
        return new;
    end if;
    raise exception using errcode = 'object_not_in_prerequisite_state',
        message = 'rows of outbox.events are never updated',
        hint = 'Publish another event.';
end
$$;
comment on function outbox.refuse_update() is 'Trigger of outbox.events: an event that may have been sent cannot be changed. Only its payload can be erased, see outbox.erase().';
