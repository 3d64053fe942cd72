"""`deferred_sessions.testing`: what users' tests get."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pytest
from django.contrib.auth.models import User
from django.test import Client, TestCase, TransactionTestCase, override_settings
from freezegun import freeze_time

from deferred_sessions.backend import SessionStore
from deferred_sessions.report import FlushReport
from deferred_sessions.runtime import get_runtime
from deferred_sessions.testing import CleanSessionsMixin, clean_sessions
from tests.integration.conftest import created, row

__all__ = ["clean_sessions"]


class RolledBack(CleanSessionsMixin, TestCase):
    """Each test leaves a dirty session in a transaction that is rolled back."""

    keys: ClassVar[list[str | None]] = []

    def _leave_one(self) -> None:
        assert get_runtime().store.status().records == 0
        for key in self.keys:
            assert SessionStore(key).load() == {}
        session = created(a=1)
        session["a"] = 2
        session.save()
        assert self.flush_sessions().rows == 1
        assert row(session.session_key) == {"a": 2}
        self.keys.append(session.session_key)

    def test_one(self) -> None:
        self._leave_one()

    def test_another(self) -> None:
        self._leave_one()

    def test_override_settings(self) -> None:
        with override_settings(DEFERRED_SESSIONS={"LOCKING": "exclusive"}):
            assert get_runtime().settings.locking == "exclusive"
        assert get_runtime().settings.locking == "merge"
        assert get_runtime().settings.directory is not None

    def test_login(self) -> None:
        user = User.objects.create_user("ada", password="secret")
        self.client.force_login(user)
        assert self.client.session["_auth_user_id"] == str(user.pk)


class Committed(CleanSessionsMixin, TransactionTestCase):
    def test_what_is_due(self) -> None:
        with freeze_time() as clock:
            session = created(a=1)
            session["a"] = 2
            session.save()
            assert self.flush_sessions(everything=False).rows == 0
            clock.tick(61)
            assert self.flush_sessions(everything=False).updated == 1
        assert row(session.session_key) == {"a": 2}


@pytest.mark.django_db
def test_the_fixture(clean_sessions: Callable[..., FlushReport], client: Client) -> None:
    client.get("/probe/count/")
    assert get_runtime().store.status().records == 1
    client.get("/probe/count/")
    assert clean_sessions().rows == 1


@pytest.mark.django_db
def test_nothing_is_left(request: pytest.FixtureRequest, tmp_path: Path) -> None:
    from deferred_sessions.testing import own_sessions

    with own_sessions():
        created(at=time.time())
        directory: Any = get_runtime().store.directory
        assert directory.exists()
    assert not directory.parent.exists()
