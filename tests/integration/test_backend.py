"""The session engine on real PostgreSQL: what is written when, and what is not."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from typing import Any

import pytest
from asgiref.sync import async_to_sync
from django.contrib.sessions.backends.base import CreateError, UpdateError
from django.contrib.sessions.backends.db import SessionStore as DjangoStore
from django.db import connection
from django.db.models.functions import Now
from django.test.utils import CaptureQueriesContext

from deferred_sessions.backend import SessionStore
from deferred_sessions.exceptions import RowRefusedError, ServerUnavailableError
from deferred_sessions.memory.counters import Counter
from deferred_sessions.models import Session
from deferred_sessions.runtime import Runtime
from tests.integration.conftest import (
    Outage,
    change,
    created,
    forget,
    record,
    row,
)

pytestmark = pytest.mark.django_db(transaction=True)
Call = Callable[..., Any]


def test_a03_a_new_session_is_written_at_once(call: Call) -> None:
    """A03: PostgreSQL has the session when `save` returns."""
    session = SessionStore()
    session["a"] = 1
    call(session, "save")

    assert row(session.session_key) == {"a": 1}


def test_creation_is_one_statement(call: Call) -> None:
    """No `exists` query before the INSERT."""
    session = SessionStore()
    session["a"] = 1
    with CaptureQueriesContext(connection) as queries:
        if call.__name__ == "sync":
            session.save()
            assert len(queries) == 1
            assert queries[0]["sql"].lstrip().startswith("INSERT")


def test_a05_an_update_is_not_written(call: Call) -> None:
    """A05: between flushes PostgreSQL hears nothing."""
    session = created(a=1)
    session["a"] = 2
    with CaptureQueriesContext(connection) as queries:
        call(session, "save")
        assert call(SessionStore(session.session_key), "get", "a") == 2

    assert len(queries) == 0
    assert row(session.session_key) == {"a": 1}


def test_a_load_from_memory_asks_nobody(call: Call) -> None:
    session = created(a=1)

    with CaptureQueriesContext(connection) as queries:
        assert call(SessionStore(session.session_key), "load") == {"a": 1}

    assert len(queries) == 0


def test_a_miss_is_one_query_and_fills_memory(runtime: Runtime, call: Call) -> None:
    session = created(a=1)
    forget(runtime)

    assert call(SessionStore(session.session_key), "load") == {"a": 1}
    with CaptureQueriesContext(connection) as queries:
        assert call(SessionStore(session.session_key), "load") == {"a": 1}

    assert len(queries) == 0
    assert runtime.counters.totals()[Counter.MISSES] == 1


def test_a_change_after_a_miss_is_kept(runtime: Runtime, call: Call) -> None:
    """Trap 10: the first change after a failover is not lost."""
    session = created(a=1)
    forget(runtime)
    again = SessionStore(session.session_key)
    again["a"] = 2
    call(again, "save")

    runtime.flusher.flush_once(time.time(), everything=True)

    assert row(session.session_key) == {"a": 2}


def test_an_unknown_key_creates_nothing(call: Call) -> None:
    session = SessionStore("unknownkey")

    assert call(session, "load") == {}
    assert session.session_key is None
    assert not Session.objects.exists()


@pytest.mark.parametrize(
    "key",
    [
        "",
        "x",
        "x" * 7,
        "x" * 41,
        "x" * 100_000,
        "nul\0nul\0nul",
        "käseköpfe",
        "a b c d e",
        "';--'''''",
    ],
    ids=repr,
)
def test_hostile_keys_reach_no_tier(runtime: Runtime, call: Call, key: str) -> None:
    """A cookie can hold anything; what is not a key is refused before anybody is asked."""
    with CaptureQueriesContext(connection) as queries:
        session = SessionStore(key)
        assert call(session, "load") == {}
        assert session.session_key is None
        assert call(SessionStore(), "exists", key) is False
        call(SessionStore(), "delete", key)
        unloaded = SessionStore(key)
        unloaded.clear()
        if unloaded.session_key is not None:
            with pytest.raises(UpdateError):
                call(unloaded, "save")
            with pytest.raises(ValueError, match="8 to 40 characters"):
                call(unloaded, "save", must_create=True)

    assert len(queries) == 0
    assert not runtime.store.exists() or runtime.store.status().records == 0


def test_exists(runtime: Runtime, call: Call) -> None:
    session = created(a=1)

    assert call(SessionStore(), "exists", session.session_key) is True
    forget(runtime)
    assert call(SessionStore(), "exists", session.session_key) is True
    assert call(SessionStore(), "exists", "nosuchkey") is False
    assert call(SessionStore(), "exists", None) is False


def test_a_deleted_session_is_gone_everywhere(runtime: Runtime, call: Call) -> None:
    session = created(a=1)
    call(session, "delete")

    assert row(session.session_key) is None
    assert call(SessionStore(session.session_key), "load") == {}
    assert call(SessionStore(), "exists", session.session_key) is False
    forget(runtime)
    assert call(SessionStore(session.session_key), "load") == {}


def test_a_late_save_does_not_resurrect(runtime: Runtime, call: Call) -> None:
    """Trap 4: whoever still has the session cannot bring it back."""
    session = created(a=1)
    late, later = SessionStore(session.session_key), SessionStore(session.session_key)
    late["a"] = later["a"] = 2
    call(session, "delete")

    with pytest.raises(UpdateError):
        call(late, "save")
    forget(runtime)  # also when the tombstone is gone
    with pytest.raises(UpdateError):
        call(later, "save")

    runtime.flusher.flush_once(time.time(), everything=True)
    assert row(session.session_key) is None


def test_a_deleted_key_is_not_used_again(call: Call) -> None:
    session = created(a=1)
    call(session, "delete")

    with pytest.raises(CreateError):
        call(SessionStore(session.session_key), "save", must_create=True)


def test_a_taken_key_is_a_create_error(runtime: Runtime, call: Call) -> None:
    session = created(a=1)

    with pytest.raises(CreateError):
        call(SessionStore(session.session_key), "save", must_create=True)
    forget(runtime)
    with pytest.raises(CreateError):
        call(SessionStore(session.session_key), "save", must_create=True)
    assert row(session.session_key) == {"a": 1}


def test_a_collision_of_keys_tries_another(monkeypatch: pytest.MonkeyPatch, call: Call) -> None:
    session = created(a=1)
    keys = iter([session.session_key, session.session_key, "freshfreshfresh"])
    monkeypatch.setattr("deferred_sessions.backend.get_random_string", lambda *_: next(keys))

    other = SessionStore()
    other["b"] = 2
    call(other, "save")

    assert other.session_key == "freshfreshfresh"
    assert row(session.session_key) == {"a": 1}


def test_an_expired_session_is_empty_at_once(runtime: Runtime, call: Call) -> None:
    session = created(a=1)
    session.set_expiry(-10)
    call(session, "save")

    assert call(SessionStore(session.session_key), "load") == {}
    forget(runtime)
    assert call(SessionStore(session.session_key), "load") == {}
    assert call(SessionStore(), "exists", session.session_key) is False


def test_a_bad_expiry_changes_nothing(call: Call) -> None:
    """Trap 2: what cannot be saved leaves everything as it was."""
    session = created(a=1)
    session["a"] = 2
    session["_session_expiry"] = "next tuesday"

    with pytest.raises(ValueError, match="next tuesday"):
        call(session, "save")
    assert SessionStore(session.session_key).load() == {"a": 1}


def test_an_unencodable_value_changes_nothing(call: Call) -> None:
    """Trap 2: encode first."""
    session = created(a=1)
    again = SessionStore(session.session_key)
    again["a"] = 2
    again["bad"] = object()

    with pytest.raises(TypeError):
        call(again, "save")
    assert SessionStore(session.session_key).load() == {"a": 1}
    with pytest.raises(TypeError):
        call(again, "create")


def test_rows_are_djangos(runtime: Runtime, call: Call) -> None:
    """Django's own engine reads our rows, and we read its."""
    session = created(a=1, cart={"x": [1]})
    data = Session.objects.get(pk=session.session_key).session_data
    assert DjangoStore().decode(data) == {"a": 1, "cart": {"x": [1]}}

    Session.objects.create(
        session_key="djangosrow",
        session_data=DjangoStore().encode({"from": "django"}),
        expire_date="2100-01-01T00:00Z",
    )
    assert call(SessionStore("djangosrow"), "load") == {"from": "django"}


def test_a_damaged_row_is_an_empty_session(
    runtime: Runtime, call: Call, caplog: pytest.LogCaptureFixture
) -> None:
    """As Django has it: logged as suspicious, taken as empty, and usable."""
    session = created(a=1)
    Session.objects.update(session_data="damaged")
    forget(runtime)

    with caplog.at_level(logging.WARNING, "django.security.SuspiciousSession"):
        again = SessionStore(session.session_key)
        assert call(again, "load") == {}
    assert "Session data corrupted" in caplog.text

    again["b"] = 1
    call(again, "save")
    runtime.flusher.flush_once(time.time(), everything=True)
    assert row(session.session_key) == {"b": 1}


def test_unsaved_changes_stay_with_their_request(call: Call) -> None:
    session = created(cart={"items": [1]})
    for _ in range(2):
        mine = SessionStore(session.session_key)
        call(mine, "get", "cart")["items"].append(2)

    assert call(SessionStore(session.session_key), "get", "cart") == {"items": [1]}


def during_the_miss(
    runtime: Runtime, monkeypatch: pytest.MonkeyPatch, work: Callable[[str], object]
) -> None:
    """Have `work` done by somebody else after the next row was read, before it is used."""
    acquire = runtime.leases.acquire

    def slow(key: str, **options: bool) -> Any:
        found = acquire(key, **options)
        monkeypatch.undo()
        work(key)
        return found

    monkeypatch.setattr(runtime.leases, "acquire", slow)


def test_a_slow_miss_does_not_undo_a_save(
    runtime: Runtime, monkeypatch: pytest.MonkeyPatch, call: Call
) -> None:
    """Trap 4: what was read before somebody else's save is older than what memory has."""
    session = created(a=1)
    forget(runtime)
    during_the_miss(runtime, monkeypatch, lambda key: change(SessionStore(key), a=2))

    assert call(SessionStore(session.session_key), "load") == {"a": 2}
    assert record(runtime, session).is_changed


def test_a_slow_miss_does_not_resurrect(
    runtime: Runtime, monkeypatch: pytest.MonkeyPatch, call: Call
) -> None:
    """Trap 4: the row was read, then the session was deleted, then the row is used."""
    session = created(a=1)
    forget(runtime)
    during_the_miss(runtime, monkeypatch, lambda key: SessionStore(key).delete())

    assert call(SessionStore(session.session_key), "load") == {}
    assert runtime.store.get(session.session_key or "") is None


def test_a_row_with_strange_figures(runtime: Runtime, call: Call) -> None:
    """Somebody wrote into the table: what can be used is used."""
    session = created(a=1)
    forget(runtime)
    with connection.cursor() as cursor:
        cursor.execute(
            "UPDATE deferred_sessions_session SET version = -7, fence = -1, user_id = NULL, "
            "expire_date = 'infinity'"
        )
    again = SessionStore(session.session_key)
    assert call(again, "load") == {"a": 1}
    again["a"] = 2
    call(again, "save")
    runtime.flusher.flush_once(time.time() + 61)

    assert row(session.session_key) == {"a": 2}


def test_a_version_that_comes_back_is_not_the_one_in_the_cache(
    runtime: Runtime, call: Call
) -> None:
    """Evicted, changed by somebody else under the same number, and loaded again."""
    session = created(a=1)
    assert SessionStore(session.session_key)["a"] == 1
    runtime.store.update(session.session_key or "", lambda _: None)
    theirs = SessionStore()
    Session.objects.filter(pk=session.session_key).update(session_data=theirs.encode({"a": 2}))

    assert call(SessionStore(session.session_key), "load") == {"a": 2}
    assert call(SessionStore(session.session_key), "load") == {"a": 2}


def test_memory_is_evicted_between_load_and_save(runtime: Runtime, call: Call) -> None:
    """The save finds the session in PostgreSQL and goes on."""
    session = created(a=1)
    again = SessionStore(session.session_key)
    again["a"] = 2
    forget(runtime)
    call(again, "save")

    assert call(SessionStore(session.session_key), "load") == {"a": 2}


def test_creation_may_be_deferred(tune: Callable[..., Runtime], call: Call) -> None:
    """WRITE_ON_CREATE off: a new session is inserted by the flusher, like any change."""
    runtime = tune(WRITE_ON_CREATE=False)
    session = SessionStore()
    session["a"] = 1
    call(session, "save")
    assert row(session.session_key) is None
    assert call(SessionStore(session.session_key), "load") == {"a": 1}

    assert runtime.flusher.flush_once(time.time() + 61).inserted == 1
    assert row(session.session_key) == {"a": 1}


# The async half


def test_the_async_half_never_leaves_the_loop_on_a_hit(monkeypatch: pytest.MonkeyPatch) -> None:
    session = created(a=1)

    def no_threads(*_: object, **__: object) -> None:
        raise AssertionError("hopped to a thread")

    monkeypatch.setattr("deferred_sessions.backend.sync_to_async", no_threads)

    async def work() -> None:
        mine = SessionStore(session.session_key)
        assert await mine.aget("a") == 1
        await mine.aset("a", 2)
        await mine.asave()
        assert await SessionStore().aexists(session.session_key)
        assert await SessionStore(session.session_key).aload() == {"a": 2}

    asyncio.run(work())


def test_the_sync_half_may_be_used_in_async_code_on_a_hit() -> None:
    """No database is involved, so there is no SynchronousOnlyOperation."""
    session = created(a=1)

    async def work() -> None:
        mine = SessionStore(session.session_key)
        mine["a"] += 1
        mine.save()

    asyncio.run(work())
    assert SessionStore(session.session_key)["a"] == 2


def test_both_halves_store_the_same() -> None:
    """Trap 13: the async half forgets nothing that the sync half stores."""

    def columns(key: str | None) -> dict[str, Any]:
        values = Session.objects.filter(pk=key).values().get()
        for name in ("session_key", "session_data", "expire_date", "created_at", "written_at"):
            del values[name]
        return values

    one = created(_auth_user_id="7", a=1)
    one["_auth_user_id"] = "8"
    one.save()

    async def work() -> str | None:
        two = SessionStore()
        await two.aupdate({"_auth_user_id": "7", "a": 1})
        await two.asave()
        await two.aset("_auth_user_id", "8")
        await two.asave()
        return two.session_key

    key = async_to_sync(work)()
    assert columns(key) == columns(one.session_key)
    assert row(key) == row(one.session_key)


# Other contracts


def test_the_constructor_does_no_io(directory: Any) -> None:
    with CaptureQueriesContext(connection) as queries:
        SessionStore("somekey12345")
        SessionStore()

    assert len(queries) == 0
    assert not directory.exists()


def test_the_constructor_leaves_nothing_out() -> None:
    """It does not call Django's, so it must do all that Django's does."""
    for key in (None, "somekey12345", "short", ""):
        ours, djangos = SessionStore(key), DjangoStore(key)
        assert vars(ours) == {k: v for k, v in vars(djangos).items() if k != "serializer"}
        assert ours.serializer is djangos.serializer


def test_a_table_that_takes_no_session(call: Call) -> None:
    """A rule or a trigger swallows each insert: an error, not an endless loop."""
    with connection.cursor() as cursor:
        cursor.execute(
            "CREATE RULE swallow AS ON INSERT TO deferred_sessions_session DO INSTEAD NOTHING"
        )
    try:
        with pytest.raises(RowRefusedError, match="under any key"):
            call(SessionStore(), "create")
    finally:
        with connection.cursor() as cursor:
            cursor.execute("DROP RULE swallow ON deferred_sessions_session")


def test_clear_expired(runtime: Runtime, call: Call) -> None:
    """Expired sessions go, in PostgreSQL and in memory; what lives on in memory stays."""
    old, alive, extended = created(a=1), created(a=2), created(a=3)
    Session.objects.filter(pk__in=[old.session_key, extended.session_key]).update(
        expire_date="2020-01-01T00:00Z", written_at=Now()
    )
    runtime.store.update(old.session_key or "", lambda r: r and r._replace(expires_at=1.0))
    extended["a"] = 4
    extended.save()

    call(SessionStore(), "clear_expired")

    assert row(old.session_key) is None
    assert runtime.store.get(old.session_key or "") is None
    assert row(alive.session_key) == {"a": 2}
    assert row(extended.session_key) == {"a": 4}


def test_clear_expired_fails_if_it_cannot_flush(outage: Outage, call: Call) -> None:
    created(a=1)["b"] = 1
    outage.begin()

    with pytest.raises(ServerUnavailableError):
        call(SessionStore(), "clear_expired")


def test_the_model_is_ours() -> None:
    assert SessionStore.get_model_class() is Session
    assert Session.get_session_store_class() is SessionStore
    assert SessionStore().key_salt == "django.contrib.sessions.SessionStore"
