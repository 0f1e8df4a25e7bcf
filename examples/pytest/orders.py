"""The application under test."""

from psycopg.types.json import Jsonb


def place_order(db, customer):
    order = db.execute("insert into orders (customer) values (%s) returning id", [customer]).fetchone()[0]
    sql = "select outbox.publish_event('order.placed', 'shop', %s, subject => %s)"
    db.execute(sql, [Jsonb({"order_id": order}), f"order/{order}"])
    return order
