-- Routes: where events go that name no backend.

create table outbox.routes (
    event_type text check (event_type <> '' and length(replace(event_type, '*', '')) <= 255),
    source     text check (source <> '' and length(replace(source, '*', '')) <= 255),
    backend    text not null references outbox.backends (name) on update cascade,
    stream     text check (stream <> '' and length(stream) <= 1024 and not starts_with(stream, 'outbox_relay:')),
    enabled    boolean not null default true,
    number     integer generated always as identity primary key,
    constraint routes_once unique nulls not distinct (event_type, source, backend, stream)
);
comment on table outbox.routes is 'Where events go that name no backend: to the backend of each route that matches, with a row of outbox.events for each, under the same event_id. If no route matches, they go to outbox_relay.default_backend. A change takes effect at once, for events that are published from then on.';
comment on column outbox.routes.event_type is 'Pattern (* and ?) that the event''s type must match. NULL: any.';
comment on column outbox.routes.source is 'Pattern (* and ?) that the event''s source must match. NULL: any.';
comment on column outbox.routes.backend is 'Name of the backend. It follows when the backend is renamed; a backend that a route names cannot be deleted.';
comment on column outbox.routes.stream is 'The stream of that backend, or a template as in stream_name of outbox.backends. It overrides the stream that the event names. NULL: the stream that the event names, otherwise the backend''s own. Routes to the same stream of the same backend give only one row.';
comment on column outbox.routes.enabled is 'False: the route is ignored.';
comment on column outbox.routes.number is 'An event''s rows are in the order of the routes'' numbers.';

create function outbox.check_route() returns trigger
    language c
    as 'MODULE_PATHNAME', 'check_route';
comment on function outbox.check_route() is 'Trigger of outbox.routes: refuses a stream that is not a valid template (23514).';

create function outbox.matches(name text, pattern text) returns boolean
    language c immutable strict parallel safe
    as 'MODULE_PATHNAME', 'matches';
comment on function outbox.matches(text, text) is 'Whether a name matches a pattern as in allowed_streams and outbox.routes: * stands for any text, ? for one character.';

create function outbox.route_health(out "check" text, out status text, out detail text, out hint text) returns setof record
    language plpgsql volatile set search_path = pg_catalog, pg_temp
    as $$
#variable_conflict use_column
begin
    return query
with
r as (
    select r.*, b.number as backend_number, b.enabled as is_sending, b.allowed_streams,
        format('Route %s (%s from %s)', r.number, coalesce(format('%L', r.event_type), 'any type'), coalesce(format('%L', r.source), 'any source')) as words
    from outbox.routes r join outbox.backends b on b.name = r.backend
    where r.enabled
),
faults(fault, cure) as (
    select format('%s leads to backend "%s", which is paused: its events wait there.', r.words, r.backend),
        format('Run UPDATE outbox.backends SET enabled = true WHERE name = %L; or disable the route: UPDATE outbox.routes SET enabled = false WHERE number = %s;', r.backend, r.number)
    from r where not r.is_sending
    union all
    select format('%s leads to backend "%s", which is %s.', r.words, r.backend, c.state), format('See the check "backend %s".', r.backend)
    from r join outbox.cursors c on c.backend_number = r.backend_number
    where r.is_sending and c.state in ('misconfigured', 'fenced', 'copy', 'full')
    group by r.words, r.backend, c.state
    union all
    -- All events that match such a route are refused.
    select format('%s leads to the stream "%s", which backend "%s" does not allow: events that match it are refused.', r.words, r.stream, r.backend),
        format('Extend allowed_streams of the backend, or change the route: UPDATE outbox.routes SET stream = ... WHERE number = %s;', r.number)
    from r where r.stream is not null and r.stream !~ '[{}]' and not exists (select from unnest(r.allowed_streams) a (pattern) where outbox.matches(r.stream, a.pattern))
    union all
    select format('%s has the character %% in a pattern, where it has no special meaning.', r.words),
        format('The wildcards are * and ?: UPDATE outbox.routes SET event_type = ... WHERE number = %s;', r.number)
    from r where strpos(concat(r.event_type, r.source), '%') > 0
    union all
    select format('%s has a pattern that begins or ends with a space: it matches only names that do the same.', r.words),
        format('If that is not intended, run UPDATE outbox.routes SET event_type = btrim(event_type), source = btrim(source) WHERE number = %s;', r.number)
    from r where r.event_type <> btrim(r.event_type) or r.source <> btrim(r.source)
)
select 'routes', case when count(f.fault) > 0 then 'warn' else 'ok' end,
    coalesce(string_agg(f.fault, ' ' order by f.fault), case (select count(*) from r)
        when 0 then 'There are none: events that name no backend go to outbox_relay.default_backend.'
        else format('%s routes are in use.', (select count(*) from r)) end),
    string_agg(distinct f.cure, ' ')
from faults f;
end
$$;
comment on function outbox.route_health() is 'Part of outbox.health(): whether events can go where outbox.routes send them.';
