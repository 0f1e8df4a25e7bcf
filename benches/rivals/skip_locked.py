"""A tuned loop of one's own: FOR UPDATE SKIP LOCKED, batches of 1,000 in one pipeline, events are deleted when they are sent."""

import sys
import time

from common import BATCH, PAUSE_S, append, connect, redis_client

SETUP = """
create table hand_outbox (
    id bigint generated always as identity primary key,
    event_id uuid not null default gen_random_uuid(),
    event_type text not null,
    source text not null,
    created_at timestamptz not null default clock_timestamp(),
    data json
)
"""
TAKE = """
with batch as (select id from hand_outbox order by id limit %s for update skip locked)
delete from hand_outbox h using batch where h.id = batch.id
returning h.id, h.event_id, h.event_type, h.source, h.created_at, h.data::text
"""


def relay():
    client, connection = redis_client(), connect()
    cursor = connection.cursor(binary=True)
    while True:
        cursor.execute(TAKE, (BATCH,), prepare=True)
        rows = sorted(cursor.fetchall())
        if rows:
            append(client, (row[1:] for row in rows))
        connection.commit()
        if not rows:
            time.sleep(PAUSE_S)


if sys.argv[1] == "setup":
    with connect() as connection:
        connection.execute(SETUP)
else:
    relay()
