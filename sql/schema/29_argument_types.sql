-- Types of the arguments of outbox.publish_event, as drivers send them: json, text or varchar for JSON, bigint or text
-- for a number, uuid for a subject. They have the categories of the types that they stand for (U, N, S and D) and are
-- not preferred in them: a literal that could be either gets the ordinary type.

create domain outbox.any_text as text;
comment on domain outbox.any_text is 'A text argument of the further signatures of outbox.publish_event.';
create type outbox.any_value;
create function outbox.any_value_in(cstring) returns outbox.any_value language internal immutable strict parallel safe as 'textin';
create function outbox.any_value_out(outbox.any_value) returns cstring language internal immutable strict parallel safe as 'textout';
create function outbox.any_value_recv(internal) returns outbox.any_value language internal stable strict parallel safe as 'textrecv';
create function outbox.any_value_send(outbox.any_value) returns bytea language internal stable strict parallel safe as 'textsend';
create type outbox.any_value (input = outbox.any_value_in, output = outbox.any_value_out, receive = outbox.any_value_recv,
    send = outbox.any_value_send, like = text, category = 'U');
comment on type outbox.any_value is 'An argument of outbox.publish_event in any type that a driver sends, parsed from its text. No other function accepts it.';
comment on function outbox.any_value_in(cstring) is 'Input of type outbox.any_value, the same as that of text.';
comment on function outbox.any_value_out(outbox.any_value) is 'Output of type outbox.any_value, the same as that of text.';
comment on function outbox.any_value_recv(internal) is 'Binary input of type outbox.any_value, the same as that of text.';
comment on function outbox.any_value_send(outbox.any_value) is 'Binary output of type outbox.any_value, the same as that of text.';
create cast (text as outbox.any_value) without function as implicit;
create cast (varchar as outbox.any_value) without function as implicit;
create cast (bpchar as outbox.any_value) without function as implicit;
create cast (json as outbox.any_value) without function as implicit;
create cast (bytea as outbox.any_value) without function as implicit;
create cast (jsonb as outbox.any_value) with inout as implicit;
create cast (uuid as outbox.any_value) with inout as implicit;
-- Numbers and booleans are valid JSON as text.
create cast (smallint as outbox.any_value) with inout as implicit;
create cast (integer as outbox.any_value) with inout as implicit;
create cast (bigint as outbox.any_value) with inout as implicit;
create cast (numeric as outbox.any_value) with inout as implicit;
create cast (real as outbox.any_value) with inout as implicit;
create cast (double precision as outbox.any_value) with inout as implicit;
create function outbox.any_value(boolean) returns outbox.any_value language internal immutable strict parallel safe as 'booltext';
comment on function outbox.any_value(boolean) is 'true or false, as in JSON.';
create cast (boolean as outbox.any_value) with function outbox.any_value(boolean) as implicit;
-- Values that are no JSON get a clear error instead of "function does not exist". Lists too: psycopg sends [1] as
-- an array, but [] as '{}' without a type, which would be an empty object.
create function outbox.refuse_value(value anyelement) returns outbox.any_value
    language plpgsql immutable set search_path = pg_catalog, pg_temp
    as $$
declare
    is_array constant boolean := pg_typeof(value)::text like '%[]';
begin
    raise exception using errcode = 'datatype_mismatch', message = format('a value of type %s is not JSON', pg_typeof(value)),
        detail = case when is_array then 'Drivers send lists as arrays. An empty one would be read as {}, an empty object.'
            else 'Times have no form in JSON of their own.' end,
        hint = case when is_array then 'Encode the list as JSON: Jsonb([1, 2]) with psycopg, JSON.stringify([1, 2]) in JavaScript, to_jsonb(array[1, 2]) in SQL.'
            else 'Put it into an object, as a text: {"at": "2026-01-31T12:00:00Z"}, or use to_jsonb() in SQL.' end;
end
$$;
comment on function outbox.refuse_value(anyelement) is 'Raises the error for an argument of outbox.publish_event that is no JSON.';
create cast (boolean[] as outbox.any_value) with function outbox.refuse_value(anyelement) as implicit;
create cast (smallint[] as outbox.any_value) with function outbox.refuse_value(anyelement) as implicit;
create cast (integer[] as outbox.any_value) with function outbox.refuse_value(anyelement) as implicit;
create cast (bigint[] as outbox.any_value) with function outbox.refuse_value(anyelement) as implicit;
create cast (numeric[] as outbox.any_value) with function outbox.refuse_value(anyelement) as implicit;
create cast (real[] as outbox.any_value) with function outbox.refuse_value(anyelement) as implicit;
create cast (double precision[] as outbox.any_value) with function outbox.refuse_value(anyelement) as implicit;
create cast (text[] as outbox.any_value) with function outbox.refuse_value(anyelement) as implicit;
create cast (varchar[] as outbox.any_value) with function outbox.refuse_value(anyelement) as implicit;
create cast (uuid[] as outbox.any_value) with function outbox.refuse_value(anyelement) as implicit;
create cast (json[] as outbox.any_value) with function outbox.refuse_value(anyelement) as implicit;
create cast (jsonb[] as outbox.any_value) with function outbox.refuse_value(anyelement) as implicit;
create cast (date as outbox.any_value) with function outbox.refuse_value(anyelement) as implicit;
create cast (timestamp as outbox.any_value) with function outbox.refuse_value(anyelement) as implicit;
create cast (timestamptz as outbox.any_value) with function outbox.refuse_value(anyelement) as implicit;
create cast (time as outbox.any_value) with function outbox.refuse_value(anyelement) as implicit;
create cast (timetz as outbox.any_value) with function outbox.refuse_value(anyelement) as implicit;
create cast (interval as outbox.any_value) with function outbox.refuse_value(anyelement) as implicit;

create type outbox.any_number;
create function outbox.any_number_in(cstring) returns outbox.any_number language internal immutable strict parallel safe as 'textin';
create function outbox.any_number_out(outbox.any_number) returns cstring language internal immutable strict parallel safe as 'textout';
create type outbox.any_number (input = outbox.any_number_in, output = outbox.any_number_out, like = text, category = 'N');
comment on type outbox.any_number is 'A number as an argument of outbox.publish_event, in any type that a driver sends, parsed from its text.';
comment on function outbox.any_number_in(cstring) is 'Input of type outbox.any_number, the same as that of text.';
comment on function outbox.any_number_out(outbox.any_number) is 'Output of type outbox.any_number, the same as that of text.';
create cast (text as outbox.any_number) without function as implicit;
create cast (varchar as outbox.any_number) without function as implicit;
create cast (bpchar as outbox.any_number) without function as implicit;
create cast (smallint as outbox.any_number) with inout as implicit;
create cast (integer as outbox.any_number) with inout as implicit;
create cast (bigint as outbox.any_number) with inout as implicit;
create cast (numeric as outbox.any_number) with inout as implicit;
create cast (real as outbox.any_number) with inout as implicit;
create cast (double precision as outbox.any_number) with inout as implicit;
-- Here and below, values that would otherwise get "function does not exist".
create function outbox.refuse_number(value anyelement) returns outbox.any_number
    language plpgsql immutable set search_path = pg_catalog, pg_temp
    as $$
begin
    raise exception using errcode = 'datatype_mismatch', message = format('a value of type %s is not a number', pg_typeof(value)),
        detail = 'max_retries is the total number of attempts.', hint = 'Pass a number, or NULL for outbox_relay.max_retries.';
end
$$;
comment on function outbox.refuse_number(anyelement) is 'Raises the error for a max_retries of outbox.publish_event that is no number.';
create cast (boolean as outbox.any_number) with function outbox.refuse_number(anyelement) as implicit;

create type outbox.any_subject;
create function outbox.any_subject_in(cstring) returns outbox.any_subject language internal immutable strict parallel safe as 'textin';
create function outbox.any_subject_out(outbox.any_subject) returns cstring language internal immutable strict parallel safe as 'textout';
create type outbox.any_subject (input = outbox.any_subject_in, output = outbox.any_subject_out, like = text, category = 'S');
comment on type outbox.any_subject is 'A subject as an argument of outbox.publish_event: a text, a number or a uuid.';
comment on function outbox.any_subject_in(cstring) is 'Input of type outbox.any_subject, the same as that of text.';
comment on function outbox.any_subject_out(outbox.any_subject) is 'Output of type outbox.any_subject, the same as that of text.';
create cast (text as outbox.any_subject) without function as implicit;
create cast (varchar as outbox.any_subject) without function as implicit;
create cast (bpchar as outbox.any_subject) without function as implicit;
create cast (name as outbox.any_subject) with inout as implicit;
create cast (uuid as outbox.any_subject) with inout as implicit;
create cast (smallint as outbox.any_subject) with inout as implicit;
create cast (integer as outbox.any_subject) with inout as implicit;
create cast (bigint as outbox.any_subject) with inout as implicit;
create cast (numeric as outbox.any_subject) with inout as implicit;

create type outbox.any_time;
create function outbox.any_time_in(cstring, oid, integer) returns outbox.any_time language internal stable strict parallel safe as 'timestamptz_in';
create function outbox.any_time_out(outbox.any_time) returns cstring language internal stable strict parallel safe as 'timestamptz_out';
create type outbox.any_time (input = outbox.any_time_in, output = outbox.any_time_out, like = timestamptz, category = 'D');
comment on type outbox.any_time is 'A time as an argument of outbox.publish_event, in any type that a driver sends.';
comment on function outbox.any_time_in(cstring, oid, integer) is 'Input of type outbox.any_time, the same as that of timestamptz.';
comment on function outbox.any_time_out(outbox.any_time) is 'Output of type outbox.any_time, the same as that of timestamptz.';
create function outbox.any_time(timestamp) returns outbox.any_time language internal stable strict parallel safe as 'timestamp_timestamptz';
create function outbox.any_time(date) returns outbox.any_time language internal stable strict parallel safe as 'date_timestamptz';
comment on function outbox.any_time(timestamp) is 'A time without a zone, in the session''s TimeZone.';
comment on function outbox.any_time(date) is 'The beginning of a day, in the session''s TimeZone.';
create cast (timestamptz as outbox.any_time) without function as implicit;
create cast (timestamp as outbox.any_time) with function outbox.any_time(timestamp) as implicit;
create cast (date as outbox.any_time) with function outbox.any_time(date) as implicit;
create cast (text as outbox.any_time) with inout as implicit;
create cast (varchar as outbox.any_time) with inout as implicit;
create cast (bpchar as outbox.any_time) with inout as implicit;
create function outbox.refuse_time(value anyelement) returns outbox.any_time
    language plpgsql immutable set search_path = pg_catalog, pg_temp
    as $$
begin
    raise exception using errcode = 'datatype_mismatch', message = format('a value of type %s is not a point in time', pg_typeof(value)),
        detail = 'scheduled_at is the time before which the event is not sent.',
        hint = case when pg_typeof(value) = 'interval'::regtype then 'Add it to a time: now() + interval ''5 minutes''.'
            when pg_typeof(value) in ('time'::regtype, 'timetz'::regtype) then 'Pass a date and a time.'
            else 'Convert it: to_timestamp() takes seconds since 1970.' end;
end
$$;
comment on function outbox.refuse_time(anyelement) is 'Raises the error for a scheduled_at of outbox.publish_event that is no point in time.';
create cast (interval as outbox.any_time) with function outbox.refuse_time(anyelement) as implicit;
create cast (time as outbox.any_time) with function outbox.refuse_time(anyelement) as implicit;
create cast (timetz as outbox.any_time) with function outbox.refuse_time(anyelement) as implicit;
create cast (smallint as outbox.any_time) with function outbox.refuse_time(anyelement) as implicit;
create cast (integer as outbox.any_time) with function outbox.refuse_time(anyelement) as implicit;
create cast (bigint as outbox.any_time) with function outbox.refuse_time(anyelement) as implicit;
create cast (numeric as outbox.any_time) with function outbox.refuse_time(anyelement) as implicit;
create cast (real as outbox.any_time) with function outbox.refuse_time(anyelement) as implicit;
create cast (double precision as outbox.any_time) with function outbox.refuse_time(anyelement) as implicit;
