\echo Use "create extension outbox_relay" to load this file. \quit

-- The public interface of outbox_relay, in schema outbox. Functions in LANGUAGE c are in src/. The Makefile joins the
-- parts in sql/schema/ in the order of their numbers; each part may use only what earlier parts have created.

set local search_path = pg_catalog, pg_temp;
-- How definitions are read, and how Postgres writes those that outbox.health() compares with.
set local standard_conforming_strings = on;
set local quote_all_identifiers = off;

-- An existing schema is dangerous: its owner could create functions beside ours, and existing functions could be called
-- instead of ours.
do $$
declare
    n pg_catalog.pg_namespace;
begin
    select * into strict n from pg_catalog.pg_namespace s where s.nspname = 'outbox';
    if exists (select from pg_catalog.aclexplode(n.nspacl) a where a.privilege_type = 'CREATE' and a.grantee <> n.nspowner) then
        raise exception using errcode = 'object_not_in_prerequisite_state',
            message = 'schema "outbox" exists, and roles other than its owner may create objects in it',
            detail = 'They could create functions that are then called instead of the extension''s own.',
            hint = 'Drop that schema: the extension creates its own. Or revoke CREATE on it from all others.';
    end if;
    if not (select r.rolsuper from pg_catalog.pg_roles r where r.oid = n.nspowner)
        or exists (select from pg_catalog.pg_depend d
            where d.refclassid = 'pg_catalog.pg_namespace'::regclass and d.refobjid = n.oid
                and d.classid <> 'pg_catalog.pg_extension'::regclass) then
        raise exception using errcode = 'object_not_in_prerequisite_state',
            message = 'schema "outbox" exists, but is not empty or not owned by a superuser',
            detail = format('It belongs to "%s".', pg_get_userbyid(n.nspowner)),
            hint = 'Drop or rename that schema: the extension creates its own.';
    end if;
end
$$;
