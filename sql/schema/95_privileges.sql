-- Privileges: PUBLIC has none, pg_monitor may read the views.

revoke all on schema outbox from public;
revoke all on all tables in schema outbox from public;
revoke all on all functions in schema outbox from public;
revoke all on all procedures in schema outbox from public;
revoke all on type outbox.any_text, outbox.any_value, outbox.any_number, outbox.any_subject, outbox.any_time, outbox.event_ids, outbox.written_id, outbox.role_name from public;
grant usage on schema outbox to pg_monitor;
grant select on outbox.attached_tables, outbox.status, outbox.backend_status, outbox.event_status, outbox.top, outbox.metrics, outbox.consumers to pg_monitor;
grant execute on function outbox.worker_status(), outbox.launcher_pid(), outbox.meters(), outbox.short_count(bigint), outbox.short_time(double precision), outbox.short_text(text, integer), outbox.backlog(integer), outbox.is_delivered(outbox.cursors, xid8, bigint), outbox.hash_slot(text), outbox.common_stream(), outbox.stream_part(text, integer), outbox.health(interval), outbox.drain(interval), outbox.wait_published(uuid, interval), outbox.want_consumers(), outbox.probe_consumers() to pg_monitor;
