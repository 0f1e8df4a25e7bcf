from datetime import timedelta
from uuid import uuid4

from django.core.management.base import BaseCommand
from django.db import transaction
from django.utils import timezone

from outbox.models import Event
from outbox.publish import publish_event
from shop.models import place_order


class Command(BaseCommand):
    help = "Publishes by the function and by the model."

    def handle(self, **options):
        with transaction.atomic():
            order, placed = place_order("Ada", "9.90")
            self.say("order.placed", placed)
            config = {"tenant": "acme"}  # a further field of the entry
            data = {"order_id": order.id}
            self.say("order.paid", publish_event("order.paid", "shop", data, max_retries=5, publisher_config=config))
            later = timezone.now() + timedelta(days=14)
            self.say("order.reminder", publish_event("order.reminder", "shop", data, scheduled_at=later))

            self.say("order.imported", Event.objects.create(event_type="order.imported", source="shop", data=data).pk)

            # With your own id, an event is published once, even if the statement is repeated.
            shipped = uuid4()
            for _ in range(2):
                event = Event(event_id=shipped, event_type="order.shipped", source="shop", data=data)
                Event.objects.bulk_create([event], ignore_conflicts=True)
            self.say("order.shipped", shipped)

        with transaction.atomic():
            publish_event("order.cancelled", "shop", data)
            transaction.set_rollback(True)  # and no event is sent

    def say(self, event_type, event_id):
        self.stdout.write(f"{event_type} {event_id}")
