-- A role for the exporter, which reads outbox.metrics and outbox.health(), and no payload. For each server once:
--
--   psql -d postgres -f contrib/monitoring/role.sql
--   psql -d postgres -c '\password outbox_monitor'

create role outbox_monitor login connection limit 5;
grant pg_monitor to outbox_monitor;
-- An exporter must neither wait for long behind somebody's lock, nor ask without end.
alter role outbox_monitor set lock_timeout = '2s';
alter role outbox_monitor set statement_timeout = '10s';
