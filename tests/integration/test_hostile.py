"""Visitors with bad intentions, and data that wants to break things."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from django.contrib.auth.models import User
from django.db import connection
from django.test import Client
from django.test.utils import CaptureQueriesContext
from django.utils.crypto import get_random_string

from deferred_sessions.backend import SessionStore
from deferred_sessions.models import Session
from deferred_sessions.runtime import Runtime
from tests.integration.conftest import created, forget, record, row

pytestmark = pytest.mark.django_db(transaction=True)
Call = Callable[..., Any]
NAME, PASSWORD = "ada", "secret"
MIB = 1 << 20


@pytest.fixture
def ada() -> User:
    return User.objects.create_user(NAME, password=PASSWORD)


def with_cookie(key: str) -> Client:
    client = Client()
    client.cookies["sessionid"] = key
    return client


def log_in(client: Client) -> Any:
    return client.post("/probe/login/", {"username": NAME, "password": PASSWORD})


def user_of(client: Client) -> str:
    return str(client.session.get("_auth_user_id", ""))


@pytest.mark.parametrize("middleware", ["django.contrib.sessions", "deferred_sessions"])
def test_a_flood_of_unknown_keys(runtime: Runtime, settings: Any, middleware: str) -> None:
    """One cheap query each, and nothing is kept; the cookie is taken back."""
    settings.MIDDLEWARE = [
        f"{middleware}.middleware.SessionMiddleware" if name.endswith("SessionMiddleware") else name
        for name in settings.MIDDLEWARE
    ]
    with CaptureQueriesContext(connection) as queries:
        for _ in range(200):
            response = with_cookie(get_random_string(32)).get("/probe/read/")
            assert response.cookies["sessionid"].value == ""

    assert len(queries) == 200
    assert runtime.store.status().records == 0
    assert not runtime.cache._entries
    assert Session.objects.count() == 0


@pytest.mark.parametrize(
    "key", ["x" * 32, "short", "\0" * 32, "é" * 32, "../../etc/passwd", "9" * 9000]
)
def test_a_planted_key_is_never_taken_over(runtime: Runtime, ada: User, key: str) -> None:
    """Session fixation: the attacker chose the cookie, and the visitor logs in with it."""
    victim = with_cookie(key)
    log_in(victim)

    assert user_of(victim) == str(ada.pk)
    assert victim.cookies["sessionid"].value != key
    assert SessionStore(key).load() == {}


def test_a_planted_session_is_left_behind_at_login(runtime: Runtime, ada: User) -> None:
    """The attacker's own session, with something in it."""
    planted = created(cart=[1])
    victim, attacker = with_cookie(str(planted.session_key)), with_cookie(str(planted.session_key))
    log_in(victim)

    assert victim.session["cart"] == [1]
    assert victim.cookies["sessionid"].value != planted.session_key
    attacker.get("/probe/read/")
    assert user_of(attacker) == ""


def test_a_key_is_dead_after_logout(runtime: Runtime, ada: User) -> None:
    """In memory, in PostgreSQL, after an eviction, and for a save that is under way."""
    visitor = Client()
    log_in(visitor)
    key = visitor.cookies["sessionid"].value
    visitor.post("/probe/logout/")

    for prepare in (lambda: None, lambda: forget(runtime), runtime.store.clear):
        prepare()
        assert SessionStore(key).load() == {}
        thief = with_cookie(key)
        thief.get("/probe/count/")
        assert user_of(thief) == ""
        assert thief.cookies["sessionid"].value != key


@pytest.fixture
def atomic_requests() -> Iterator[None]:
    connection.settings_dict["ATOMIC_REQUESTS"] = True
    yield
    connection.settings_dict["ATOMIC_REQUESTS"] = False


@pytest.mark.usefixtures("atomic_requests")
def test_atomic_requests(runtime: Runtime, ada: User) -> None:
    """Each view in a transaction: what it saved counts, also if the view then fails."""
    visitor = Client(raise_request_exception=False)
    for expected in (1, 2, 3):
        assert visitor.get("/probe/count/").json()["value"] == expected
    assert visitor.get("/probe/fail/").status_code == 500
    assert visitor.get("/probe/count/").json()["value"] == 4
    log_in(visitor)
    assert user_of(visitor) == str(ada.pk)
    assert visitor.get("/probe/locked/").json()["value"] == 5
    runtime.flusher.flush_once(time.time(), everything=True)

    key = visitor.cookies["sessionid"].value
    assert (row(key) or {})["count"] == 5
    assert Session.objects.count() == 1
    visitor.post("/probe/logout/")
    runtime.flusher.flush_once(time.time(), everything=True)
    assert row(key) is None


# Data


def test_odd_names_and_values(runtime: Runtime, call: Call) -> None:
    """NUL, lone surrogates, emoji, numbers as names: as Django's serializer keeps them."""
    session = created(a=1)
    values = {"\0": "\0", "é\ud800": "\ud800", "🦆": ["🦆"], "": "", "x" * 1000: None}
    session.update(values)
    call(session, "save")
    runtime.flusher.flush_once(time.time(), everything=True)

    assert not record(runtime, session).is_dirty
    assert row(session.session_key) == {"a": 1, **values}
    forget(runtime)
    assert call(SessionStore(session.session_key), "load") == {"a": 1, **values}


def test_a_value_that_cannot_be_saved_changes_nothing(runtime: Runtime, call: Call) -> None:
    session = created(a=1)
    again = SessionStore(session.session_key)
    again["a"], again["b"] = 2, object()
    with pytest.raises(TypeError):
        call(again, "save")
    with pytest.raises(TypeError), again.lock("a"):
        again["c"] = 3

    assert SessionStore(session.session_key).load() == {"a": 1}
    assert not record(runtime, session).is_dirty


@pytest.mark.parametrize("size", [10 * MIB, 20 * MIB])
def test_a_huge_session(runtime: Runtime, call: Call, size: int) -> None:
    """One that fits into memory with others gone, and one that never will: both are kept."""
    text = get_random_string(1000) * (size // 1000)
    small, session = created(a=1), created(a=1)
    session["text"] = text
    call(session, "save")
    assert call(SessionStore(session.session_key), "load") == {"a": 1, "text": text}
    session["a"] = 2
    call(session, "save")
    runtime.flusher.flush_once(time.time(), everything=True)

    assert row(session.session_key) == {"a": 2, "text": text}
    assert SessionStore(small.session_key).load() == {"a": 1}
    call(session, "delete")
    assert call(SessionStore(session.session_key), "load") == {}
