"""Settings of the test project.

Everything that differs between a test run, the demo and a benchmark comes from the
environment: DATABASE_URL, BROKER_URL, CACHE_URL, SESSION_ENGINE, SESSION_DIRECTORY, and as
JSON DEFERRED_SESSIONS, SESSION_DATABASES (URLs by alias) and DATABASE_POOL (psycopg's options).
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import dj_database_url
from django.core.exceptions import ImproperlyConfigured

from deferred_sessions.schedule import beat_schedule

BASE_DIR = Path(__file__).resolve().parent

if "DATABASE_URL" not in os.environ:
    raise ImproperlyConfigured(
        "DATABASE_URL is not set. Name a PostgreSQL database, or run the command with an "
        "embedded one: python -m testproject.embedded python manage.py ..."
    )

SECRET_KEY = os.environ.get("SECRET_KEY", "not-a-secret-" + "x" * 40)
DEBUG = os.environ.get("DEBUG") == "1"
ALLOWED_HOSTS = ["*"]
ROOT_URLCONF = "testproject.urls"
USE_TZ = True
TIME_ZONE = "UTC"
LOGIN_URL = "login"
STATIC_URL = "static/"
WHITENOISE_USE_FINDERS = True
WHITENOISE_AUTOREFRESH = False

INSTALLED_APPS = [
    "django.contrib.admin",
    "django.contrib.auth",
    "django.contrib.contenttypes",
    "django.contrib.sessions",
    "django.contrib.messages",
    "django.contrib.staticfiles",
    "deferred_sessions",
    "testproject.shop",
    *filter(None, os.environ.get("EXTRA_APPS", "").split(",")),
]

MIDDLEWARE = [
    "django.middleware.security.SecurityMiddleware",
    "whitenoise.middleware.WhiteNoiseMiddleware",
    "deferred_sessions.middleware.SessionMiddleware",
    "django.middleware.common.CommonMiddleware",
    "django.middleware.csrf.CsrfViewMiddleware",
    "django.contrib.auth.middleware.AuthenticationMiddleware",
    "django.contrib.messages.middleware.MessageMiddleware",
]

TEMPLATES = [
    {
        "BACKEND": "django.template.backends.django.DjangoTemplates",
        "APP_DIRS": True,
        "OPTIONS": {
            "context_processors": [
                "django.template.context_processors.request",
                "django.contrib.auth.context_processors.auth",
                "django.contrib.messages.context_processors.messages",
            ],
        },
    },
]

DATABASES = {
    "default": dj_database_url.parse(os.environ["DATABASE_URL"], conn_max_age=60),
    **{
        alias: dj_database_url.parse(url, conn_max_age=60)
        for alias, url in json.loads(os.environ.get("SESSION_DATABASES", "{}")).items()
    },
}
DATABASE_ROUTERS = ["deferred_sessions.router.SessionRouter"]

if "DATABASE_POOL" in os.environ:
    DATABASES["default"] |= {
        "CONN_MAX_AGE": 0,
        "OPTIONS": {"pool": json.loads(os.environ["DATABASE_POOL"])},
    }

if "DIRECT_URL" in os.environ:  # past a pooler
    DATABASES["direct"] = dj_database_url.parse(os.environ["DIRECT_URL"])

if "CACHE_URL" in os.environ:
    CACHES = {
        "default": {
            "BACKEND": "django.core.cache.backends.redis.RedisCache",
            "LOCATION": os.environ["CACHE_URL"],
        }
    }

SESSION_ENGINE = os.environ.get("SESSION_ENGINE", "deferred_sessions.backend")
DEFERRED_SESSIONS = json.loads(os.environ.get("DEFERRED_SESSIONS", "{}"))
if "SESSION_DIRECTORY" in os.environ:
    DEFERRED_SESSIONS["DIRECTORY"] = os.environ["SESSION_DIRECTORY"]

BROKER_DIRECTORY = os.environ.get("BROKER_DIRECTORY", "/tmp/deferred-sessions-broker")
CELERY_BROKER_URL = os.environ.get("BROKER_URL", "filesystem://")
if CELERY_BROKER_URL.startswith("filesystem"):
    CELERY_BROKER_TRANSPORT_OPTIONS = {
        "data_folder_in": f"{BROKER_DIRECTORY}/messages",
        "data_folder_out": f"{BROKER_DIRECTORY}/messages",
        "control_folder": f"{BROKER_DIRECTORY}/control",
    }
CELERY_BEAT_SCHEDULE = beat_schedule(seconds=float(os.environ.get("FLUSH_TICK", "10")))
CELERY_BROKER_CONNECTION_RETRY_ON_STARTUP = True

LOGGING = {
    "version": 1,
    "disable_existing_loggers": False,
    "handlers": {"console": {"class": "logging.StreamHandler"}},
    "loggers": {"deferred_sessions": {"handlers": ["console"], "level": "WARNING"}},
}
