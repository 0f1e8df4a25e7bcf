"""Consumes with FastStream: one subscriber for new entries, one for entries that others have left; each event has its effect once."""

import asyncio
import os
from typing import Any
from uuid import UUID

import psycopg
from faststream import AckPolicy, FastStream
from faststream.redis import RedisBroker, StreamSub
from pydantic import BaseModel, Json
from redis import ResponseError
from redis.asyncio import Redis

STREAM, GROUP, ME = "events", "search", os.environ.get("WORKER", "worker-1")
MIN_IDLE_MS = int(os.environ.get("MIN_IDLE_MS", 60_000))  # longer than handling one entry takes


class CloudEvent(BaseModel):
    type: str
    source: str
    id: UUID
    subject: str | None = None
    data: Any = None


class Entry(BaseModel):
    """An entry of format `broadcaster`."""

    event_id: UUID
    cloud_event: Json[CloudEvent]


broker = RedisBroker(os.environ["REDIS_URL"])
app = FastStream(broker)


# A handler that raises does not acknowledge: the entry stays pending, and the second subscriber gets it.
@broker.subscriber(stream=StreamSub(STREAM, group=GROUP, consumer=ME), ack_policy=AckPolicy.NACK_ON_ERROR)
@broker.subscriber(
    stream=StreamSub(STREAM, group=GROUP, consumer=ME, min_idle_time=MIN_IDLE_MS, polling_interval=1000),
    ack_policy=AckPolicy.NACK_ON_ERROR,
)
async def handle(entry: Entry):
    async with await psycopg.AsyncConnection.connect() as db:  # one transaction; an application would have a pool
        # In the transaction of the effects: a second delivery of the same event finds it recorded.
        note = "insert into handled (consumer, event_id) values (%s, %s) on conflict do nothing"
        if (await db.execute(note, [GROUP, entry.event_id])).rowcount == 1:
            effect = "insert into effects (consumer, event_type) values (%s, %s)"
            await db.execute(effect, [GROUP, entry.cloud_event.type])


@app.on_startup
async def create_group():
    """FastStream would create the group at the stream's end, and miss what was there before."""
    async with Redis.from_url(os.environ["REDIS_URL"]) as redis:
        try:
            await redis.xgroup_create(STREAM, GROUP, id="0", mkstream=True)
        except ResponseError as error:
            if not str(error).startswith("BUSYGROUP"):  # the group exists already
                raise


asyncio.run(app.run())
