-- Run once, when the data directory is made.
create extension outbox_relay;
