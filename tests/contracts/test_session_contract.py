"""What Django expects of a session engine.

Written anew after the behaviour that `SessionTestsMixin` of Django 5.2 and 6.1 asserts;
each test holds for Django's own engine too (see conftest).
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
from django.contrib.sessions.backends.base import CreateError, SessionBase, UpdateError
from django.contrib.sessions.backends.db import SessionStore as DjangoStore
from django.utils import timezone

Call = Callable[..., Any]
Engine = type[SessionBase]


@pytest.fixture
def session(engine: Engine) -> SessionBase:
    return engine()


def flags(session: SessionBase) -> tuple[bool, bool]:
    return session.accessed, session.modified


# What a session remembers of its use


def test_a_new_session_is_untouched(session: SessionBase) -> None:
    assert flags(session) == (False, False)


def test_reading_is_access(session: SessionBase, call: Call) -> None:
    assert call(session, "get", "cat") is None
    assert flags(session) == (True, False)


def test_setting_is_modification(session: SessionBase, call: Call) -> None:
    call(session, "set", "cat", "dog")
    assert flags(session) == (True, True)
    assert call(session, "pop", "cat") == "dog"


def test_popping_modifies_only_what_is_there(session: SessionBase, call: Call) -> None:
    assert call(session, "pop", "nothing", "fallback") == "fallback"
    assert call(session, "pop", "nothing", default="named") == "named"
    assert flags(session) == (True, False)

    call(session, "set", "some key", "exists")
    session.accessed = session.modified = False
    assert call(session, "pop", "some key") == "exists"
    assert flags(session) == (True, True)
    assert call(session, "get", "some key") is None


def test_popping_nothing_without_a_default(session: SessionBase, call: Call) -> None:
    with pytest.raises(KeyError):
        call(session, "pop", "nothing")


def test_setdefault(session: SessionBase, call: Call) -> None:
    assert call(session, "setdefault", "foo", "bar") == "bar"
    assert flags(session) == (True, True)
    session.accessed = session.modified = False

    assert call(session, "setdefault", "foo", "baz") == "bar"
    assert flags(session) == (True, False)


def test_update(session: SessionBase, call: Call) -> None:
    call(session, "update", {"update key": 1})

    assert flags(session) == (True, True)
    assert call(session, "get", "update key") == 1


def test_membership(session: SessionBase, call: Call) -> None:
    call(session, "set", "some key", 1)
    session.accessed = session.modified = False

    assert call(session, "has_key", "some key") is True
    assert call(session, "has_key", "other key") is False
    assert flags(session) == (True, False)


@pytest.mark.parametrize(
    ("view", "expected"), [("keys", ["x"]), ("values", [1]), ("items", [("x", 1)])]
)
def test_views(session: SessionBase, call: Call, view: str, expected: list[Any]) -> None:
    assert list(call(session, view)) == []
    assert flags(session) == (True, False)
    call(session, "set", "x", 1)
    session.accessed = session.modified = False

    assert list(call(session, view)) == expected
    assert flags(session) == (True, False)


def test_clear(session: SessionBase, call: Call) -> None:
    call(session, "set", "x", 1)
    session.accessed = session.modified = False

    session.clear()

    assert list(session.items()) == []
    assert flags(session) == (True, True)


def test_is_empty(session: SessionBase, call: Call) -> None:
    assert session.is_empty() is True
    call(session, "set", "x", 1)
    call(session, "save")
    assert session.is_empty() is False


def test_test_cookies(session: SessionBase, call: Call) -> None:
    assert call(session, "test_cookie_worked") is False
    call(session, "set_test_cookie")
    assert call(session, "test_cookie_worked") is True
    call(session, "delete_test_cookie")
    assert call(session, "test_cookie_worked") is False


# Life and death


def test_saved_means_it_exists(session: SessionBase, call: Call) -> None:
    call(session, "save")

    assert call(session, "exists", session.session_key) is True


def test_what_was_saved_is_loaded(engine: Engine, session: SessionBase, call: Call) -> None:
    call(session, "set", "cart", {"apples": [1, 2]})
    call(session, "save")

    assert call(engine(session.session_key), "get", "cart") == {"apples": [1, 2]}


def test_deleted_means_it_does_not_exist(session: SessionBase, call: Call) -> None:
    call(session, "save")
    call(session, "delete", session.session_key)

    assert call(session, "exists", session.session_key) is False


def test_delete_without_a_key_is_nothing(engine: Engine, call: Call) -> None:
    call(engine(), "delete")


def test_flush_starts_over(session: SessionBase, call: Call) -> None:
    call(session, "set", "foo", "bar")
    call(session, "save")
    before = session.session_key
    call(session, "flush")

    assert call(session, "exists", before) is False
    assert session.session_key is None
    assert flags(session) == (True, True)
    assert list(session.items()) == []


def test_cycle_key_keeps_the_data(engine: Engine, session: SessionBase, call: Call) -> None:
    call(session, "set", "a", 1)
    call(session, "set", "b", 2)
    call(session, "save")
    before, data = session.session_key, list(session.items())
    call(session, "cycle_key")

    assert session.session_key != before
    assert list(session.items()) == data
    assert call(engine(before), "load") == {}
    assert call(engine(session.session_key), "load") == dict(data)


def test_cycle_key_of_a_session_that_was_not_loaded(
    engine: Engine, session: SessionBase, call: Call
) -> None:
    call(session, "set", "a", 1)
    call(session, "save")
    unloaded = engine(session.session_key)
    assert not hasattr(unloaded, "_session_cache")
    call(unloaded, "cycle_key")

    assert list(unloaded.items()) == [("a", 1)]


def test_cycle_key_of_a_new_session(session: SessionBase, call: Call) -> None:
    call(session, "set", "a", 1)
    call(session, "cycle_key")

    assert session.session_key is not None
    assert call(session, "exists", session.session_key) is True


def test_saving_keeps_the_data_at_hand(session: SessionBase, call: Call) -> None:
    call(session, "set", "a", "b")
    call(session, "save")

    assert call(session, "get", "a") == "b"


def test_create_modifies(session: SessionBase, call: Call) -> None:
    call(session, "create")

    assert session.modified is True
    assert call(session, "exists", session.session_key) is True


def test_create_of_a_taken_key(engine: Engine, session: SessionBase, call: Call) -> None:
    call(session, "save")

    with pytest.raises(CreateError):
        call(engine(session.session_key), "save", must_create=True)


def test_save_of_a_key_that_never_was(engine: Engine, call: Call) -> None:
    """An unloaded session whose key nobody knows is not made by a save under that key."""
    session = engine("neverneverland")
    session.clear()

    with pytest.raises(UpdateError):
        call(session, "save")
    assert call(engine(), "exists", "neverneverland") is False


def test_a_late_save_does_not_resurrect(engine: Engine, session: SessionBase, call: Call) -> None:
    """Logged out in another window while this request was under way."""
    call(session, "set", "test_data", "value1")
    call(session, "save")
    here, there = engine(session.session_key), engine(session.session_key)
    call(here, "set", "test_data", "value2")
    call(there, "delete")

    with pytest.raises(UpdateError):
        call(here, "save")
    assert call(engine(session.session_key), "load") == {}


# Keys


@pytest.mark.parametrize("key", ["", "1", "1234567"])
def test_keys_that_are_too_short(engine: Engine, key: str) -> None:
    assert engine(key).session_key is None


def test_keys_that_are_long_enough(engine: Engine) -> None:
    assert engine("12345678").session_key == "12345678"


def test_a_key_that_is_too_short_is_replaced(engine: Engine, call: Call) -> None:
    session = engine("1")
    call(session, "save")

    assert session.session_key != "1"
    assert call(session, "get", "cat") is None
    call(session, "delete")


def test_the_key_is_read_only(session: SessionBase) -> None:
    with pytest.raises(AttributeError):
        session.session_key = "another"  # type: ignore[misc]


def test_loading_an_unknown_key_makes_nothing(engine: Engine, call: Call) -> None:
    """Nobody chooses the key of a session: that is how it is stolen (fixation)."""
    session = engine("someunknownkey")
    call(session, "load")

    assert session.session_key is None
    assert call(session, "exists", session.session_key) is False
    assert call(engine(), "exists", "someunknownkey") is False
    assert call(session, "load") == {}


def test_loading_an_overlong_key(engine: Engine, call: Call) -> None:
    """1240 characters are no key, and no error either."""
    session = engine("x" * 1240)

    assert call(session, "load") == {}
    assert session.session_key is None


# Rows


def test_encoding_round_trip(session: SessionBase) -> None:
    data = {"a test key": "a test value"}

    assert session.decode(session.encode(data)) == data


@pytest.mark.parametrize(
    "damaged", ["flaskdj:alkdjf", "flaskdj:alkdjf:alkdjf", "bad:encoded:value"]
)
def test_damaged_data_is_logged_and_empty(
    session: SessionBase, damaged: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "django.security.SuspiciousSession"):
        assert session.decode(damaged) == {}
    assert "corrupted" in caplog.text


def test_a_serializer_that_fails(session: SessionBase) -> None:
    class Failing:
        def dumps(self, obj: Any) -> bytes:
            return b"x"

        def loads(self, data: bytes) -> Any:
            raise ValueError

    encoded = session.encode({"a": 1})
    session.serializer = Failing  # type: ignore[attr-defined]
    assert session.decode(encoded) == {}


def test_rows_show_their_key_and_data(engine: Engine, call: Call) -> None:
    session = engine()
    call(session, "set", "x", 1)
    call(session, "save")
    row = engine.get_model_class().objects.get(pk=session.session_key)  # type: ignore[attr-defined]

    key = str(session.session_key)
    assert str(row) == (key if engine is DjangoStore else f"{key[:4]}…")  # ours is for logs, too
    assert row.get_decoded() == {"x": 1}


def test_rows_saved_by_the_manager(engine: Engine, call: Call) -> None:
    """`Session.objects.save` writes; empty data deletes."""
    model = engine.get_model_class()  # type: ignore[attr-defined]
    expires = timezone.now() + timedelta(days=1)
    model.objects.save("managerskey", {"y": 2}, expires)
    assert call(engine("managerskey"), "get", "y") == 2

    model.objects.save("managerskey", {}, expires)
    assert not model.objects.filter(pk="managerskey").exists()
