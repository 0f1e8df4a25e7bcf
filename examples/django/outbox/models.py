from uuid import uuid4

from django.db import models


class Event(models.Model):
    """An event to publish: Event.objects.create(...) does what publish_event does. It is never read back."""

    event_id = models.UUIDField(primary_key=True, default=uuid4)
    event_type = models.CharField(max_length=255)
    source = models.CharField(max_length=255)
    data = models.JSONField(null=True)
    subject = models.CharField(max_length=1024, blank=True)
    backend = models.CharField(max_length=63, blank=True)
    stream = models.TextField(blank=True)
    data_schema = models.TextField(blank=True)
    publisher_config = models.JSONField(null=True)
    max_retries = models.IntegerField(null=True)

    class Meta:
        managed = False
        db_table = '"outbox"."events"'


class EventStatus(models.Model):
    """The status of an event."""

    Status = models.TextChoices("Status", "scheduled pending published failed")
    event_id = models.UUIDField(primary_key=True)
    event_type = models.TextField()
    source = models.TextField()
    subject = models.TextField(null=True)
    backend = models.TextField()
    stream = models.TextField()
    created_at = models.DateTimeField()
    scheduled_at = models.DateTimeField(null=True)
    status = models.TextField(choices=Status.choices)
    attempts = models.IntegerField()
    last_error = models.TextField(null=True)

    class Meta:
        managed = False
        db_table = '"outbox"."event_status"'
        verbose_name_plural = "event status"


class FailedEvent(models.Model):
    """An event that Redis refused for good. outbox.retry_failed() publishes it again."""

    event_id = models.UUIDField(primary_key=True)
    event_type = models.TextField()
    source = models.TextField()
    subject = models.TextField(null=True)
    backend = models.TextField()
    data = models.JSONField(null=True)
    attempts = models.IntegerField()
    last_error = models.TextField()
    failed_at = models.DateTimeField()

    class Meta:
        managed = False
        db_table = '"outbox"."failed_events"'
