-- A role for the exporter: it can read outbox.metrics and outbox.health(), and no payload. Run once for each server:
--
--   psql -d postgres -f contrib/monitoring/role.sql
--   psql -d postgres -c '\password outbox_monitor'

create role outbox_monitor login connection limit 5;
grant pg_monitor to outbox_monitor;
-- An exporter must not wait for long behind a lock of another session, and its queries must end.
alter role outbox_monitor set lock_timeout = '2s';
alter role outbox_monitor set statement_timeout = '10s';
