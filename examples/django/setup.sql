-- Besides ../setup.sql, as superuser: what Django's migrations, its admin and its tests need.
grant create on schema public to app;

-- The admin's own connection: it reads the views and publishes failed events again. The application's role can do neither.
create role operator login in role pg_monitor;
grant select on outbox.failed_events to operator;
grant execute on function outbox.retry_failed(text, text, uuid) to operator;

-- Test databases are made from a template, since CREATE EXTENSION needs a superuser. No event was ever published in it.
alter role app createdb;
create database app_template is_template true;
\connect app_template
create extension outbox_relay;
select outbox.grant_publisher('app');
grant create on schema public to app;
