-- A worker is to come once this is committed, by whatever statement the extension was created.

create function outbox.announce_extension() returns void language c as 'MODULE_PATHNAME', 'announce_extension_wrapper';
select outbox.announce_extension();
drop function outbox.announce_extension();
