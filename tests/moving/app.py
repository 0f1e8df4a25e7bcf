"""The application: publishes with django-broadcaster, or with outbox.publish_event, until its standard input ends.

Each transaction locks an aggregate, publishes its next version, and records it in a ledger. Some transactions are rolled
back. A line `old` or `new` on standard input chooses the way to publish from then on.
"""

import json
import random
import sys
import threading
import time
from datetime import timedelta

import django

django.setup()

from django.db import connection, transaction  # noqa: E402
from django.utils import timezone  # noqa: E402
from django_broadcaster.publishers import publisher  # noqa: E402

KEYS = 20
way = "old"
ended = False


def listen():
    global way, ended
    for line in sys.stdin:
        way = line.strip()
    ended = True


class RolledBack(Exception):
    pass


def publish(cursor, by, data, **arguments):
    if by == "old":
        return str(publisher.publish_event("changed", "app", data, **arguments).id)
    cursor.execute(
        "select outbox.publish_event('changed', 'app', %s, %s, %s, %s)",
        [json.dumps(data), arguments.get("subject"), arguments.get("backend"), arguments.get("scheduled_at")],
    )
    return str(cursor.fetchone()[0])


def step(chance):
    by, key = way, f"k{chance.randrange(KEYS)}"
    backend = "high_priority" if int(key[1:]) % 3 == 0 else None
    with transaction.atomic(), connection.cursor() as cursor:
        cursor.execute("update aggregates set version = version + 1 where key = %s returning version", [key])
        version = cursor.fetchone()[0]
        event_id = publish(cursor, by, {"key": key, "version": version}, subject=key, backend=backend)
        cursor.execute("insert into ledger values (%s, %s, %s, %s)", [event_id, key, version, by])
        if chance.random() < 0.05:
            later = timezone.now() + timedelta(seconds=chance.uniform(0.5, 3))
            event_id = publish(cursor, by, {"later": True}, subject="", scheduled_at=later)
            cursor.execute("insert into ledger values (%s, null, null, %s)", [event_id, by])
        if chance.random() < 0.1:
            raise RolledBack
    return by


def main():
    threading.Thread(target=listen, daemon=True).start()
    chance = random.Random(sys.argv[1])
    told = None
    while not ended:
        try:
            done = step(chance)
        except RolledBack:
            continue
        if done != told:
            told = done
            print(f"publishes the {told} way", flush=True)
        time.sleep(chance.uniform(0, 0.02))


main()
