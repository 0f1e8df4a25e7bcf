-- Events, and tables of events in other states: scheduled, refused, failed.

-- The planner replaces a call of first_branch() by 0, and loads the library for that. So also on a server that has not
-- preloaded the library, a session has it when it plans its first INSERT: see src/publish/planning.rs.
create function outbox.plan_first_branch(internal) returns internal
    language c strict
    as 'MODULE_PATHNAME', 'plan_first_branch';
comment on function outbox.plan_first_branch(internal) is 'Support function of outbox.first_branch().';
create function outbox.first_branch() returns smallint
    language sql stable parallel safe support outbox.plan_first_branch set search_path = pg_catalog, pg_temp
    as 'select 0::smallint';
comment on function outbox.first_branch() is 'The branch of an event''s first row, 0. As the default of a column it makes the planner load the library.';

-- Columns of fixed width come first, because the worker deforms each row once to send it. The trigger fills in seq, xid
-- and backend_number.
create sequence outbox.events_seq_seq as bigint cache 1;
create table outbox.events (
    seq              bigint not null,
    xid              xid8 not null,
    created_at       timestamptz not null,
    event_id         uuid not null,
    backend_number   integer not null,
    published_by     oid,
    branch           smallint not null default outbox.first_branch(),
    event_type       text not null,
    source           text not null,
    backend          text not null,
    data             json,
    subject          text,
    stream           text,
    data_schema      text,
    publisher_config json,
    max_retries      integer
) with (
    -- Rows are inserted at one end and, much later, deleted in order at the other; they are never updated. A vacuum
    -- after a twentieth of the table was deleted keeps its size steady; for inserts, freezing is enough.
    autovacuum_vacuum_scale_factor = 0.05,
    autovacuum_vacuum_insert_scale_factor = 0.2,
    autovacuum_analyze_scale_factor = 0.2
);
alter sequence outbox.events_seq_seq owned by outbox.events.seq;
-- The index includes the backend's number, so that a reader can skip rows of other backends without reading them.
alter table outbox.events add primary key (seq) include (backend_number);
-- An event that routes send to several streams has a row for each of them. The first row has branch 0, so this index
-- refuses a repeated id.
create unique index events_event_id_idx on outbox.events (event_id, branch);
-- Likewise: of a transaction with a million rows for one backend.
create index events_xid_idx on outbox.events (xid, seq) include (backend_number);
-- For outbox.event_status: the latest events, and those of a period.
create index events_created_at_idx on outbox.events (created_at);

comment on table outbox.events is 'The outbox: one row for each event, kept until its retention ends. Rows are never updated; outbox.cursors shows which were delivered.';
comment on sequence outbox.events_seq_seq is 'Draws the numbers of events, in publishing order. If it is set back, numbering continues above the highest number that was drawn. If its type, INCREMENT, CACHE or CYCLE is changed, publishing is refused.';
comment on column outbox.events.seq is 'The event''s place in publishing order. The trigger draws it, after xid.';
comment on column outbox.events.xid is 'The transaction that published the event. The trigger fills it in.';
comment on column outbox.events.backend_number is 'Number of the backend. The trigger looks it up by the backend''s name.';
comment on column outbox.events.published_by is 'The role that published the event and may wait for it: see outbox.wait_published(). NULL: the event came from another server or cluster.';
comment on column outbox.events.branch is 'Which of the event''s rows this is: 0 for the first, higher numbers for the rows that outbox.routes have added, one for each further stream. Omit it in an INSERT.';
comment on column outbox.events.backend is 'Name of the backend when the event was published. NULL or an empty text in an INSERT: outbox.routes decide, otherwise outbox_relay.default_backend.';
comment on column outbox.events.data is 'The payload, as JSON text. Binary payloads are stored as outbox.binary_data() returns them.';
comment on column outbox.events.stream is 'The stream of the entry; if the backend''s stream_name is a template, the stream that it gives. NULL means the backend''s own stream at the time of sending.';
comment on column outbox.events.max_retries is 'Total number of attempts if Redis refuses the event, at most 1000. NULL means outbox_relay.max_retries at the time of sending.';
comment on column outbox.events.publisher_config is 'Further fields of the stream entry: a flat JSON object.';

create table outbox.scheduled_events (
    like outbox.events,
    scheduled_at timestamptz not null,
    primary key (event_id, branch)
);
alter table outbox.scheduled_events alter column branch set default outbox.first_branch();
create index scheduled_events_due_idx on outbox.scheduled_events (scheduled_at, seq);
comment on table outbox.scheduled_events is 'Events that are not due yet. The worker moves them to outbox.events when they are due, in the order of scheduled_at and seq.';
comment on column outbox.scheduled_events.xid is 'The transaction that scheduled the event. 0 means that a dump brought it when it was overdue: it may have been sent already, so the worker looks for it first.';

create table outbox.refused_events (
    seq            bigint primary key,
    backend_number integer not null,
    attempts       integer not null,
    last_error     text not null,
    accepted_in    bigint,
    stream         text
);
-- A query for one stream must not use the first index, whatever the planner knows of a table that has just grown. So
-- that index can only be used with the condition seq > 0, which always holds.
create index refused_events_backend_idx on outbox.refused_events (backend_number, seq) where accepted_in is null and seq > 0;
-- For the highest number of each backend. An expression, for the same reason as above.
create index refused_events_number_idx on outbox.refused_events ((backend_number::bigint), seq);
create index refused_events_stream_idx on outbox.refused_events (backend_number, stream, seq) where accepted_in is null;
comment on table outbox.refused_events is 'Events of outbox.events that Redis refused and that are being tried again, and those behind them in the same stream.';
comment on column outbox.refused_events.accepted_in is 'Number of the batch in which Redis accepted the event late. If Redis loses that batch, the event waits again. NULL: it waits now.';
comment on column outbox.refused_events.stream is 'The stream that the event names. NULL means its backend''s own.';

create table outbox.failed_events (
    like outbox.events,
    attempts   integer not null,
    last_error text not null,
    failed_at  timestamptz not null default clock_timestamp(),
    -- An event_id may be used again when its first event is no longer in outbox.events: failed events of both are kept.
    primary key (event_id, seq)
);
alter table outbox.failed_events alter column branch set default 0;
create index failed_events_failed_at_idx on outbox.failed_events (failed_at);
create index failed_events_seq_idx on outbox.failed_events (seq, event_id);
create index failed_events_backend_idx on outbox.failed_events (backend_number, seq);
comment on table outbox.failed_events is 'Events that Redis refused max_retries times, or whose backend was deleted. They are kept for outbox_relay.failed_retention. See outbox.retry_failed().';
