"""Publishes with asyncpg. Connects with PGHOST, PGUSER... of the environment."""

import asyncio
import json
from datetime import datetime, timedelta, timezone
from uuid import uuid4

import asyncpg


async def publish(db, event_type, data, **options):
    """Publishes within the transaction of the connection; the options are arguments of outbox.publish_event."""
    names = "".join(f", {name} => ${place}" for place, name in enumerate(options, 3))
    sql = f"select outbox.publish_event($1, 'shop', $2{names})"
    values = [json.dumps(value) if isinstance(value, dict) else value for value in options.values()]
    return await db.fetchval(sql, event_type, json.dumps(data), *values)


async def main():
    db = await asyncpg.connect()
    async with db.transaction():  # the order and its events, or nothing
        order = await db.fetchval("insert into orders (customer, total) values ('Ada', 9.90) returning id")
        data = {"order_id": order, "total": "9.90"}
        print("order.placed", await publish(db, "order.placed", data, subject=f"order/{order}"))
        config = {"tenant": "acme"}  # a further field of the entry
        data = {"order_id": order}
        print("order.paid", await publish(db, "order.paid", data, max_retries=5, publisher_config=config))
        later = datetime.now(timezone.utc) + timedelta(days=14)
        print("order.reminder", await publish(db, "order.reminder", data, scheduled_at=later))

        # The same by a plain INSERT, which takes RETURNING. With your own id, an event is published once, even if repeated.
        imported = "insert into outbox.events (event_type, source, data) values ($1, 'shop', $2) returning event_id"
        print("order.imported", await db.fetchval(imported, "order.imported", json.dumps(data)))
        shipped = uuid4()
        once = """insert into outbox.events (event_id, event_type, source, data)
            values ($1, 'order.shipped', 'shop', $2) on conflict (event_id) do nothing"""
        await db.executemany(once, [(shipped, json.dumps(data))] * 2)
        print("order.shipped", shipped)

    transaction = db.transaction()
    await transaction.start()
    await publish(db, "order.cancelled", data)
    await transaction.rollback()  # and no event is sent
    await db.close()


asyncio.run(main())
