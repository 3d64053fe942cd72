"""The session table: laid out for updates in place."""

from __future__ import annotations

import datetime
import os
import subprocess
import sys
import time
from io import StringIO
from pathlib import Path

import pytest
from django.core.management import call_command
from django.db import connection

from deferred_sessions.backend import SessionStore
from deferred_sessions.models import Session
from deferred_sessions.runtime import Runtime
from tests.plugins.postgres import database_url

pytestmark = pytest.mark.django_db(transaction=True)


def query(sql: str) -> list[tuple[object, ...]]:
    with connection.cursor() as cursor:
        cursor.execute(sql)
        return cursor.fetchall()


def test_the_models_match_the_migrations() -> None:
    call_command("makemigrations", "--check", "--dry-run", stdout=StringIO())


def test_trap_12_the_sliding_expiry_has_no_index() -> None:
    """Trap 12: an index there would forbid HOT updates; the coarse day has one."""
    indexed = {
        definition.partition("(")[2].partition(")")[0]
        for (definition,) in query(
            "SELECT indexdef FROM pg_indexes WHERE tablename = 'deferred_sessions_session'"
        )
        if isinstance(definition, str)
    }

    assert indexed == {"session_key", "expire_day", "user_id"}


def test_room_and_vacuum_are_set() -> None:
    (options,) = query(
        "SELECT reloptions FROM pg_class WHERE relname = 'deferred_sessions_session'"
    )[0]
    assert isinstance(options, list)

    assert "fillfactor=70" in options
    assert "autovacuum_vacuum_scale_factor=0.02" in options
    assert "autovacuum_vacuum_cost_delay=0" in options


def test_flushes_are_hot_updates(runtime: Runtime) -> None:
    """Rows are rewritten on their page, and no index is touched."""
    session = SessionStore()
    session.save()
    sessions = [SessionStore() for _ in range(50)]
    for session in sessions:
        session.update({"n": 0, "_auth_user_id": "7"})
        session.save()
    query("SELECT pg_stat_reset() IS NULL")
    written = 0
    for turn in range(20):
        for session in sessions:
            session["n"] = turn + 1
            session.save()
        written += runtime.flusher.flush_once(time.time(), everything=True).updated
    connection.close()  # the figures are sent when a backend ends

    updates, hot = query(
        "SELECT n_tup_upd, n_tup_hot_upd FROM pg_stat_user_tables "
        "WHERE relname = 'deferred_sessions_session'"
    )[0]

    assert written == 1000
    assert isinstance(updates, int)
    assert isinstance(hot, int)
    assert updates >= 1000  # with those of other backends of the tests before, which end late
    assert hot >= 0.9 * updates  # the others found their page full; an index would make it none


def test_the_day_follows_the_expiry() -> None:
    Session.objects.create(
        session_key="somesession", session_data="", expire_date="2030-05-06T23:59:00+02:00"
    )
    days = "SELECT expire_day FROM deferred_sessions_session"
    assert query(days) == [(datetime.date(2030, 5, 6),)]

    Session.objects.update(expire_date="2030-05-07T01:30:00+02:00")
    assert query(days) == [(datetime.date(2030, 5, 6),)]

    Session.objects.update(expire_date="2030-05-07T02:30:00+02:00")
    assert query(days) == [(datetime.date(2030, 5, 7),)]


def test_the_migrations_can_be_undone() -> None:
    call_command("migrate", "deferred_sessions", "zero", verbosity=0)
    assert "deferred_sessions_session" not in connection.introspection.table_names()
    call_command("migrate", "deferred_sessions", verbosity=0)
    assert Session.objects.count() == 0


def test_checks_need_no_database() -> None:
    """A worker must be able to start while PostgreSQL is away."""
    result = subprocess.run(
        [sys.executable, "-W", "error", "manage.py", "check"],
        cwd=Path(__file__).parents[2],
        env={**os.environ, "DATABASE_URL": "postgresql://nobody@127.0.0.1:1/nothing"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (result.returncode, result.stderr) == (0, "")


def test_rows_made_by_others_have_sound_defaults() -> None:
    """Django's manager and plain SQL need to know nothing of our columns."""
    Session.objects.save("fromdjango", {"a": 1}, datetime.datetime(2100, 1, 1, tzinfo=datetime.UTC))
    with connection.cursor() as cursor:
        cursor.execute(
            "INSERT INTO deferred_sessions_session (session_key, session_data, expire_date) "
            "SELECT 'fromsql12', session_data, expire_date FROM deferred_sessions_session"
        )

    for key in ("fromdjango", "fromsql12"):
        stored = Session.objects.get(pk=key)
        assert (stored.version, stored.fence, stored.owner, stored.user_id) == (1, 0, None, None)
        assert stored.get_decoded() == {"a": 1}
        assert SessionStore(key).load() == {"a": 1}
    assert str(stored) == "from…"


BESIDE_SQLITE = """
from testproject.settings import *
DATABASES = {
    "default": {"ENGINE": "django.db.backends.sqlite3", "NAME": BASE_DIR_OF_TEST / "db.sqlite3"},
    "sessions": DATABASES["default"],
}
DEFERRED_SESSIONS = {"SERVERS": ["sessions"], "DIRECTORY": BASE_DIR_OF_TEST / "sessions"}
"""

SAVE = """
from deferred_sessions.backend import SessionStore
from django.db import connections
session = SessionStore(); session["a"] = 1; session.save()
tables = connections["default"].introspection.table_names()
print("auth_user" in tables, "deferred_sessions_session" in tables, session.session_key)
"""


def test_sessions_in_another_database_than_the_rest(tmp_path: Path) -> None:
    """SERVERS names it; other databases, which need not be PostgreSQL, get no table."""
    directory = f"from pathlib import Path\nBASE_DIR_OF_TEST = Path({str(tmp_path)!r})"
    (tmp_path / "beside_sqlite.py").write_text(f"{directory}\n{BESIDE_SQLITE}")

    def manage(*command: str) -> str:
        return subprocess.run(
            [sys.executable, "-W", "error", "manage.py", *command],
            cwd=Path(__file__).parents[2],
            env={
                **os.environ,
                "DATABASE_URL": database_url(),
                "DJANGO_SETTINGS_MODULE": "beside_sqlite",
                "PYTHONPATH": str(tmp_path),
            },
            capture_output=True,
            text=True,
            check=True,
        ).stdout

    manage("migrate", "--database=default", "--verbosity=0")
    manage("migrate", "--database=sessions", "deferred_sessions", "--verbosity=0")
    *tables, key = manage("shell", "-c", SAVE).split()[-3:]
    assert tables == ["True", "False"]
    assert Session.objects.get(pk=key).get_decoded() == {"a": 1}
