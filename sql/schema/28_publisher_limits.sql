-- Limits of publishers: see outbox.grant_publisher().

-- Roles are stored by OID, which survives a rename, and dumped by name. The input of a role that does not exist is not
-- an error: that would stop the restore of all limits, although the grants to existing roles are restored.
create type outbox.role_name;
create function outbox.role_name_in(cstring) returns outbox.role_name language c stable strict parallel safe as 'MODULE_PATHNAME', 'role_name_in';
create function outbox.role_name_out(outbox.role_name) returns cstring language internal stable strict parallel safe as 'regroleout';
create type outbox.role_name (input = outbox.role_name_in, output = outbox.role_name_out, like = oid);
comment on type outbox.role_name is 'A role, shown by its present name. The name of a role that does not exist is read as 0, with a WARNING.';
comment on function outbox.role_name_in(cstring) is 'Input of type outbox.role_name. It accepts only names, because the number of a dropped role may belong to another role on another server.';
comment on function outbox.role_name_out(outbox.role_name) is 'Output of type outbox.role_name, the same as that of regrole.';
create cast (outbox.role_name as oid) without function as implicit;
create cast (oid as outbox.role_name) without function as assignment;

create table outbox.publisher_limits (
    role     outbox.role_name primary key,
    backends text[] check (array_position(backends, null) is null),
    streams  text[] check (array_position(streams, null) is null),
    constraint publisher_limits_limit check (num_nonnulls(backends, streams) > 0)
);
comment on table outbox.publisher_limits is 'Roles that outbox.grant_publisher() has limited to some backends and streams. A member of such a role is limited too, if it has the right to publish only through limited roles. Superusers are never limited.';
comment on column outbox.publisher_limits.backends is 'Glob patterns (* and ?). The name of an event''s backend must match one of them. NULL: any backend.';
comment on column outbox.publisher_limits.streams is 'Glob patterns (* and ?). An event''s stream must match one of them, even if it is the backend''s own. NULL: any stream that the backend allows.';

create function outbox.leave_out_role() returns trigger
    language plpgsql set search_path = pg_catalog, pg_temp
    as $$
begin
    return null;
end
$$;
comment on function outbox.leave_out_role() is 'Trigger of outbox.publisher_limits and outbox.consumer_grants: leaves out a row, for example from a dump, whose role does not exist.';
