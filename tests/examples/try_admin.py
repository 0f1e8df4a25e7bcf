"""Uses the admin of examples/django on real servers as an operator would: lists, filters and retries events. Run it there."""

import os
import re

import django

os.environ["DJANGO_SETTINGS_MODULE"] = "settings"
django.setup()

from django.conf import settings
from django.contrib.auth.models import User
from django.test import Client

settings.ALLOWED_HOSTS = ["testserver"]
user, _ = User.objects.get_or_create(username="operator", is_staff=True, is_superuser=True)
client = Client()
client.force_login(user)


def listed(path):
    """The types of the events that a page lists."""
    page = client.get(path)
    assert page.status_code == 200, (path, page.status_code)
    return sorted(re.findall(r'field-event_type[^>]*>(?:<a[^>]*>)?([a-z.]+)', page.content.decode()))


status, failed = "/admin/outbox/eventstatus/", "/admin/outbox/failedevent/"
published = ["order.imported", "order.paid", "order.placed", "order.shipped"]
assert listed(status) == sorted([*published, "order.reminder", "order.refused"]), listed(status)
assert listed(status + "?status__exact=published") == published
assert listed(status + "?status__exact=scheduled") == ["order.reminder"]
assert listed(status + "?q=order.paid") == ["order.paid"]
assert listed(status + "?status__exact=failed") == listed(failed) == ["order.refused"]
assert listed(failed + "?backend=default&event_type=order.refused") == ["order.refused"]

# It is read-only: it neither adds nor changes events.
assert client.get(failed + "add/").status_code == 403
event_id = re.search(r"failedevent/([0-9a-f-]{36})/", client.get(failed).content.decode())[1]
page = client.get(f"{failed}{event_id}/change/")
assert page.status_code == 200 and b'name="_save"' not in page.content

done = client.post(failed, {"action": "retry", "_selected_action": [event_id]}, follow=True)
assert "1 published again" in done.content.decode(), done.content.decode()
assert listed(failed) == []
