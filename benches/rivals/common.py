"""Code that the rivals share: connections to the bench's servers, and the entry that each rival appends."""

import os

import psycopg
import redis

STREAM = "events"
BATCH = 1000
# The pause between two queries while no event is there.
PAUSE_S = 0.005


def connect():
    # Host, port, user and database come from the environment. A crash may lose the last commits of a rival, which then
    # sends those events again.
    return psycopg.connect("options='-c synchronous_commit=off'")


def redis_client():
    return redis.Redis(port=int(os.environ["REDIS_PORT"]))


def append(client, events):
    """Appends (id, type, source, created_at, data as JSON text) to the stream, in one pipeline."""
    pipe = client.pipeline(transaction=False)
    for event_id, event_type, source, created_at, data in events:
        time = created_at.isoformat()
        cloud_event = (
            f'{{"specversion": "1.0", "type": "{event_type}", "source": "{source}", "id": "{event_id}", '
            f'"time": "{time}", "datacontenttype": "application/json", "data": {data}}}'
        )
        fields = {
            "event_id": str(event_id),
            "event_type": event_type,
            "source": source,
            "timestamp": time,
            "cloud_event": cloud_event,
        }
        pipe.xadd(STREAM, fields, maxlen=10000, approximate=True)
    pipe.execute()
