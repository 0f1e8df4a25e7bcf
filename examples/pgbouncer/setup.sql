-- Besides ../setup.sql, as superuser: a second backend, of the same Redis.
insert into outbox.backends (name, stream_name) values ('archive', 'archived_events');
