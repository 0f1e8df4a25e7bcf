from django.db import models, transaction

from outbox.publish import publish_event


class Order(models.Model):
    customer = models.TextField()
    total = models.DecimalField(max_digits=10, decimal_places=2)


def place_order(customer, total):
    """The order and its event, or nothing. Returns both."""
    with transaction.atomic():
        order = Order.objects.create(customer=customer, total=total)
        data = {"order_id": order.id, "total": str(order.total)}
        return order, publish_event("order.placed", "shop", data, subject=f"order/{order.id}")
