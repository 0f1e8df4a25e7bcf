-- Acting on published events: append them again.

create function outbox.replay_events(backend_number integer, since timestamptz, until timestamptz, event_type text) returns bigint
    language c volatile
    as 'MODULE_PATHNAME', 'replay_events_wrapper';
comment on function outbox.replay_events(integer, timestamptz, timestamptz, text) is 'Part of outbox.replay(): gives the published events of a backend new numbers, so that they are sent again.';

create function outbox.replay(backend text, since timestamptz, until timestamptz default null, event_type text default null) returns bigint
    language plpgsql volatile security definer set search_path = pg_catalog, pg_temp
    as $$
declare
    b outbox.backends := outbox.expect_backend(backend);
    replayed bigint;
begin
    if since is null then
        raise exception using errcode = 'null_value_not_allowed', message = 'since must not be null',
            hint = 'Pass the time from which on events were published, or ''-infinity'' for all retained events.';
    end if;
    if until <= since then
        raise exception using errcode = 'invalid_parameter_value', message = 'until must be later than since',
            detail = format('since is %s, until is %s.', since, until),
            hint = 'This replays events that were published at "since" or later, and before "until".';
    end if;
    perform outbox.silence_triggers();
    delete from outbox.replays r
        where not exists (select from outbox.events e where e.xid = r.xid and e.seq between r.first_seq and r.last_seq);
    replayed := outbox.replay_events(b.number, greatest(since, '0001-01-01'), least(coalesce(until, 'infinity'), '9999-12-31'), event_type);
    if replayed > 0 then
        raise log using message = format('%s published events of backend "%s" are appended again', replayed, regexp_replace(b.name, '[[:cntrl:]]', ' ', 'g')),
            detail = format('They were published from %s %s.', since, coalesce('to before ' || until, 'on'))
                || case when event_type is null then '' else format(' Their type is "%s".', event_type) end;
    end if;
    return replayed;
end
$$;
comment on function outbox.replay(text, timestamptz, timestamptz, text) is 'Appends published events of a backend again, in their order, with the same event_id and time: those that were published from "since" on and before "until" (NULL: up to now), as far as they are kept; of one event_type, if it is given. Returns how many. Events that wait to be sent, are scheduled or have failed are left out.';
