from django.db import connections
from psycopg.types.json import Jsonb


def publish_event(event_type, source, data=None, using="default", **options):
    """Publishes within the current transaction; the options are arguments of outbox.publish_event."""
    names = "".join(f", {name} => %({name})s" for name in options)
    values = {"event_type": event_type, "source": source, "data": data, **options}
    values = {name: Jsonb(value) if isinstance(value, (dict, list)) else value for name, value in values.items()}
    with connections[using].cursor() as cursor:
        cursor.execute(f"select outbox.publish_event(%(event_type)s, %(source)s, %(data)s{names})", values)
        return cursor.fetchone()[0]


def published_here(using="default"):
    """What the current transaction has published: for tests, whose transactions roll back."""
    with connections[using].cursor() as cursor:
        cursor.execute("select event_type, subject, data::text from outbox.published_here()")
        return cursor.fetchall()
