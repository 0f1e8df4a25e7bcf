-- Looking at one event as it is sent. It shows the payload, so that EXECUTE is granted to nobody.

create function outbox.preview(event_id uuid) returns text[]
    language c volatile strict
    as 'MODULE_PATHNAME', 'preview';
comment on function outbox.preview(uuid) is 'The words of the XADD that appends an event, as it and its backend are now: the command, the stream, MAXLEN ~ and the length if the backend trims, *, then fields and values. Made by the encoder that sends. Of an event that goes to several streams, those of its first row that is here. NULL: there is no such event, or it is not kept any more. Of a batch, only some entries trim.';
