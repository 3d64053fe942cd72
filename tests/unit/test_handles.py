"""What stands for a session where its key must not stand."""

from __future__ import annotations

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from deferred_sessions.handles import SHOWN, beginning_of, handle_of, shortened

KEY = "k3yabcdefghijklmnopqrstuvwxyz012"


@given(st.from_regex(r"[0-9A-Za-z_-]{8,40}", fullmatch=True))
def test_a_handle_belongs_to_its_key_and_does_not_contain_it(key: str) -> None:
    handle = handle_of(key)
    assert handle == handle_of(key)
    assert handle != handle_of(key[:-1] + ("a" if key[-1] != "a" else "b"))
    assert beginning_of(handle) == key[:SHOWN]
    assert key[: SHOWN + 2] not in handle


def test_it_needs_the_secret_key(settings: Any) -> None:
    handle = handle_of(KEY)
    settings.SECRET_KEY = "another" * 10
    assert handle != handle_of(KEY)


def test_what_is_no_handle() -> None:
    for text in ("", ".", KEY, "abcd", "abcd.", "abc." + "0" * 32, "abcd." + "0" * 31):
        assert beginning_of(text) is None


def test_people_see_the_beginning() -> None:
    assert shortened(KEY) == "k3ya…"
