"""Settings of the measurements: the test project's, with caches to compare with."""

from __future__ import annotations

import os

from testproject.settings import *  # noqa: F403 - this is how Django's settings are extended

CACHES = {
    "default": {
        "BACKEND": "django.core.cache.backends.locmem.LocMemCache",
        "OPTIONS": {"MAX_ENTRIES": 100_000},
    },
}
if "REDIS_URL" in os.environ:
    CACHES["redis"] = {
        "BACKEND": "django.core.cache.backends.redis.RedisCache",
        "LOCATION": os.environ["REDIS_URL"],
    }
