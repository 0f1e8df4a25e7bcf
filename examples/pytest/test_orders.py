import json

from orders import place_order


def test_an_order_is_announced(db, published):
    order = place_order(db, "Ada")
    assert published() == [("order.placed", f"order/{order}", {"order_id": order})]


def test_another_test_begins_with_nothing(published):
    assert published() == []


def test_what_is_committed_reaches_redis(committing_db, stream):
    with committing_db.transaction():
        order = place_order(committing_db, "Grace")
    # Waits for all committed events; call it outside a transaction. No sleep is needed.
    assert committing_db.execute("select outbox.drain('10 s')").fetchone()[0]
    [entry] = stream()
    assert entry["event_type"] == "order.placed"
    assert json.loads(entry["cloud_event"])["data"] == {"order_id": order}
