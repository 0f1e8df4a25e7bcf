"""Settings of the application that moves: django-broadcaster with two streams."""

import os

SECRET_KEY = "not secret"
USE_TZ = True
INSTALLED_APPS = ["django.contrib.contenttypes", "django_broadcaster"]
DATABASES = {
    "default": {
        "ENGINE": "django.db.backends.postgresql",
        "HOST": os.environ["PGHOST"],
        "USER": "app",
        "NAME": "postgres",
    }
}
OUTBOX_PUBLISHERS = {
    "main": {
        "BACKEND": "django_broadcaster.backends.RedisStreamBackend",
        "OPTIONS": {"host": "127.0.0.1", "port": int(os.environ["REDIS_PORT"]), "stream_name": "events", "max_len": 1000000},
    },
    "high_priority": {
        "BACKEND": "django_broadcaster.backends.RedisStreamBackend",
        "OPTIONS": {"host": "127.0.0.1", "port": int(os.environ["REDIS_PORT"]), "stream_name": "urgent", "max_len": 1000000},
    },
}
OUTBOX_WORKER = {"BATCH_SIZE": 200, "SLEEP_TIME": 2, "MAX_RETRIES": 4, "RETRY_BACKOFF": True}
OUTBOX_RETENTION = {"CLEANUP_PUBLISHED": True, "PUBLISHED_RETENTION_DAYS": 3, "FAILED_RETENTION_DAYS": 14}
