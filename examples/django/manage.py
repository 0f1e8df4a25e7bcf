"""`python manage.py publish`, `python manage.py test`, and `runserver` (the admin needs a login: `createsuperuser`)."""

import os

from django.core.management import execute_from_command_line

os.environ.setdefault("DJANGO_SETTINGS_MODULE", "settings")
execute_from_command_line()
