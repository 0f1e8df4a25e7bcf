-- Limits of publishers: see outbox.grant_publisher().

-- Roles are stored by oid, which follows a rename, and dumped by name. Input of a role that does not exist is no error:
-- that would end the restore of all limits, while the grants to the roles that do exist are restored.
create type outbox.role_name;
create function outbox.role_name_in(cstring) returns outbox.role_name language c stable strict parallel safe as 'MODULE_PATHNAME', 'role_name_in';
create function outbox.role_name_out(outbox.role_name) returns cstring language internal stable strict parallel safe as 'regroleout';
create type outbox.role_name (input = outbox.role_name_in, output = outbox.role_name_out, like = oid);
comment on type outbox.role_name is 'A role, shown by its present name. A name that no role has is read as none (0), with a WARNING.';
comment on function outbox.role_name_in(cstring) is 'Input of type outbox.role_name. It takes names alone: the number of a role that was dropped may be another role''s elsewhere.';
comment on function outbox.role_name_out(outbox.role_name) is 'Output of type outbox.role_name, which is that of regrole.';
create cast (outbox.role_name as oid) without function as implicit;
create cast (oid as outbox.role_name) without function as assignment;

create table outbox.publisher_limits (
    role     outbox.role_name primary key,
    backends text[] check (array_position(backends, null) is null),
    streams  text[] check (array_position(streams, null) is null),
    constraint publisher_limits_limit check (num_nonnulls(backends, streams) > 0)
);
comment on table outbox.publisher_limits is 'Roles whose events are limited to some backends and streams, by outbox.grant_publisher(). Limits bind the members of a role too, as far as they have the right to publish from limited roles alone; they never bind superusers.';
comment on column outbox.publisher_limits.backends is 'Glob patterns (* and ?) one of which must match the name of an event''s backend. NULL: any backend.';
comment on column outbox.publisher_limits.streams is 'Glob patterns (* and ?) one of which must match an event''s stream, also if that is the backend''s own. NULL: any stream that the backend allows.';

create function outbox.leave_out_role() returns trigger
    language plpgsql set search_path = pg_catalog, pg_temp
    as $$
begin
    return null;
end
$$;
comment on function outbox.leave_out_role() is 'Trigger of outbox.publisher_limits and outbox.consumer_grants: leaves out the row of a role that does not exist, as a dump may bring it.';
