"""Starts an embedded PostgreSQL before the settings are read, unless DATABASE_URL names one."""

from __future__ import annotations

import os
from collections.abc import Generator
from contextlib import ExitStack

import pytest
from django.db import connection

from testproject.embedded import postgres, url_of

_running = ExitStack()


@pytest.hookimpl(wrapper=True)
def pytest_load_initial_conftests() -> Generator[None, None, None]:
    if "DATABASE_URL" not in os.environ:
        os.environ["DATABASE_URL"] = _running.enter_context(postgres())
    yield


def database_url() -> str:
    """Return the URL of the database of this test run, for other processes."""
    return url_of(connection.settings_dict)


def pytest_unconfigure() -> None:
    _running.close()
