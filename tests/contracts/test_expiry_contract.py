"""What Django expects of a session engine: when sessions expire.

Written anew after the behaviour that `SessionTestsMixin` of Django 5.2 and 6.1 asserts;
each test holds for Django's own engine too (see conftest).
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from django.contrib.sessions.backends.base import SessionBase
from django.core.management import call_command
from django.utils import timezone

Call = Callable[..., Any]
Engine = type[SessionBase]


@pytest.fixture
def session(engine: Engine) -> SessionBase:
    return engine()


def flags(session: SessionBase) -> tuple[bool, bool]:
    return session.accessed, session.modified


def test_expiry_is_the_cookie_age_by_default(
    session: SessionBase, call: Call, settings: Any
) -> None:
    assert call(session, "get_expiry_age") == settings.SESSION_COOKIE_AGE
    call(session, "set_expiry", 0)
    assert call(session, "get_expiry_age") == settings.SESSION_COOKIE_AGE


@pytest.mark.parametrize("kind", ["seconds", "timedelta", "datetime"])
def test_expiry_of_ones_own(session: SessionBase, call: Call, kind: str) -> None:
    modification = timezone.now()
    value: Any = {
        "seconds": 10,
        "timedelta": timedelta(seconds=10),
        "datetime": modification + timedelta(seconds=10),
    }[kind]
    call(session, "set_expiry", value)

    date = call(session, "get_expiry_date", modification=modification)
    assert abs(date - (modification + timedelta(seconds=10))) < timedelta(seconds=2)
    age = call(session, "get_expiry_age", modification=modification)
    assert age in (9, 10, 11)


def test_expiry_can_be_reset(session: SessionBase, call: Call, settings: Any) -> None:
    call(session, "set_expiry", None)
    call(session, "set_expiry", 10)
    call(session, "set_expiry", None)

    assert call(session, "get_expiry_age") == settings.SESSION_COOKIE_AGE


@pytest.mark.parametrize("by_default", [True, False])
@pytest.mark.parametrize(("own", "expected"), [(10, False), (0, True), (None, None)])
def test_expiry_at_browser_close(
    session: SessionBase,
    call: Call,
    settings: Any,
    by_default: bool,
    own: int | None,
    expected: bool | None,
) -> None:
    settings.SESSION_EXPIRE_AT_BROWSER_CLOSE = by_default
    call(session, "set_expiry", own)

    wanted = by_default if expected is None else expected
    assert call(session, "get_expire_at_browser_close") is wanted


def test_an_expired_session_is_empty_at_once(engine: Engine, call: Call) -> None:
    old = engine()
    call(old, "set", "foo", "bar")
    call(old, "set_expiry", -timedelta(seconds=10))
    call(old, "save")

    assert call(engine(old.session_key), "has_key", "foo") is False


def test_every_kind_of_expiry_survives_a_save(
    engine: Engine, session: SessionBase, call: Call
) -> None:
    for value in (300, timedelta(days=1), datetime(2100, 1, 1, tzinfo=UTC)):
        call(session, "set_expiry", value)
        call(session, "save")
        assert call(engine(session.session_key), "has_key", "_session_expiry") is True
        expected = call(session, "get_expiry_date")
        again = call(engine(session.session_key), "get_expiry_date")
        assert abs(expected - again) < timedelta(seconds=2)


def test_clear_expired(engine: Engine, call: Call) -> None:
    old, young = engine(), engine()
    for session, expiry in ((old, -3600), (young, 3600)):
        call(session, "set", "foo", "bar")
        call(session, "set_expiry", expiry)
        call(session, "save")
    model = engine.get_model_class()  # type: ignore[attr-defined]
    assert model.objects.count() == 2

    call(engine(), "clear_expired")

    assert [row.pk for row in model.objects.all()] == [young.session_key]


def test_the_clearsessions_command(engine: Engine) -> None:
    old = engine()
    old["foo"] = "bar"
    old.set_expiry(-3600)
    old.save()

    call_command("clearsessions")

    assert not engine.get_model_class().objects.exists()  # type: ignore[attr-defined]
