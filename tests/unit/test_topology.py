"""SERVERS and COPIES: what they mean, and what is wrong with them."""

from __future__ import annotations

from typing import Any

import pytest

from deferred_sessions.conf import get_settings
from deferred_sessions.topology import fleet_problems, server_problems, weights_of

DATABASES: dict[str, dict[str, Any]] = {
    "default": {"NAME": "shop", "HOST": "", "PORT": ""},
    "a": {"NAME": "sessions", "HOST": "10.0.0.1", "PORT": 5432},
    "b": {"NAME": "sessions", "HOST": "10.0.0.2", "PORT": 5432},
    "again": {"NAME": "sessions", "HOST": "10.0.0.1", "PORT": "5432"},
    "manual": {"NAME": "manual", "AUTOCOMMIT": False},
    "other": {"NAME": "db.sqlite3"},
}


def codes(*names: str, copies: int = 1) -> list[str]:
    found = server_problems(
        names, copies, DATABASES, lambda name: "SQLite" if name == "other" else None
    )
    return [code for code, _, _ in found]


def test_what_is_well() -> None:
    assert codes("default") == []
    assert codes("a", "b", copies=2) == []


@pytest.mark.parametrize(
    ("names", "copies", "expected"),
    [
        (["nosuch"], 1, ["E005"]),
        (["a", "nosuch", "neither"], 1, ["E005", "E005"]),
        (["a", "other"], 1, ["E006"]),
        (["manual"], 1, ["E007"]),
        (["a", "b"], 3, ["E024"]),
        (["a", "b", "again"], 2, ["E025"]),
    ],
)
def test_what_is_wrong(names: list[str], copies: int, expected: list[str]) -> None:
    assert codes(*names, copies=copies) == expected


@pytest.mark.parametrize(
    ("servers", "weights"),
    [
        (("b", "a"), {"b": 1.0, "a": 1.0}),
        ({"b": 2, "a": 0.5}, {"b": 2.0, "a": 0.5}),
        ({"c": 0, "b": 1, "a": 1}, {"b": 1.0, "a": 1.0}),
    ],
)
def test_weights_in_their_order(settings: Any, servers: Any, weights: dict[str, float]) -> None:
    assert list(weights_of(servers).items()) == list(weights.items())
    settings.DEFERRED_SESSIONS = {"SERVERS": servers}
    assert get_settings().weights == weights
    assert get_settings().server == "b"


def test_what_several_servers_need() -> None:
    """E041, W042: agents, and connections that do not hang."""
    databases = {**DATABASES, "c": {"NAME": "c", "OPTIONS": {"connect_timeout": 2}}}

    def found(*names: str, has_agent: bool = True) -> list[str]:
        return [code for code, _, _ in fleet_problems(names, databases, has_agent=has_agent)]

    assert found("c", "nosuch") == []
    assert found("a", "c") == ["W042"]
    assert found("c", has_agent=False) == ["E041"]
