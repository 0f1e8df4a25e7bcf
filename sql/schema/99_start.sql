-- A worker has to be started when this is committed, whichever statement has created the extension.

create function outbox.announce_extension() returns void language c as 'MODULE_PATHNAME', 'announce_extension_wrapper';
select outbox.announce_extension();
drop function outbox.announce_extension();
