-- The table of django-broadcaster 0.1.1 in Postgres, as its migration makes it with Django 5.2 (tests/moving/move.py compares).
create table outbox_events (
    id uuid not null primary key,
    spec_version varchar(10) not null,
    event_type varchar(255) not null,
    source varchar(255) not null,
    subject varchar(255) not null,
    data_content_type varchar(100) not null,
    data_schema varchar(200) not null,
    data jsonb null,
    status varchar(20) not null,
    created_at timestamp with time zone not null,
    updated_at timestamp with time zone not null,
    scheduled_at timestamp with time zone not null,
    published_at timestamp with time zone null,
    retry_count integer not null check (retry_count >= 0),
    max_retries integer not null check (max_retries >= 0),
    last_error text not null,
    publisher_backend varchar(100) not null,
    publisher_config jsonb not null
);
