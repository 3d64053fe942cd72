"""Sessions of the engine that the site used before are taken over on first use."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from django.contrib.sessions.models import Session as OldRow
from django.core.cache import caches
from django.db import connection, transaction
from django.test import Client

from deferred_sessions.adoption import Adoption
from deferred_sessions.backend import SessionStore
from deferred_sessions.exceptions import ServerUnavailableError
from deferred_sessions.models import Session
from deferred_sessions.old_engine import OldEngine
from deferred_sessions.runtime import Runtime, get_runtime, reset_runtime
from deferred_sessions.servers.moves import Moves
from testproject.brokers import redis
from tests.integration.conftest import forget, row

pytestmark = pytest.mark.django_db(transaction=True)

DJANGO = "django.contrib.sessions.backends"
KINDS = ("db", "cached_db", "file", "cache")
HOUR = 3600


@pytest.fixture(autouse=True)
def _empty(transactional_db: None) -> None:
    """Forget what other tests took over."""
    with connection.cursor() as cursor:
        cursor.execute("DELETE FROM deferred_sessions_adopted")


@pytest.fixture
def old(
    request: pytest.FixtureRequest, tune: Callable[..., Runtime], settings: Any, tmp_path: Path
) -> Callable[..., Any]:
    """The engine of before, and its sessions: `old(key)`; the first one is `old.session`."""
    settings.SESSION_FILE_PATH = str(tmp_path)
    name = getattr(request, "param", "db")
    store: Any = import_module(f"{DJANGO}.{name}").SessionStore
    if hasattr(store, "_storage_path"):
        del store._storage_path
    caches["default"].clear()
    tune(IMPORT_ENGINE=f"{DJANGO}.{name}")
    return store


every_kind = pytest.mark.parametrize("old", KINDS, indirect=True)


def session_of(old: Any, expiry: int | None = None, **values: Any) -> str:
    """Create a session of the old engine; return its key."""
    session = old()
    session.update(values)
    if expiry is not None:
        session.set_expiry(expiry)
    session.save()
    return str(session.session_key)


@every_kind
def test_a_session_is_taken_over_on_first_use(old: Any, call: Callable[..., Any]) -> None:
    """Under its own key; from then on it lives here."""
    key = session_of(old, user="ann", _auth_user_id="7")

    session = SessionStore(key)
    assert call(session, "load") == {"user": "ann", "_auth_user_id": "7"}
    assert session.session_key == key
    assert row(key) == {"user": "ann", "_auth_user_id": "7"}
    assert Session.objects.get(pk=key).user_id == "7"
    session["cart"] = 1
    call(session, "save")

    assert SessionStore(key)["cart"] == 1
    assert "cart" not in old(key).load()


@every_kind
def test_it_exists_before_it_is_taken_over(old: Any, call: Callable[..., Any]) -> None:
    key = session_of(old, a=1)
    assert call(SessionStore(), "exists", key)
    assert not call(SessionStore(), "exists", "nobodyhasthiskey")


@every_kind
def test_its_expiry_is_kept(old: Any) -> None:
    key = session_of(old, expiry=HOUR, a=1)

    assert SessionStore(key)["a"] == 1

    left = Session.objects.get(pk=key).expire_date.timestamp() - time.time()
    assert HOUR - 60 < left <= HOUR


@pytest.mark.parametrize("old", ["db", "file"], indirect=True)
def test_what_has_expired_is_not_taken_over(old: Any) -> None:
    key = session_of(old, expiry=-5, a=1)
    assert SessionStore(key).load() == {}
    assert row(key) is None


def test_an_unknown_key_is_no_session(old: Any) -> None:
    session = SessionStore("nobodyhasthiskey")
    assert session.load() == {}
    assert session.session_key is None


@every_kind
def test_a_logout_ends_it_in_both_engines(old: Any, call: Callable[..., Any]) -> None:
    key = session_of(old, a=1)
    session = SessionStore(key)
    call(session, "load")

    call(session, "flush")

    assert not old().exists(key)
    assert SessionStore(key).load() == {}


@every_kind
def test_a_deletion_of_what_was_never_used_here_ends_it(old: Any) -> None:
    key = session_of(old, a=1)
    SessionStore().delete(key)
    assert not old().exists(key)
    assert SessionStore(key).load() == {}


@pytest.mark.parametrize("way", ["logout", "expiry", "sql", "unused"])
def test_what_has_ended_here_does_not_come_back(
    old: Any, runtime: Runtime, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    """However it ended, long after, on a node that never knew it, though the old engine has it."""
    key = session_of(old, a=1)
    monkeypatch.setattr(OldEngine, "delete", lambda self, key: None)
    if way != "unused":
        assert SessionStore(key)["a"] == 1
    if way in ("logout", "unused"):
        SessionStore().delete(key)
    elif way == "sql":
        Session.objects.filter(pk=key).delete()
    else:
        Session.objects.filter(pk=key).update(expire_date="2020-01-01T00:00Z")
        runtime.revocations.read_once(time.time())
        SessionStore.clear_expired()
        assert not Session.objects.filter(pk=key).exists()
    with connection.cursor() as cursor:
        cursor.execute("DELETE FROM deferred_sessions_revocation")
    forget(get_runtime())

    assert old().exists(key)
    assert SessionStore(key).load() == {}


def test_the_new_key_of_a_login_is_the_only_one(old: Any) -> None:
    """`cycle_key` leaves nothing behind under the key of before the login."""
    key = session_of(old, a=1)
    session = SessionStore(key)
    session.cycle_key()
    assert session.session_key != key
    assert SessionStore(key).load() == {}
    assert SessionStore(session.session_key)["a"] == 1


def test_many_at_once_take_it_over_once(old: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """All have read it in the old engine before the first of them creates it."""
    key, meeting = session_of(old, a=1), threading.Barrier(6, timeout=30)
    real, found, errors = OldEngine.read, [], []

    def read(self: OldEngine, key: str) -> Any:
        session = real(self, key)
        meeting.wait()
        return session

    def visit() -> None:
        try:
            session = SessionStore(key)
            found.append(session.load())
            session[threading.current_thread().name] = 1
            session.save()
        except Exception as error:  # noqa: BLE001 - for the assertion
            errors.append(repr(error))
            meeting.abort()
        finally:
            connection.close()

    monkeypatch.setattr(OldEngine, "read", read)
    threads = [threading.Thread(target=visit, name=f"t{n}") for n in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert (errors, len(found)) == ([], 6)
    assert all(each["a"] == 1 for each in found)
    assert set(SessionStore(key).load()) == {"a", *(f"t{n}" for n in range(6))}
    assert Session.objects.count() == 1


def test_a_logout_while_it_is_taken_over(old: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other request had read it in the old engine, and comes too late."""
    key, real = session_of(old, a=1), OldEngine.read

    def read(self: OldEngine, key: str) -> Any:
        session = real(self, key)
        SessionStore().delete(key)
        return session

    monkeypatch.setattr(OldEngine, "read", read)

    assert SessionStore(key).load() == {}
    assert not Session.objects.exists()


def test_within_a_transaction_that_is_rolled_back(old: Any) -> None:
    """What it has taken over stays, and what is saved in it counts."""
    key = session_of(old, a=1)
    with transaction.atomic():
        OldRow.objects.update(session_data="")  # the transaction has written before
        transaction.set_rollback(True)
    with transaction.atomic():
        OldRow.objects.filter(pk="none").delete()
        session = SessionStore(key)
        session["b"] = 2
        session.save()
        transaction.set_rollback(True)

    assert SessionStore(key).load() == {"a": 1, "b": 2}
    assert row(key) == {"a": 1}


def test_a_logout_in_a_transaction_that_is_rolled_back(old: Any) -> None:
    key = session_of(old, a=1)
    with transaction.atomic():
        SessionStore().delete(key)
        transaction.set_rollback(True)
    forget(get_runtime())

    assert old().exists(key)  # its deletion was rolled back
    assert SessionStore(key).load() == {}


# Trouble


@pytest.fixture
def broken(old: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Yield the key of a session whose table is away."""
    key = session_of(old, a=1)
    with connection.cursor() as cursor:
        cursor.execute("ALTER TABLE django_session RENAME TO away")
        yield key
        cursor.execute("ALTER TABLE IF EXISTS away RENAME TO django_session")


def test_trouble_there_is_not_no_session(broken: str, call: Callable[..., Any]) -> None:
    session = SessionStore(broken)
    with pytest.raises(ServerUnavailableError, match="could not read sessions: ProgrammingError"):
        call(session, "load")
    assert session.session_key == broken


def test_trouble_there_leaves_a_transaction_as_it_was(broken: str) -> None:
    with transaction.atomic():
        with pytest.raises(ServerUnavailableError):
            SessionStore(broken).load()
        SessionStore().delete(broken)
        Session.objects.create(
            session_key="other", session_data="", expire_date="2030-01-01T00:00Z"
        )
    assert Session.objects.filter(pk="other").exists()


def test_visitors_are_asked_to_come_again(broken: str, client: Client) -> None:
    client.cookies["sessionid"] = broken
    answer = client.get("/probe/read/a/")
    assert answer.status_code == 503
    assert not answer.cookies


def test_trouble_there_never_fails_a_logout(broken: str, caplog: pytest.LogCaptureFixture) -> None:
    SessionStore().delete(broken)
    assert "deleted here, but perhaps not in the engine of before" in caplog.text
    assert broken not in caplog.text
    with connection.cursor() as cursor:
        cursor.execute("ALTER TABLE away RENAME TO django_session")
    assert SessionStore(broken).load() == {}


def test_what_cannot_be_encoded_stays_where_it_was(
    old: Any, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = session_of(old, a=1)
    monkeypatch.setattr(old, "decode", lambda self, text: {"secret": object()})
    with caplog.at_level(logging.ERROR):
        assert SessionStore(key).load() == {}
    assert "SESSION_SERIALIZER cannot encode" in caplog.text
    assert key not in caplog.text
    monkeypatch.undo()
    get_runtime().store.clear()
    assert SessionStore(key)["a"] == 1


# Redis


@pytest.fixture
def on_redis(settings: Any, tmp_path: Path, tune: Callable[..., Runtime]) -> Iterator[Any]:
    """Sessions in Redis, and the way to end it."""
    with redis(tmp_path / "redis") as url:
        cache = {"BACKEND": "django.core.cache.backends.redis.RedisCache", "LOCATION": url}
        settings.CACHES = {"default": {**cache, "KEY_PREFIX": "shop*"}}
        tune(IMPORT_ENGINE=f"{DJANGO}.cache")
        yield import_module(f"{DJANGO}.cache").SessionStore
        caches["default"].close()


def test_from_redis_with_its_expiry(on_redis: Any) -> None:
    key = session_of(on_redis, a=1)
    store = on_redis(key)
    store._cache.touch(store.cache_key, HOUR)

    assert SessionStore(key)["a"] == 1

    left = Session.objects.get(pk=key).expire_date.timestamp() - time.time()
    assert HOUR - 60 < left <= HOUR


def test_redis_is_away(on_redis: Any, settings: Any) -> None:
    """Django's own engine would say that there is no such session."""
    key = session_of(on_redis, a=1)
    store = on_redis(key)
    store._cache._cache.get_client(write=True).shutdown(nosave=True)
    assert on_redis(key).load() == {}

    with pytest.raises(ServerUnavailableError, match="could not read sessions: ConnectionError"):
        SessionStore(key).load()


# Memory of it


def test_what_was_taken_over_is_forgotten_in_time(old: Any, settings: Any, now: float) -> None:
    key = session_of(old, expiry=HOUR, a=1)
    assert SessionStore(key)["a"] == 1
    runtime = get_runtime()
    later = now + HOUR + settings.SESSION_COOKIE_AGE + 86_400

    runtime.flusher.clear_expired(later - 600)
    assert Moves(runtime.server).spent([key]) == {key}
    runtime.flusher.clear_expired(later + 600)
    assert Moves(runtime.server).spent([key]) == set()


def test_no_engine_of_before_costs_nothing(
    tune: Callable[..., Runtime], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Adoption, "take_over", None)
    tune(IMPORT_ENGINE=None)
    assert SessionStore("nobodyhasthiskey").load() == {}
    reset_runtime()
