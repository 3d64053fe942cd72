"""What `manage.py check --deploy` warns of, and that it says what to do."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from datetime import timedelta
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from django.core.management import call_command
from django.db import connection
from django.utils import timezone

from deferred_sessions.apps import _note_asgi
from deferred_sessions.checks import check_deployment
from deferred_sessions.models import Node
from deferred_sessions.runtime import Runtime
from tests.integration.conftest import Outage, created

pytestmark = pytest.mark.django_db(transaction=True)

DJANGOS = "django.contrib.sessions.middleware.SessionMiddleware"


@pytest.fixture(autouse=True)
def _all_is_well(tune: Callable[..., Runtime], tmp_path: Path) -> None:
    tune(JOURNAL_DIRECTORY=str(tmp_path / "journal"))


def ids() -> list[str]:
    messages = check_deployment()
    assert all(message.hint for message in messages)
    return [str(message.id).removeprefix("deferred_sessions.") for message in messages]


def flushed(runtime: Runtime, *, ago: float = 0.0) -> None:
    created(a=1)
    runtime.flusher.flush_once(time.time() - ago)


def test_all_is_well(runtime: Runtime) -> None:
    flushed(runtime)
    assert ids() == []


def test_a_host_that_has_not_served_yet(runtime: Runtime) -> None:
    """Nothing can be said of a poller; and no store is made."""
    assert ids() == []
    assert not runtime.store.exists()


def test_it_is_part_of_djangos_command(tune: Callable[..., Runtime]) -> None:
    """With --deploy, and only then."""
    tune(JOURNAL_DIRECTORY=None)
    for arguments, is_told in ((["--deploy"], True), ([], False)):
        errors = StringIO()
        call_command("check", *arguments, stdout=StringIO(), stderr=errors)
        assert ("deferred_sessions.W032" in errors.getvalue()) == is_told


def test_another_engine_is_none_of_our_business(settings: Any) -> None:
    settings.SESSION_ENGINE = "django.contrib.sessions.backends.db"
    settings.DEFERRED_SESSIONS = {}
    assert ids() == []


def test_bad_settings_are_told_by_the_other_check(settings: Any) -> None:
    settings.DEFERRED_SESSIONS = {"FLUSH_INTERVAL": -1}
    assert ids() == []


def test_w031_nobody_has_flushed(runtime: Runtime) -> None:
    created(a=1)
    assert ids() == ["W031"]


def test_w031_nobody_has_flushed_for_long(runtime: Runtime) -> None:
    flushed(runtime, ago=121)
    assert ids() == ["W031"]


def test_w031_only_the_agent_flushes(runtime: Runtime) -> None:
    """Its own flushes are no sign of a poller; some time after a poller came, all is well."""
    now = time.time()
    flushed(runtime, ago=121)
    assert runtime.agent.flush_if_forgotten_once(now)
    assert ids() == ["W031"]
    assert "the agent does it instead" in check_deployment()[0].msg

    runtime.flusher.flush_once(now)
    assert ids() == []


def test_w032_no_journal(tune: Callable[..., Runtime]) -> None:
    tune(JOURNAL_DIRECTORY=None)
    assert ids() == ["W032"]


def test_w033_too_small(tune: Callable[..., Runtime], tmp_path: Path) -> None:
    """For a store to be made; for one that was made smaller than wanted."""
    free = os.statvfs(tmp_path).f_bavail * os.statvfs(tmp_path).f_frsize
    if free >= 64 << 30:
        pytest.skip("The disk has more room than a store may take.")
    runtime = tune(STORE_SIZE=64 << 30)
    assert ids() == ["W033"]
    assert not runtime.store.exists()

    runtime.store.directory.mkdir(mode=0o700)
    flushed(tune(STORE_SIZE=16 << 20))
    assert ids() == []
    tune(STORE_SIZE=64 << 30)
    assert ids() == ["W033"]


def test_w033_a_store_that_is_not_ours(runtime: Runtime, directory: Path) -> None:
    flushed(runtime)
    runtime.store.close()
    directory.chmod(0o755)
    assert ids() == ["W033"]


@pytest.mark.parametrize(
    ("later_began", "earlier_beat", "is_told"),
    [(10, 5, True), (10, 20, False), (4000, 3900, False)],
    ids=["both live", "a restart", "long ago"],
)
def test_w034_one_name_for_two(later_began: float, earlier_beat: float, is_told: bool) -> None:
    """A host that is started anew has another incarnation, but not at the same time."""
    now = timezone.now()

    def ago(seconds: float) -> Any:
        return now - timedelta(seconds=seconds)

    Node.objects.create(
        node="web1#a", beat=9, started_at=ago(9000), beat_at=ago(earlier_beat), died_at=now
    )
    Node.objects.create(node="web1#b", beat=9, started_at=ago(later_began), beat_at=now)
    Node.objects.create(node="web2#c", beat=9, started_at=ago(later_began), beat_at=now)

    assert ids() == (["W034"] if is_told else [])
    if is_told:
        assert "the same name: web1." in check_deployment()[0].msg


def test_w035_asgi_by_the_settings(settings: Any) -> None:
    settings.ASGI_APPLICATION = "testproject.asgi.application"
    assert ids() == []
    settings.MIDDLEWARE = [DJANGOS]
    assert ids() == ["W035"]


def test_w035_asgi_by_what_was_served(runtime: Runtime, settings: Any) -> None:
    settings.MIDDLEWARE = [DJANGOS]
    flushed(runtime)
    assert ids() == []
    _note_asgi(runtime.store)
    assert ids() == ["W035"]


def test_w037_postgresql_is_away(runtime: Runtime, outage: Outage) -> None:
    outage.begin()
    assert ids() == ["W037"]


def test_w037_not_migrated(runtime: Runtime) -> None:
    with connection.cursor() as cursor:
        cursor.execute("ALTER TABLE deferred_sessions_node RENAME TO away")
    try:
        assert ids() == ["W037"]
        assert "manage.py migrate" in str(check_deployment()[0].msg)
    finally:
        with connection.cursor() as cursor:
            cursor.execute("ALTER TABLE away RENAME TO deferred_sessions_node")
