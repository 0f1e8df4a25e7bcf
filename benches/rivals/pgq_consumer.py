"""PgQ with a consumer that appends each batch in one pipeline.

It calls the ticker itself: one tick a second would determine the latency. It does so even if no event seems to be there,
because PgQ counts an event when it is inserted: an event that commits after the tick that counted it causes no further tick.
"""

import sys
import time
import uuid

from common import PAUSE_S, append, connect, redis_client

SETUP = """
create extension pgq;
select pgq.create_queue('outbox');
select pgq.set_queue_config('outbox', 'ticker_max_lag', '1 millisecond');
select pgq.set_queue_config('outbox', 'ticker_idle_period', '1 millisecond');
select pgq.set_queue_config('outbox', 'ticker_max_count', '1000');
select pgq.register_consumer('outbox', 'redis');
"""
EVENTS = "select ev_id, ev_time, ev_type, ev_data from pgq.get_batch_events(%s)"


def relay():
    client, connection = redis_client(), connect()
    connection.autocommit = True
    cursor = connection.cursor()
    while True:
        (batch,) = cursor.execute("select pgq.next_batch('outbox', 'redis')", prepare=True).fetchone()
        if batch is None:
            cursor.execute("select pgq.ticker('outbox')", prepare=True)
            (batch,) = cursor.execute("select pgq.next_batch('outbox', 'redis')", prepare=True).fetchone()
        if batch is None:
            time.sleep(PAUSE_S)
            continue
        rows = cursor.execute(EVENTS, (batch,), prepare=True).fetchall()
        if rows:
            append(client, ((uuid.UUID(int=ev_id), ev_type, "bench", at, data) for ev_id, at, ev_type, data in rows))
        cursor.execute("select pgq.finish_batch(%s)", (batch,), prepare=True)


if sys.argv[1] == "setup":
    with connect() as connection:
        connection.execute(SETUP)
else:
    relay()
