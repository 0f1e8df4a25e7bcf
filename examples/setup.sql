-- What an administrator runs once, as superuser, in the database of the examples: the extension, the application's role
-- with the right to publish and no other right in schema outbox, and a table of the application.
create extension if not exists outbox_relay;
create role app login;
select outbox.grant_publisher('app');
create table orders (
    id       bigint generated always as identity primary key,
    customer text not null,
    total    numeric(10, 2) not null
);
grant select, insert on orders to app;

-- The events that consumers have handled, and their effects. These tables may be in a consumer's own database.
create table handled (consumer text, event_id uuid, primary key (consumer, event_id));
create table effects (consumer text not null, event_type text not null);
grant select, insert on handled, effects to app;
