"""Each test runs in a transaction that is rolled back: nothing is sent, and published_here() returns what would be."""

import json

from django.test import TestCase

from outbox.models import Event
from outbox.publish import publish_event, published_here
from shop.models import place_order


class PublishingTests(TestCase):
    def test_an_order_is_announced(self):
        order, _ = place_order("Ada", "9.90")
        [(event_type, subject, data)] = published_here()
        self.assertEqual((event_type, subject), ("order.placed", f"order/{order.id}"))
        self.assertEqual(json.loads(data), {"order_id": order.id, "total": "9.90"})

    def test_the_model_publishes_too(self):
        Event.objects.create(event_type="order.imported", source="shop")
        self.assertEqual([event[0] for event in published_here()], ["order.imported"])

    def test_what_other_tests_published_is_not_seen(self):
        self.assertEqual(published_here(), [])
        publish_event("order.seen", "shop")
        self.assertEqual(len(published_here()), 1)
