"""django-broadcaster's own worker command, without its pause of 5 s between batches of 100 (with it: 20 events a second at most)."""

import os
import sys

import django
from django.conf import settings
from django.core.management import call_command

settings.configure(
    INSTALLED_APPS=["django.contrib.contenttypes", "django_broadcaster"],
    DATABASES={
        "default": {
            "ENGINE": "django.db.backends.postgresql",
            "HOST": os.environ["PGHOST"],
            "PORT": os.environ["PGPORT"],
            "USER": os.environ["PGUSER"],
            "NAME": os.environ["PGDATABASE"],
        }
    },
    USE_TZ=True,
    OUTBOX_PUBLISHERS={
        "default": {
            "BACKEND": "django_broadcaster.backends.RedisStreamBackend",
            "OPTIONS": {"host": "127.0.0.1", "port": int(os.environ["REDIS_PORT"]), "stream_name": "events"},
        }
    },
    LOGGING_CONFIG=None,
)
django.setup()
if sys.argv[1] == "setup":
    call_command("migrate", verbosity=0)
else:
    # It prints a line a batch.
    with open(os.devnull, "w", encoding="utf-8") as nowhere:
        call_command("outbox_worker", interval=0, stdout=nowhere)
