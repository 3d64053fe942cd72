"""Starts an embedded PostgreSQL before the settings are read, unless DATABASE_URL names one."""

from __future__ import annotations

import os
from collections.abc import Generator
from contextlib import ExitStack
from urllib.parse import quote

import pytest
from django.db import connection

from testproject.embedded import postgres

_running = ExitStack()


@pytest.hookimpl(wrapper=True)
def pytest_load_initial_conftests() -> Generator[None, None, None]:
    if "DATABASE_URL" not in os.environ:
        os.environ["DATABASE_URL"] = _running.enter_context(postgres())
    yield


def database_url() -> str:
    """Return the URL of the database of this test run, for other processes."""
    database = connection.settings_dict
    host = quote(str(database["HOST"]), safe="")
    port = f":{database['PORT']}" if database["PORT"] else ""
    password = f":{quote(database['PASSWORD'])}" if database["PASSWORD"] else ""
    return f"postgresql://{database['USER']}{password}@{host}{port}/{database['NAME']}"


def pytest_unconfigure() -> None:
    _running.close()
