-- Besides ../setup.sql, as superuser: a template for test databases, since CREATE EXTENSION needs a superuser. Nothing
-- was ever published in it, so what is made from it is no copy. Its events go to a stream of tests.
alter role app createdb;
create database app_template is_template true;
\connect app_template
create extension outbox_relay;
update outbox.backends set stream_name = 'test_events';
select outbox.grant_publisher('app');
-- For tests that wait until everything is sent.
grant execute on function outbox.drain(interval) to app;
create table orders (id bigint generated always as identity primary key, customer text not null);
grant select, insert on orders to app;
