"""Databases of the sessions' own: two real ones beside the project's."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest
from django.core.management import call_command
from django.core.management.base import SystemCheckError

from deferred_sessions.models import Session
from deferred_sessions.router import SessionRouter
from tests.integration.conftest import second_connection
from tests.plugins.postgres import database_url

pytestmark = pytest.mark.django_db(transaction=True)
ROOT = Path(__file__).parents[2]
OURS = {
    "deferred_sessions_session",
    "deferred_sessions_revocation",
    "deferred_sessions_node",
    "deferred_sessions_waiter",
    "deferred_sessions_refused_write",
    "deferred_sessions_adopted",
    "deferred_sessions_server",
}

SAVE = """
from deferred_sessions.backend import SessionStore
from deferred_sessions.models import Session
session = SessionStore(); session["a"] = 1; session.save()
assert Session.objects.using("sessions_a").get().get_decoded() == {"a": 1}
print(Session.objects.get().get_decoded())
"""


@pytest.fixture
def places() -> Iterator[dict[str, str]]:
    """Two empty databases, as URLs by alias."""
    server = database_url().rpartition("/")[0]
    names = [f"sessions_{letter}_{os.getpid()}" for letter in "ab"]
    with second_connection() as connection:
        for name in names:
            connection.execute(f"CREATE DATABASE {name}")  # type: ignore[call-overload]
        yield {name[:10]: f"{server}/{name}" for name in names}
        for name in names:
            connection.execute(f"DROP DATABASE {name} WITH (FORCE)")  # type: ignore[call-overload]


def manage(directory: Path, places: dict[str, str], *command: str, **settings: object) -> str:
    done = subprocess.run(
        [sys.executable, "-W", "error", "manage.py", *command],
        cwd=ROOT,
        env={
            **os.environ,
            "DATABASE_URL": database_url(),
            "SESSION_DATABASES": json.dumps(places),
            "SESSION_DIRECTORY": str(directory / "sessions"),
            "DEFERRED_SESSIONS": json.dumps({"STORE_SIZE": 16 << 20, **settings}),
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def tables(url: str) -> set[str]:
    with psycopg.connect(url) as connection:
        rows = connection.execute(
            "SELECT tablename FROM pg_tables WHERE schemaname = 'public'"
        ).fetchall()
    return {name for (name,) in rows} - {"django_migrations"}


def triggers(url: str) -> set[str]:
    with psycopg.connect(url) as connection:
        rows = connection.execute("SELECT tgname FROM pg_trigger WHERE NOT tgisinternal").fetchall()
    return {name for (name,) in rows}


def test_each_session_server_is_migrated(places: dict[str, str], tmp_path: Path) -> None:
    """All of our tables, with all that belongs to them, and nobody else's."""
    for alias, url in places.items():
        manage(tmp_path, places, "migrate", f"--database={alias}", SERVERS=list(places))
        assert tables(url) == OURS
        assert triggers(url) == triggers(database_url())
        manage(
            *(tmp_path, places, "migrate", f"--database={alias}", "deferred_sessions", "zero"),
            SERVERS=list(places),
        )
        assert tables(url) == set()


def test_the_others_get_no_session_tables(places: dict[str, str], tmp_path: Path) -> None:
    """What is no session server is like any database of the project."""
    manage(tmp_path, places, "migrate", "--database=sessions_b", SERVERS=["sessions_a"])
    found = tables(places["sessions_b"])
    assert "auth_user" in found
    assert not found & OURS


def test_sessions_live_there(places: dict[str, str], tmp_path: Path) -> None:
    """The engine and the model agree on where."""
    manage(tmp_path, places, "migrate", "--database=sessions_a", SERVERS=["sessions_a"])
    assert manage(tmp_path, places, "shell", "-c", SAVE, SERVERS=["sessions_a"]).endswith(
        "{'a': 1}\n"
    )
    assert not Session.objects.exists()
    assert "no issues" in manage(tmp_path, places, "check", SERVERS=["sessions_a"])


def test_it_has_no_say_about_others() -> None:
    from django.contrib.auth.models import User

    router = SessionRouter()
    assert (router.db_for_read(User), router.db_for_write(User)) == (None, None)
    assert (router.db_for_read(Session), router.db_for_write(Session)) == ("default", "default")
    assert router.allow_migrate("default", "auth") is None
    assert router.allow_migrate("default", "deferred_sessions", model_name="session") is True
    assert router.allow_migrate("other", "deferred_sessions") is False


def test_the_model_is_where_sessions_are_to_be(settings: Any) -> None:
    """Not on a server that is to be emptied, though that needs our tables, too."""
    settings.DEFERRED_SESSIONS = {"SERVERS": {"old": 0, "new": 1}}
    router = SessionRouter()
    assert (router.db_for_read(Session), router.db_for_write(Session)) == ("new", "new")
    assert router.allow_migrate("old", "deferred_sessions") is True


def test_checks_tell_what_is_wrong_with_the_settings(settings: Any) -> None:
    """Django asks the router while it checks; the router must not fail before they have."""
    settings.DEFERRED_SESSIONS = {"NOPE": 1}
    with pytest.raises(SystemCheckError, match="NOPE"):
        call_command("check", databases=["default"])
    assert SessionRouter().allow_migrate("default", "deferred_sessions") is None
