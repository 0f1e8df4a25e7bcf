from django.contrib import admin, messages
from django.core.paginator import Paginator
from django.db import connections
from django.utils.functional import cached_property

from .models import EventStatus, FailedEvent


class LatestPaginator(Paginator):
    """Counts at most 10,000: counting millions of retained events would take seconds."""

    @cached_property
    def count(self):
        return self.object_list.order_by()[:10_000].count()


class ReadOnlyAdmin(admin.ModelAdmin):
    paginator = LatestPaginator
    show_full_result_count = False

    def has_add_permission(self, request):
        return False

    def has_change_permission(self, request, obj=None):
        return False

    def has_delete_permission(self, request, obj=None):
        return False


@admin.register(EventStatus)
class EventStatusAdmin(ReadOnlyAdmin):
    list_display = ["event_type", "subject", "status", "backend", "stream", "created_at", "attempts", "last_error"]
    # Other columns are not offered: to list their values, Django would read every event.
    list_filter = ["status"]
    search_fields = ["=event_type", "=subject"]
    ordering = ["-created_at"]


@admin.register(FailedEvent)
class FailedEventAdmin(ReadOnlyAdmin):
    list_display = ["event_type", "subject", "backend", "failed_at", "attempts", "last_error"]
    list_filter = ["backend", "event_type", "failed_at"]
    ordering = ["-failed_at"]
    actions = ["retry"]

    @admin.action(description="Publish the selected events again")
    def retry(self, request, queryset):
        ids = list(queryset.values_list("event_id", flat=True))
        with connections[queryset.db].cursor() as cursor:
            cursor.execute("select sum(outbox.retry_failed(event_id => id)) from unnest(%s) as id", [ids])
            retried = cursor.fetchone()[0]
        self.message_user(request, f"{retried} published again, under the same ids", messages.SUCCESS)
