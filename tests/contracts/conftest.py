"""Every contract test runs four times: our engine and Django's, each half of it.

Django's `db` engine is the control: a test that fails for it says something that
Django's contract does not say.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from asgiref.sync import async_to_sync
from django.contrib.sessions.backends.base import SessionBase
from django.contrib.sessions.backends.db import SessionStore as DjangoStore

from deferred_sessions.backend import SessionStore

Engine = type[SessionBase]

# What has no async twin, because it touches nothing but the object itself.
_SYNC_ONLY = {"clear", "is_empty", "get_session_cookie_age", "encode", "decode"}


@pytest.fixture(params=[SessionStore, DjangoStore], ids=["ours", "django"])
def engine(request: pytest.FixtureRequest, db: None, settings: Any) -> Engine:
    """The class of session stores."""
    settings.SESSION_ENGINE = request.param.__module__
    return request.param


@pytest.fixture(params=["sync", "async"])
def call(request: pytest.FixtureRequest) -> Callable[..., Any]:
    """Call a method of a session: its sync half, then its async half."""

    def do(session: SessionBase, name: str, *arguments: Any, **keywords: Any) -> Any:
        if request.param == "sync" or name in _SYNC_ONLY:
            if name == "has_key":
                return arguments[0] in session
            if name == "set":
                return session.__setitem__(*arguments)
            return getattr(session, name)(*arguments, **keywords)
        return async_to_sync(getattr(session, f"a{name}"))(*arguments, **keywords)

    return do
