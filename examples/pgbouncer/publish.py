"""Publishes through PgBouncer in transaction mode, with psycopg 3. Connects with PGHOST, PGPORT... of the environment."""

from datetime import datetime, timedelta, timezone
from uuid import UUID, uuid4

import psycopg
from psycopg.types.json import Json


def connect():
    # PgBouncer before 1.21 does not track prepared statements: the next transaction may run in a session without them.
    return psycopg.connect(prepare_threshold=None)


def publish(db, event_type, data, **options):
    """Publishes within the transaction of the connection; the options are arguments of outbox.publish_event."""
    names = "".join(f", {name} => %({name})s" for name in options)
    sql = f"select outbox.publish_event(%(type)s, 'shop', %(data)s{names})"
    values = {name: Json(value) if isinstance(value, dict) else value for name, value in options.items()}
    return db.execute(sql, {"type": event_type, "data": Json(data), **values}).fetchone()[0]


with connect() as db:  # one transaction: the order and its events, or nothing
    order = db.execute("insert into orders (customer, total) values ('Ada', 9.90) returning id").fetchone()[0]
    print("order.placed", publish(db, "order.placed", {"order_id": order, "total": "9.90"}, subject=f"order/{order}"))
    config = {"tenant": "acme"}  # a further field of the entry
    print("order.paid", publish(db, "order.paid", {"order_id": order}, max_retries=5, publisher_config=config))
    later = datetime.now(timezone.utc) + timedelta(days=14)
    print("order.reminder", publish(db, "order.reminder", {"order_id": order}, scheduled_at=later))

    # The same by a plain INSERT, which takes RETURNING. With your own id, an event is published once, even if the statement is repeated.
    imported = "insert into outbox.events (event_type, source, data) values (%s, 'shop', %s) returning event_id"
    print("order.imported", db.execute(imported, ["order.imported", Json({"order_id": order})]).fetchone()[0])
    shipped: UUID = uuid4()
    once = """insert into outbox.events (event_id, event_type, source, data) values (%s, 'order.shipped', 'shop', %s)
        on conflict (event_id) do nothing"""
    for _ in range(2):
        db.execute(once, [shipped, Json({"order_id": order})])
    print("order.shipped", shipped)

with connect() as db:
    # SET LOCAL ends with the transaction. A plain SET would stay in the pooled session, for the next client.
    db.execute("set local outbox_relay.default_backend = 'archive'")
    print("order.archived", publish(db, "order.archived", {"order_id": order}))

with connect() as db:
    print("order.closed", publish(db, "order.closed", {"order_id": order}))  # in the default backend's stream again

with connect() as db:
    publish(db, "order.cancelled", {"order_id": order})
    db.rollback()  # and no event is sent
