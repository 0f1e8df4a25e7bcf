"""Reads the entries of a stream as CloudEvents, with the SDK from PyPI. Prints each, and ends."""

import os

import redis
from cloudevents.core.formats.json import JSONFormat

stream = redis.Redis.from_url(os.environ["REDIS_URL"], decode_responses=True)
for entry_id, entry in stream.xrange("events"):
    event = JSONFormat().read(None, entry["cloud_event"])  # it validates the attributes
    assert (event.get_id(), event.get_type()) == (entry["event_id"], entry["event_type"])
    time = event.get_time().isoformat()
    print(event.get_type(), event.get_id(), event.get_source(), time, event.get_subject(), event.get_data())
