"""Settings of the measurements: the test project's, with engines and caches to compare with.

ENGINE names the engine that web servers are to use, see `benchmarks.engines`.
"""

from __future__ import annotations

import os

from benchmarks.engines import ENGINES, OURS, available
from testproject.settings import *  # noqa: F403 - this is how Django's settings are extended
from testproject.settings import INSTALLED_APPS as TEST_APPS

ENGINE = os.environ.get("ENGINE", OURS)
SESSION_ENGINE = ENGINES[ENGINE].module
OTHERS = {"django-qsessions": "qsessions", "django-user-sessions": "user_sessions"}
INSTALLED_APPS = [*TEST_APPS, *(OTHERS[name] for name in available() if name in OTHERS)]
SILENCED_SYSTEM_CHECKS = ["deferred_sessions.W001"]

# Nothing beside the sessions: that is what is compared.
MIDDLEWARE = ["django.contrib.sessions.middleware.SessionMiddleware"]
if ENGINE in ("django-qsessions", "django-user-sessions"):
    MIDDLEWARE = [f"{OTHERS[ENGINE]}.middleware.SessionMiddleware"]
if "ASYNC" in os.environ:
    package = {OURS: "deferred_sessions.middleware"}.get(ENGINE, ENGINES[ENGINE].module)
    MIDDLEWARE = [f"{package}.SessionMiddleware"]

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
    if ENGINES[ENGINE].cache == "redis":
        SESSION_CACHE_ALIAS = "redis"
