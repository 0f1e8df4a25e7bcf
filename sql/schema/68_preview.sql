-- Shows one event as it is sent. It reveals the payload, so EXECUTE is granted to nobody.

create function outbox.preview(event_id uuid) returns text[]
    language c volatile strict
    as 'MODULE_PATHNAME', 'preview';
comment on function outbox.preview(uuid) is 'The words of the XADD that appends an event, as it and its backend are now: the command, the stream, MAXLEN ~ and the length if the backend trims, *, then fields and values. Made by the encoder that sends. Of an event that goes to several streams, those of its first row that is here. NULL: there is no such event, or it is not kept any more. Of a batch, only some entries trim.';

create function outbox.preview(event_id uuid, backend text, stream text default null) returns text[]
    language c volatile
    as 'MODULE_PATHNAME', 'preview_of_backend';
comment on function outbox.preview(uuid, text, text) is 'The same of an event that routes send to several streams: of its row for this backend, and for this stream of it. NULL means any. NULL is returned, too, if the event does not go there.';
