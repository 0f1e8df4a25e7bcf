"""Records what django-broadcaster 0.1.1 writes to a Redis stream, so that tests/e2e/broadcaster.rs can compare.

`make record-broadcaster` runs this with the real package from PyPI. Each event takes the package's own way: it is created
by OutboxPublisher.publish_event(), stored in a database, and sent by process_pending_events() to a real Redis. Ids and
times are set in the database before the event is sent, so that a new recording differs only where the package does.

Two kinds of events are not recorded, because the extension differs on purpose: a time of a whole second (isoformat()
omits its microseconds, the extension never does), and a publisher_config that names a built-in field or has a boolean
(the package overwrites it or fails, the extension refuses it).
"""

import json
import pathlib
import socket
import subprocess
import tempfile
import time
import uuid
from datetime import datetime, timedelta, timezone

import django
import redis
from django.conf import settings
from django.core.management import call_command

STREAM = "events"
RESULT = pathlib.Path(__file__).with_name("recorded.json")

EVENTS = [
    {"event_type": "user.created", "source": "user-service", "data": {"user_id": 123}},
    {"event_type": "user.renamed", "source": "user-service", "data": {"z": 1, "a": {"y": [1, 2], "b": None}}, "subject": "user/123"},
    {"event_type": "nothing", "source": "s"},
    {"event_type": "scalars.false", "source": "s", "data": False},
    {"event_type": "scalars.zero", "source": "s", "data": 0},
    {"event_type": "scalars.text", "source": "s", "data": ""},
    {"event_type": "empty.list", "source": "s", "data": []},
    {"event_type": "empty.object", "source": "s", "data": {}, "publisher_config": {}},
    {"event_type": "numbers", "source": "s", "data": {"float": 0.1, "one": 1.0, "large": 1e20, "small": -1.5e-7, "int": 2**63}},
    {"event_type": "ünïcode.😀", "source": "sérvice/\"quoted\"\\", "data": {"clé": "ß 😀 \" \\ \n\t\u0001 </script>"}, "subject": "sübject"},
    {"event_type": "list", "source": "s", "data": [1, "two", None, True, {"nested": [[[]]]}]},
    {"event_type": "fields", "source": "s", "data": {"n": 1}, "publisher_config": {"tenant": "a b", "priority": 3, "ratio": 0.5, "é": "ü", "empty": ""}},
    {"event_type": "schema", "source": "https://example.org/source?q=1&r=2", "data": {"n": 1}, "data_schema": "https://example.org/schema.json"},
    {"event_type": "x" * 255, "source": "y" * 255, "data": {"deep": {"deeper": {"deepest": [{"a": 1}, {"b": 2}]}}}, "subject": "z" * 255},
]


def start_redis(directory):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    server = subprocess.Popen(
        ["redis-server", "--port", str(port), "--bind", "127.0.0.1", "--save", "", "--dir", directory],
        stdout=subprocess.DEVNULL,
    )
    client = redis.Redis(port=port, decode_responses=True)
    for _ in range(500):
        try:
            client.ping()
            return server, client, port
        except redis.ConnectionError:
            time.sleep(0.01)
    raise SystemExit("redis-server did not start")


def record(client):
    from django_broadcaster.models import OutboxEvent
    from django_broadcaster.publishers import OutboxPublisher

    publisher = OutboxPublisher()
    first = datetime(2026, 1, 31, 23, 59, 58, 123456, tzinfo=timezone.utc)
    recorded = []
    for number, given in enumerate(EVENTS):
        arguments = {key: value for key, value in given.items() if key != "data_schema"}
        event = publisher.publish_event(**arguments)
        event_id = uuid.UUID(int=(0x0123456789AB << 80) | (7 << 76) | (2 << 62) | number)
        created_at = first + number * timedelta(hours=7, microseconds=100_001)
        OutboxEvent.objects.filter(pk=event.pk).update(
            id=event_id, created_at=created_at, data_schema=given.get("data_schema", "")
        )
        if publisher.process_pending_events() != 1:
            raise SystemExit(f"event {number} was not published")
        [(_, fields)] = client.xrange(STREAM)
        client.delete(STREAM)
        recorded.append(
            {
                "event": {**given, "event_id": str(event_id), "created_at": created_at.isoformat()},
                "fields": [[name, value] for name, value in fields.items()],
            }
        )
    return recorded


def main():
    with tempfile.TemporaryDirectory() as directory:
        server, client, port = start_redis(directory)
        try:
            settings.configure(
                INSTALLED_APPS=["django.contrib.contenttypes", "django_broadcaster"],
                DATABASES={"default": {"ENGINE": "django.db.backends.sqlite3", "NAME": ":memory:"}},
                USE_TZ=True,
                OUTBOX_PUBLISHERS={
                    "default": {
                        "BACKEND": "django_broadcaster.backends.RedisStreamBackend",
                        "OPTIONS": {"host": "127.0.0.1", "port": port, "stream_name": STREAM},
                    }
                },
            )
            django.setup()
            call_command("migrate", verbosity=0)
            recorded = record(client)
        finally:
            server.terminate()
            server.wait()
    RESULT.write_text(json.dumps(recorded, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
    print(f"recorded {len(recorded)} events in {RESULT}")


if __name__ == "__main__":
    main()
