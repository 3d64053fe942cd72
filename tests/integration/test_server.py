"""Every statement on real PostgreSQL, and what its failures are called."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from typing import Any

import psycopg
import pytest
from django.db import connection, transaction
from django.test.utils import CaptureQueriesContext

from deferred_sessions.exceptions import (
    RowLockedError,
    RowRefusedError,
    ServerUnavailableError,
)
from deferred_sessions.models import Node, Session
from deferred_sessions.servers import sql
from deferred_sessions.servers.rows import Columns, State
from deferred_sessions.servers.server import UPDATED, SessionServer
from tests.integration.conftest import second_connection

pytestmark = pytest.mark.django_db(transaction=True)

NOW = 1_800_000_000.25
KEYS = ["aaaaaaaa", "bbbbbbbb", "cccccccc"]


@pytest.fixture
def server() -> SessionServer:
    return SessionServer("default", owner=lambda: "node#1")


def columns(
    *keys: str, data: str = "data", version: int = 1, fence: int = 0, user: str = ""
) -> Columns:
    n = len(keys)
    return Columns(
        list(keys), [data] * n, [NOW + 100] * n, [version] * n, [fence] * n, [user] * n, [NOW] * n
    )


@pytest.mark.parametrize("count", [1, 3])
def test_insert_and_read(server: SessionServer, count: int) -> None:
    assert server.insert(columns(*KEYS[:count], user="7"), NOW) == count

    row = server.read("aaaaaaaa")
    assert row is not None
    assert row == ("aaaaaaaa", "data", NOW + 100, 1, 0, "7", NOW, NOW, "node#1", True)
    assert Session.objects.get(pk="aaaaaaaa").owner == "node#1"


@pytest.mark.parametrize("count", [1, 3])
def test_insert_leaves_taken_keys_alone(server: SessionServer, count: int) -> None:
    server.insert(columns("aaaaaaaa", data="first"), NOW)

    assert server.insert(columns(*KEYS[:count], data="second"), NOW) == count - 1
    assert Session.objects.get(pk="aaaaaaaa").session_data == "first"


@pytest.mark.parametrize("count", [1, 3])
def test_update(server: SessionServer, count: int) -> None:
    server.insert(columns(*KEYS), NOW)

    assert server.update(columns(*KEYS[:count], data="new", version=2, user="8"), NOW + 5) == count

    row = Session.objects.get(pk="aaaaaaaa")
    assert (row.session_data, row.version, row.user_id) == ("new", 2, "8")
    assert row.written_at.timestamp() == NOW + 5
    assert row.created_at.timestamp() == NOW


def test_update_is_no_upsert(server: SessionServer) -> None:
    """Trap 4: a row that somebody deleted does not come back."""
    assert server.update(columns(*KEYS, version=9), NOW) == 0
    assert server.touch(columns(*KEYS, version=1), NOW) == 0
    assert not Session.objects.exists()


def test_update_is_guarded_by_the_version(server: SessionServer) -> None:
    """An old version never overwrites a newer one, and a repetition changes nothing."""
    server.insert(columns("aaaaaaaa", data="five", version=5), NOW)

    for version in (4, 5):
        assert server.update(columns("aaaaaaaa", data="old", version=version), NOW) == 0
    assert Session.objects.get(pk="aaaaaaaa").session_data == "five"


def test_update_is_guarded_by_the_fence(server: SessionServer) -> None:
    server.insert(columns("aaaaaaaa", fence=3), NOW)

    assert server.update(columns("aaaaaaaa", version=2, fence=2), NOW) == 0
    assert server.update(columns("aaaaaaaa", version=2, fence=3), NOW) == 1


def test_touch_writes_only_the_expiry(server: SessionServer) -> None:
    server.insert(columns(*KEYS, version=4), NOW)
    later = columns(*KEYS, data="not this", version=4)._replace(expires_at=[NOW + 999] * 3)

    assert server.touch(later, NOW + 1) == 3

    row = Session.objects.get(pk="aaaaaaaa")
    assert row.session_data == "data"
    assert row.expire_date.timestamp() == NOW + 999


def test_touch_is_for_the_very_version(server: SessionServer) -> None:
    server.insert(columns("aaaaaaaa", version=4), NOW)

    assert server.touch(columns("aaaaaaaa", version=3), NOW) == 0
    assert server.touch(columns("aaaaaaaa", version=5), NOW) == 0


def test_delete(server: SessionServer) -> None:
    server.insert(columns(*KEYS), NOW)

    server.delete(["bbbbbbbb", "nosuchkey"])
    server.delete([])

    assert set(Session.objects.values_list("pk", flat=True)) == {"aaaaaaaa", "cccccccc"}


def test_states(server: SessionServer) -> None:
    server.insert(columns("aaaaaaaa", version=3, fence=2), NOW)
    Session.objects.create(session_key="bbbbbbbb", session_data="", expire_date="2030-01-01T00:00Z")

    assert server.states(["aaaaaaaa", "bbbbbbbb", "nosuchkey"]) == {
        "aaaaaaaa": State(3, 2, "node#1", NOW + 100, "data"),
        "bbbbbbbb": State(1, 0, "", 1893456000.0, ""),
    }


def test_exists_means_alive(server: SessionServer) -> None:
    server.insert(columns("aaaaaaaa"), NOW)

    assert server.exists("aaaaaaaa", NOW) is True
    assert server.exists("aaaaaaaa", NOW + 100) is False
    assert server.exists("bbbbbbbb", NOW) is False


def test_clear_expired(server: SessionServer) -> None:
    server.insert(columns(*KEYS), NOW)
    server.insert(columns("longlived")._replace(expires_at=[NOW + 9999]), NOW)

    assert server.clear_expired(NOW + 99) == 0
    assert server.clear_expired(NOW + 101) == 3
    assert Session.objects.get().pk == "longlived"


@pytest.mark.parametrize(
    ("owner", "state", "ago", "is_cleared"),
    [
        (None, "", 1, True),
        ("node#1", "alive", 1, True),
        ("node#0", "", 1, True),
        ("other#1", "alive", 1, False),
        ("other#1", "alive", 3599, False),
        ("other#1", "alive", 3601, True),
        ("other#1", "dead", 1, True),
        ("other#1", "", 1, False),
        ("other#1", "", 3601, True),
    ],
)
def test_clear_expired_leaves_other_nodes_their_time(
    server: SessionServer, owner: str | None, state: str, ago: float, is_cleared: bool
) -> None:
    """A node that may live may have extended it: another one gets it from there, not nothing."""
    expired = datetime.fromtimestamp(NOW - ago, UTC)
    Session.objects.create(pk="aaaaaaaa", session_data="x", expire_date=expired, owner=owner)
    if owner and state:
        Node.objects.create(node=owner, died_at=expired if state == "dead" else None)

    assert server.clear_expired(NOW) == is_cleared
    assert Session.objects.exists() != is_cleared


def test_clear_expired_passes_over_what_somebody_holds(server: SessionServer) -> None:
    """It does not wait, and finds it the next time."""
    server.insert(columns(*KEYS), NOW)
    with second_connection() as other, other.transaction():
        other.execute(
            "SELECT FROM deferred_sessions_session WHERE session_key = %s FOR UPDATE", [KEYS[0]]
        )
        assert server.clear_expired(NOW + 101) == 2
    assert server.clear_expired(NOW + 101) == 1


def test_clear_expired_in_batches(server: SessionServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deferred_sessions.servers.server.CLEAR_BATCH", 2)
    server.insert(columns(*KEYS), NOW)

    assert server.clear_expired(NOW + 101) == 3


@pytest.mark.parametrize("use_tz", [True, False])
@pytest.mark.parametrize("zone", ["UTC", "Asia/Kathmandu"])
def test_times_do_not_depend_on_the_time_zone(
    server: SessionServer, settings: object, use_tz: bool, zone: str
) -> None:
    settings.USE_TZ, settings.TIME_ZONE = use_tz, zone  # type: ignore[attr-defined]
    server.insert(columns("aaaaaaaa"), NOW)

    row = server.read("aaaaaaaa")
    assert row is not None
    assert (row.expires_at, row.created_at, row.written_at) == (NOW + 100, NOW, NOW)
    assert server.exists("aaaaaaaa", NOW + 99)
    assert not server.exists("aaaaaaaa", NOW + 101)


def test_single_sessions_show_in_query_logs(server: SessionServer) -> None:
    """`assertNumQueries` and debug toolbars see what a request did."""
    with CaptureQueriesContext(connection) as queries:
        server.insert(columns("aaaaaaaa"), NOW)
        server.read("aaaaaaaa")
        server.update(columns("aaaaaaaa", version=2), NOW)
        server.delete(["aaaaaaaa"])

    assert len(queries) == 4


@pytest.mark.parametrize("statement", ["UPDATE", "UPDATE_ALONE", "TOUCH"])
def test_each_row_of_a_batch_is_found_by_its_key(server: SessionServer, statement: str) -> None:
    """Also where a batch is so large a part of the table that a hash join would cost less."""
    keys = [f"{number:032x}" for number in range(2000)]
    server.insert(columns(*keys), NOW)
    batch = columns(*keys[::4], version=2)
    parameters: list[Any] = server.update_parameters(batch, NOW)
    if statement == "TOUCH":
        parameters = [server.owner(), NOW, batch.key, *batch[2:5], server.name()]

    with connection.cursor() as cursor:
        cursor.execute("ANALYZE deferred_sessions_session")
        cursor.execute(f"EXPLAIN {getattr(sql, statement)}".replace("%b", "%s"), parameters)
        plan = "\n".join(line for (line,) in cursor.fetchall())

    assert "Nested Loop" in plan, plan
    assert "Seq Scan" not in plan, plan


# Streams


def test_a_stream_does_what_update_does(server: SessionServer) -> None:
    server.insert(columns(*KEYS), NOW)
    stream = server.update_stream()
    assert stream is not None

    stream.send(server.update_parameters(columns(*KEYS, data="new", version=2), NOW))
    encoded = [stream.encoded(column) for column in columns(*KEYS, data="new", version=3)[UPDATED]]
    assert stream.rows() == 3
    stream.send(server.update_parameters(encoded, NOW))
    assert stream.rows() == 3

    assert Session.objects.get(pk="aaaaaaaa").version == 3
    stream.send(server.update_parameters(columns(*KEYS, version=3), NOW))
    assert stream.rows() == 0


def test_a_stream_can_send_more_than_the_socket_holds(server: SessionServer) -> None:
    big = "x" * 20_000_000
    server.insert(columns("aaaaaaaa"), NOW)
    stream = server.update_stream()
    assert stream is not None

    stream.send(server.update_parameters(columns("aaaaaaaa", data=big, version=2), NOW))

    assert stream.rows() == 1
    assert len(Session.objects.get(pk="aaaaaaaa").session_data) == 20_000_000


def test_a_stream_survives_a_failed_statement(server: SessionServer) -> None:
    server.insert(columns("aaaaaaaa"), NOW)
    stream = server.update_stream()
    assert stream is not None

    stream.send(server.update_parameters(columns("aaaaaaaa", data="nul\0", version=2), NOW))
    assert stream.rows() == 0
    stream.send(server.update_parameters(columns("aaaaaaaa", version=2), NOW))
    assert stream.rows() == 1


def test_a_stream_whose_connection_breaks(server: SessionServer) -> None:
    server.insert(columns("aaaaaaaa"), NOW)
    stream = server.update_stream()
    assert stream is not None
    _terminate()

    with pytest.raises(psycopg.Error):
        stream.send(server.update_parameters(columns("aaaaaaaa", version=2), NOW))
        stream.rows()

    assert server.update_stream() is not None


def test_no_stream_in_a_transaction(server: SessionServer) -> None:
    """What is written there must not commit by itself."""
    with transaction.atomic():
        assert server.update_stream() is None


# Failures


def test_a_dead_connection_is_replaced_once(server: SessionServer) -> None:
    """PostgreSQL was restarted while the connection was idle: nobody notices."""
    server.insert(columns("aaaaaaaa"), NOW)
    _terminate()

    assert server.read("aaaaaaaa") is not None


def test_in_a_transaction_a_dead_connection_is_an_error(server: SessionServer) -> None:
    with pytest.raises(ServerUnavailableError), transaction.atomic():
        server.read("aaaaaaaa")
        _terminate()
        server.read("aaaaaaaa")


def test_an_unreachable_server(server: SessionServer, unreachable: None) -> None:
    for ask in (
        lambda: server.read("aaaaaaaa"),
        lambda: server.exists("aaaaaaaa", NOW),
        lambda: server.insert(columns("aaaaaaaa"), NOW),
        lambda: server.update(columns(*KEYS), NOW),
        lambda: server.delete(["aaaaaaaa"]),
        lambda: server.clear_expired(NOW),
        server.update_stream,
    ):
        with pytest.raises(ServerUnavailableError, match=r"cannot be asked|a moment ago"):
            ask()
    with pytest.raises(ServerUnavailableError), server.batch():
        pass


def test_unavailable_is_a_connection_error() -> None:
    assert issubclass(ServerUnavailableError, ConnectionError)


def test_a_read_only_server_is_unavailable(server: SessionServer) -> None:
    """A failed-over or read-only database is never reported as "session deleted"."""
    server.insert(columns("aaaaaaaa"), NOW)
    with connection.cursor() as cursor:
        cursor.execute("SET default_transaction_read_only = on")
    try:
        with pytest.raises(ServerUnavailableError, match="read-only"):
            server.update(columns("aaaaaaaa", version=2), NOW)
        assert server.read("aaaaaaaa") is not None
    finally:
        connection.close()


def test_a_missing_table_is_unavailable(server: SessionServer) -> None:
    """Not migrated yet: that says nothing about any session."""
    with connection.cursor() as cursor:
        cursor.execute("ALTER TABLE deferred_sessions_session RENAME TO elsewhere")
    try:
        with pytest.raises(ServerUnavailableError, match="manage.py migrate.*does not exist"):
            server.read("aaaaaaaa")
    finally:
        with connection.cursor() as cursor:
            cursor.execute("ALTER TABLE elsewhere RENAME TO deferred_sessions_session")


def test_refused_rows_are_told_apart(server: SessionServer) -> None:
    with pytest.raises(RowRefusedError), server.batch():
        server.insert(columns("aaaaaaaa", data="a"), NOW)
        server.insert(columns("x" * 41, data="b"), NOW)

    assert not Session.objects.exists()  # as a whole or not at all


def test_a_batch_does_not_wait_long_for_a_lock(
    server: SessionServer, locked: Callable[[str], None]
) -> None:
    server.insert(columns(*KEYS), NOW)
    locked("bbbbbbbb")
    started = time.monotonic()

    with pytest.raises(RowLockedError), server.batch():
        server.update(columns(*KEYS, version=2), NOW)

    assert time.monotonic() - started < 10
    assert server.unlocked(KEYS) == {"aaaaaaaa", "cccccccc"}
    with connection.cursor() as cursor:
        cursor.execute("SHOW lock_timeout")
        assert cursor.fetchone() == ("0",)


def test_a_stream_does_not_wait_long_for_a_lock(
    server: SessionServer, locked: Callable[[str], None]
) -> None:
    server.insert(columns(*KEYS), NOW)
    locked("bbbbbbbb")
    stream = server.update_stream()
    assert stream is not None

    stream.send(server.update_parameters(columns(*KEYS, version=2), NOW))

    assert stream.rows() == 0
    assert Session.objects.get(pk="aaaaaaaa").version == 1


def test_a_batch_within_a_transaction_leaves_its_lock_timeout_alone(
    server: SessionServer,
) -> None:
    with transaction.atomic():
        with server.batch():
            server.insert(columns(*KEYS), NOW)
        with connection.cursor() as cursor:
            cursor.execute("SHOW lock_timeout")
            assert cursor.fetchone() == ("0",)


def test_a_failed_batch_leaves_the_transaction_of_the_application_usable(
    server: SessionServer,
) -> None:
    with transaction.atomic():
        with pytest.raises(RowRefusedError), server.batch():
            server.insert(columns("x" * 41), NOW)
        Session.objects.create(
            session_key="survivor", session_data="", expire_date="2030-01-01T00:00Z"
        )

    assert Session.objects.get().pk == "survivor"


@pytest.fixture
def locked() -> Iterator[Callable[[str], None]]:
    """Hold rows in another transaction until the end of the test."""
    release, threads = threading.Event(), []

    def lock(key: str) -> None:
        is_held = threading.Event()

        def hold() -> None:
            with transaction.atomic():
                Session.objects.select_for_update().get(pk=key)
                is_held.set()
                release.wait()
            connection.close()

        threads.append(threading.Thread(target=hold))
        threads[-1].start()
        is_held.wait()

    yield lock
    release.set()
    for thread in threads:
        thread.join()


def _terminate() -> None:
    """Have PostgreSQL end our connection behind our back."""
    connection.ensure_connection()
    pid = connection.connection.info.backend_pid
    settings = connection.get_connection_params()
    for name in ("context", "cursor_factory", "prepare_threshold"):
        settings.pop(name, None)
    with psycopg.connect(**settings, autocommit=True) as other:
        other.execute("SELECT pg_terminate_backend(%s, 5000)", [pid])
