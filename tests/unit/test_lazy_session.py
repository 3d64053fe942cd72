"""A session's dictionary behaves like any other, and shares nothing that can be changed."""

from __future__ import annotations

import copy
import json
import pickle
from collections.abc import Callable
from operator import eq, ne
from typing import Any

import pytest
from django.contrib.sessions.serializers import JSONSerializer

from deferred_sessions.lazy_session import LazySession, Packed, packed
from deferred_sessions.payload import Snapshot, codec_for

PLAIN = {"n": 1, "cart": [1, {"a": [2]}], "text": "x", "nothing": None, "address": {"city": "Ulm"}}
OTHER = {**PLAIN, "cart": []}


@pytest.fixture
def snapshot() -> Snapshot:
    return codec_for(JSONSerializer).encode(copy.deepcopy(PLAIN))


@pytest.fixture
def session(snapshot: Snapshot) -> dict[str, Any]:
    session = snapshot.copy()
    assert type(session) is LazySession
    assert still_packed(session) == ["cart", "address"]
    return session


def still_packed(session: dict[str, Any]) -> list[str]:
    return [key for key, value in dict.items(session) if type(value) is Packed]


READS: dict[str, Callable[[dict[str, Any]], object]] = {
    "equal": lambda s: eq(s, PLAIN) and eq(PLAIN, s) and not ne(s, PLAIN) and not ne(PLAIN, s),
    "different": lambda s: ne(s, OTHER) and ne(OTHER, s) and not eq(s, OTHER),
    "items": lambda s: list(s.items()) == list(PLAIN.items()),
    "items twice": lambda s: s.items() == PLAIN.items() or list(s.items()) == list(PLAIN.items()),
    "values": lambda s: list(s.values()) == list(PLAIN.values()),
    "keys": lambda s: list(s.keys()) == list(s) == list(PLAIN),
    "reversed": lambda s: list(reversed(s)) == list(PLAIN)[::-1],
    "get": lambda s: s.get("cart") == PLAIN["cart"] and s.get("no") is None and s.get("no", 7) == 7,
    "getitem": lambda s: s["cart"] == PLAIN["cart"] and s["n"] == 1,
    "setdefault": lambda s: s.setdefault("cart", 1) == PLAIN["cart"] and s.setdefault("z", 2) == 2,
    "pop": lambda s: s.pop("cart") == PLAIN["cart"] and s.pop("cart", 7) == 7 and "cart" not in s,
    "popitem": lambda s: s.popitem() == ("address", {"city": "Ulm"}),
    "copy": lambda s: s.copy() == PLAIN and type(s.copy()) is dict,
    "dict": lambda s: dict(s) == PLAIN and not still_packed(dict(s)),
    "unpacking": lambda s: {**s} == PLAIN and not still_packed({**s}),
    "update": lambda s: not still_packed(updated({}, s)) and updated({}, s) == PLAIN,
    "or": lambda s: (s | {"n": 2})["cart"] == ({"n": 2} | s)["cart"] == PLAIN["cart"],
    "or itself": lambda s: s | s == PLAIN and type(s | s) is dict,
    "repr": lambda s: repr(s) == repr(PLAIN) and str(s) == str(PLAIN),
    "json": lambda s: json.dumps(s) == json.dumps(PLAIN),
    "json sorted": lambda s: json.dumps(s, sort_keys=True) == json.dumps(PLAIN, sort_keys=True),
    "json indented": lambda s: json.dumps(s, indent=1) == json.dumps(PLAIN, indent=1),
    "pickle": lambda s: pickle.loads(pickle.dumps(s)) == PLAIN,
    "copy.copy": lambda s: copy.copy(s) == PLAIN and type(copy.copy(s)) is dict,
    "deepcopy": lambda s: copy.deepcopy(s) == PLAIN,
    "format": lambda s: f"{s}" == f"{PLAIN}",
    "match": lambda s: matched(s) == [2],
    "len": lambda s: len(s) == 5 and "cart" in s and bool(s),
    "keywords": lambda s: dict(**s) == PLAIN,
}


def updated(one: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    one.update(other)
    return one


def matched(session: dict[str, Any]) -> Any:
    match session:
        case {"cart": [1, {"a": inner}]}:
            return inner
    return None


@pytest.mark.parametrize("read", READS)
def test_it_is_read_like_any_dictionary(session: dict[str, Any], read: str) -> None:
    assert READS[read](session)
    assert READS[read](copy.deepcopy(PLAIN)) or read == "keys"


@pytest.mark.parametrize("read", READS)
def test_whatever_is_done_with_it_others_do_not_see(snapshot: Snapshot, read: str) -> None:
    """All that was handed out is changed; the next request has what was saved."""
    first = snapshot.copy()
    READS[read](first)
    for value in [first.get("cart"), first.get("address"), *first.values()]:
        if isinstance(value, list):
            value.append("leaked")
        elif isinstance(value, dict):
            value["leaked"] = True

    assert snapshot.copy() == PLAIN
    assert snapshot.payload == JSONSerializer().dumps(PLAIN)


def test_only_what_is_asked_for_is_copied(session: dict[str, Any]) -> None:
    assert session["n"] == 1
    assert session["cart"] is session["cart"]
    assert still_packed(session) == ["address"]
    del session["address"]
    session["cart"] = "none"
    session.clear()
    assert session == {}


def test_what_was_not_asked_for_is_not_changed(snapshot: Snapshot) -> None:
    """Not even looked at, from the second save on."""
    session = snapshot.copy()
    assert snapshot.changed_to(session) == (snapshot, ())
    session["n"] = 2
    snapshot, changed = snapshot.changed_to(session)
    assert list(changed) == ["n"]
    session = snapshot.copy()
    session["n"] = 3
    after, changed = snapshot.changed_to(session)
    assert list(changed) == ["n"]
    assert still_packed(session) == ["cart", "address"]
    assert after.copy() == {**PLAIN, "n": 3}


def test_changes_inside_are_found(snapshot: Snapshot) -> None:
    session = snapshot.copy()
    session["cart"][1]["a"].append(3)
    after, changed = snapshot.changed_to(session)
    assert list(changed) == ["cart"]
    assert after.copy() == {**PLAIN, "cart": [1, {"a": [2, 3]}]}
    session["address"] = "moved"
    last, changed = after.changed_to(session)
    assert list(changed) == ["address"]
    assert last.payload == JSONSerializer().dumps(session)


def test_a_value_of_another_snapshot(snapshot: Snapshot) -> None:
    """Packed somewhere else: the same bytes are the same value."""
    other = codec_for(JSONSerializer).encode({**copy.deepcopy(PLAIN), "address": {"city": "Bonn"}})
    after, changed = other.changed_to(snapshot.copy())
    assert list(changed) == ["address"]
    assert after.payload == snapshot.payload


def test_equal_scalars_are_no_change(snapshot: Snapshot) -> None:
    session = snapshot.copy()
    session["n"], session["text"] = int("1"), "".join(["x"])
    assert snapshot.changed_to(session) == (snapshot, ())
    session["n"] = True
    assert list(snapshot.changed_to(session)[1]) == ["n"]


@pytest.mark.parametrize("value", [None, "other", True, 1.0, [1, 2, 3], ...])
@pytest.mark.parametrize("name", ["text", "one", "list", "none", "new"])
def test_what_is_watched_is_certain(name: str, value: Any) -> None:
    """Also if it is removed, None, equal but of another type, or changed where it is."""
    session: dict[str, Any] = {"text": "t", "one": 1, "list": [1, 2], "none": None, "n": 0}
    theirs = codec_for(JSONSerializer).decode(json.dumps(session).encode())
    first = theirs.copy()
    if value is ...:
        first.pop(name, None)
    elif name == "list" and isinstance(value, list):
        first[name].append(3)
    else:
        first[name] = value
    first["n"] = 1
    changed = set(theirs.changed_to(first, {name})[1])
    is_same = json.dumps(first.get(name, ...), default=str) == json.dumps(
        session.get(name, ...), default=str
    )
    assert changed & {name, "n"} == ({"n"} if is_same else {name, "n"})


def test_what_cannot_be_packed() -> None:
    assert packed(object()) is None
    assert packed([1]) == packed([1]) != packed([True])


def test_what_another_process_saved(snapshot: Snapshot) -> None:
    """The first copy is the decoded session itself; all others are as ever."""
    codec = codec_for(JSONSerializer)
    theirs = codec.decode(snapshot.payload)
    first = theirs.copy()
    assert type(first) is dict
    assert theirs.changed_to(first) == (theirs, ())
    first["cart"].append("leaked")
    first["none"] = None
    after, changed = theirs.changed_to(first)
    assert list(changed) == ["cart", "none"]
    assert after.copy() == first
    assert list(theirs.changed_to(first, {"n", "address"})[1]) == ["cart", "none"]
    assert {"cart", "none"} <= set(theirs.changed_to(first, {"n", "missing"})[1])
    assert list(theirs.changed_to(first, {"address"})[1]) == ["cart", "none"]

    second = theirs.copy()
    assert type(second) is LazySession
    assert second == PLAIN
    after, changed = theirs.changed_to(first)
    assert list(changed) == ["cart", "none"]
    assert after.copy() == first
