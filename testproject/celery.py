"""The Celery application of the test project: what every Django project has."""

from __future__ import annotations

import os

from celery import Celery
from kombu.transport import TRANSPORT_ALIASES

TRANSPORT_ALIASES["filesystem"] = "testproject.filesystem_broker:Transport"
os.environ.setdefault("DJANGO_SETTINGS_MODULE", "testproject.settings")
app = Celery("testproject")
app.config_from_object("django.conf:settings", namespace="CELERY")
app.autodiscover_tasks()
