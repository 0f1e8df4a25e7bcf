"""Consumes with redis-py, as one of many workers of a group: each event has its effect once, even if workers die."""

import json
import os
import signal

import psycopg
import redis

STREAM, GROUP, ME = "events", "billing", os.environ.get("WORKER", "worker-1")
MIN_IDLE_MS = int(os.environ.get("MIN_IDLE_MS", 60_000))  # longer than handling one entry takes
MOST_DELIVERIES = int(os.environ.get("MOST_DELIVERIES", 10))

stream = redis.Redis.from_url(os.environ["REDIS_URL"], decode_responses=True)
db = psycopg.connect(autocommit=True)
has_claim = tuple(int(part) for part in stream.info("server")["redis_version"].split(".")[:2]) >= (8, 4)


def handle(entry_id, event):
    with db.transaction():
        # In the transaction of the effects: a second delivery of the same event finds it recorded.
        note = "insert into handled (consumer, event_id) values (%s, %s) on conflict do nothing"
        if db.execute(note, [GROUP, event["event_id"]]).rowcount == 1:
            cloud_event = json.loads(event["cloud_event"])
            db.execute("insert into effects (consumer, event_type) values (%s, %s)", [GROUP, cloud_event["type"]])
    stream.xack(STREAM, GROUP, entry_id)


def entries():
    """Entries that other workers have left for a while, and new ones."""
    if has_claim:
        options = {"claim_min_idle_time": MIN_IDLE_MS}
        left = []
    else:
        options = {}
        left = stream.xautoclaim(STREAM, GROUP, ME, min_idle_time=MIN_IDLE_MS, count=100)[1]
    new = stream.xreadgroup(GROUP, ME, {STREAM: ">"}, count=100, block=1000, **options)
    return left + (new[0][1] if new else [])


def put_aside_what_always_fails():
    for entry in stream.xpending_range(STREAM, GROUP, min="-", max="+", count=100, idle=MIN_IDLE_MS):
        if entry["times_delivered"] >= MOST_DELIVERIES:
            for entry_id, event in stream.xrange(STREAM, entry["message_id"], entry["message_id"]):
                stream.xadd(f"{STREAM}:{GROUP}:dead", event)
            stream.xack(STREAM, GROUP, entry["message_id"])


try:
    stream.xgroup_create(STREAM, GROUP, id="0", mkstream=True)
except redis.ResponseError as error:
    if not str(error).startswith("BUSYGROUP"):  # the group exists already
        raise

running = True


def stop(*_):
    global running
    running = False


signal.signal(signal.SIGTERM, stop)
while running:
    put_aside_what_always_fails()
    for entry_id, event, *_ in entries():
        if event is None:  # trimmed meanwhile
            continue
        try:
            handle(entry_id, event)
        except Exception as error:  # the entry stays pending, and is delivered again after MIN_IDLE_MS
            print(f"{event['event_id']} failed: {error}")
