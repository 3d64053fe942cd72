"""Between payloads and rows: Django's own signed format, both ways."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from django.contrib.sessions.backends.db import SessionStore as DjangoStore
from django.core import signing
from freezegun import freeze_time
from hypothesis import given
from hypothesis import strategies as st

from deferred_sessions.encoding import COMPRESS_FROM, RowEncoder
from deferred_sessions.exceptions import RecordCorruptError

PAYLOADS = [
    b"{}",
    b'{"a":1}',
    b'{"a":"' + b"x" * (COMPRESS_FROM - 8) + b'"}',
    b'{"a":"' + b"x" * 5000 + b'"}',
    b'{"a":"\\u00e9"}',
]


def to_text(payload: bytes) -> str:
    return RowEncoder().to_texts([payload])[0]


@pytest.mark.parametrize("payload", PAYLOADS)
def test_djangos_engine_reads_our_rows(payload: bytes) -> None:
    import json

    assert DjangoStore().decode(to_text(payload)) == json.loads(payload)


@pytest.mark.parametrize("session", [{}, {"a": 1}, {"cart": {"x": [1, 2]}, "long": "x" * 3000}])
def test_we_read_the_rows_of_djangos_engine(session: dict[str, object]) -> None:
    import json

    assert json.loads(RowEncoder().to_payload(DjangoStore().encode(session))) == session


@given(st.binary(max_size=2000))
def test_any_payload_comes_back(payload: bytes) -> None:
    assert RowEncoder().to_payload(to_text(payload)) == payload


@freeze_time("2026-01-01")
def test_short_payloads_are_exactly_what_django_makes() -> None:
    """Same bytes, same time, same key: the same text, apart from the compression."""
    expected = signing.dumps({"a": 1}, salt="django.contrib.sessions.SessionStore")

    assert to_text(b'{"a":1}') == expected


def test_long_payloads_are_compressed() -> None:
    assert len(to_text(b'{"a":"' + b"x" * 5000 + b'"}')) < 300


DAMAGES: dict[str, Callable[[str], str]] = {
    "another signature": lambda text: text[:-1] + ("A" if text[-1] != "A" else "B"),
    "another payload": lambda text: "x" + text,
    "half": lambda text: text[: len(text) // 2],
    "nothing": lambda _: "",
    "only colons": lambda _: "::",
    "no colons": lambda text: text.replace(":", ""),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_rows_are_refused(damage: str) -> None:
    text = DAMAGES[damage](to_text(b'{"a":1}'))

    with pytest.raises(RecordCorruptError, match="Session data corrupted"):
        RowEncoder().to_payload(text)


def test_a_rotated_key_still_opens_old_rows(settings: object) -> None:
    """Trap 10: SECRET_KEY_FALLBACKS are honoured."""
    text = to_text(b'{"a":1}')
    settings.SECRET_KEY_FALLBACKS = [settings.SECRET_KEY]  # type: ignore[attr-defined]
    settings.SECRET_KEY = "new" * 20  # type: ignore[attr-defined]

    assert RowEncoder().to_payload(text) == b'{"a":1}'
    assert to_text(b'{"a":1}') != text


def test_a_foreign_key_does_not(settings: object) -> None:
    text = to_text(b'{"a":1}')
    settings.SECRET_KEY = "new" * 20  # type: ignore[attr-defined]

    with pytest.raises(RecordCorruptError):
        RowEncoder().to_payload(text)
