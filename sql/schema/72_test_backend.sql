-- Acting: tests whether the worker can use a backend.

create function outbox.ask_worker(backend_number integer, limit_ms integer) returns text[]
    language c volatile strict
    as 'MODULE_PATHNAME', 'ask_worker';
comment on function outbox.ask_worker(integer, integer) is 'Part of outbox.test_backend(): latency in microseconds, server, version, role, address and error, each empty if there is none.';

create function outbox.test_backend(name text, out ok boolean, out latency interval, out server text, out version text, out role text,
        out address text, out error text) returns record
    language plpgsql volatile security definer set search_path = pg_catalog, pg_temp
    as $$
declare
    b outbox.backends := outbox.expect_backend(name);
    step interval := coalesce(b.connect_timeout, current_setting('outbox_relay.redis_connect_timeout', true)::interval, '5 s') * 3
        + coalesce(b.socket_timeout, current_setting('outbox_relay.redis_socket_timeout', true)::interval, '5 s') * 2;
    answer text[];
begin
    -- The limit is what all steps may take, at each node.
    answer := outbox.ask_worker(b.number, least(300000, 2000 + extract(epoch from step) * 1000 * (1 + coalesce(cardinality(b.nodes), 0)))::integer);
    ok := answer[6] = '';
    latency := nullif(answer[1], '')::bigint * interval '1 microsecond';
    server := nullif(answer[2], '');
    version := nullif(answer[3], '');
    role := nullif(answer[4], '');
    address := nullif(answer[5], '');
    error := nullif(answer[6], '');
    raise log using message = format('backend "%s" was tested: %s', regexp_replace(name, '[[:cntrl:]]', ' ', 'g'), coalesce(error, 'it works'));
end
$$;
comment on function outbox.test_backend(text) is 'Has the worker log in to a backend''s Redis once more, by its saved settings, beside what it is doing, and says whether all that sending needs works: resolve, connect, TLS, AUTH, SELECT, PING, ROLE, and with exactly_once the rights on guard and stream. error begins with the step that failed. Nothing is written to Redis, and no password is shown. Also for a backend that is paused, misconfigured or fenced. Takes as long as its time-outs allow.';
