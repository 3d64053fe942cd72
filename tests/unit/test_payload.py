"""Between sessions and payloads: exactly what the serializer does, only faster."""

from __future__ import annotations

import json
import logging
import math
from typing import Any

import pytest
from django.contrib.sessions.serializers import JSONSerializer
from django.utils.safestring import mark_safe
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from deferred_sessions import payload as payload_module
from deferred_sessions.payload import JsonCodec, SerializerCodec, Snapshot, codec_for

scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(allow_nan=False),
    st.text(max_size=10),
)
values = st.recursive(
    scalars,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.tuples(inner, inner),
        st.dictionaries(st.text(max_size=3), inner, max_size=3),
        st.dictionaries(st.integers(0, 3), inner, max_size=2),
    ),
    max_leaves=6,
)
keys = st.sampled_from(["a", "b", "c", "_auth_user_id", "d é", ""])


@pytest.mark.parametrize("value", [1, 1.5, "x", None, [1.5], {"a": 1.5}])
@pytest.mark.parametrize("name", ["n", "new"])
def test_what_was_just_saved_is_no_change(name: str, value: object) -> None:
    """Else a request that saves twice would overwrite others, where the last write wins."""
    known = JsonCodec().decode(b'{"n":0}')
    session = known.copy()
    session["n"] = 7
    known, _ = known.changed_to(session)
    session = known.copy()
    session[name] = value
    saved, changed = known.changed_to(session)
    assert list(changed) == [name]
    again, changed = saved.changed_to(session)
    assert again is saved
    assert not list(changed)


@pytest.mark.parametrize("count", [1, 7, 51, 200])
def test_each_key_of_a_session_changes(count: int) -> None:
    """One after the other; also to values with quotes, commas and letters beyond ASCII."""
    session = {f"k{number}": "x" * number for number in range(count)}
    known: Snapshot = JsonCodec().encode(session)
    for number in range(count):
        for value in ('","', "é€", number, {"k1": [number]}, ""):
            session = known.copy()
            session[f"k{number}"] = value
            known, changed = known.changed_to(session)
            assert list(changed) == [f"k{number}"]
            assert known.payload == dumps(session)
            assert known.copy() == session


def dumps(session: dict[str, Any]) -> bytes:
    return bytes(JSONSerializer().dumps(session))


def loads(payload: bytes) -> Any:
    return JSONSerializer().loads(payload)


class OneProcess(RuleBasedStateMachine):
    """A session that one process loads, changes and saves, compared with the serializer."""

    def __init__(self) -> None:
        super().__init__()
        self.codec = JsonCodec()
        self.snapshot: Snapshot = self.codec.encode({})
        self.session: dict[str, Any] = {}

    @initialize(session=st.dictionaries(keys, values, max_size=4))
    def start(self, session: dict[str, Any]) -> None:
        self.snapshot = self.codec.encode(session)
        self.session = self.snapshot.copy()

    @rule(key=keys, value=values)
    def put(self, key: str, value: Any) -> None:
        self.session[key] = value

    @rule(key=keys)
    def take(self, key: str) -> None:
        self.session.pop(key, None)

    @rule(key=keys, value=scalars)
    def change_inside(self, key: str, value: Any) -> None:
        inner = self.session.get(key)
        if isinstance(inner, dict):
            inner["changed"] = value
        elif isinstance(inner, list):
            inner.append(value)

    @rule()
    def move_to_the_end(self) -> None:
        if self.session:
            first = next(iter(self.session))
            self.session[first] = self.session.pop(first)

    @rule()
    def load_again(self) -> None:
        """What was not saved is gone."""
        self.session = self.snapshot.copy()
        assert dumps(self.session) == self.snapshot.payload

    @rule()
    def another_process(self) -> None:
        """The payload comes from elsewhere: nothing is known about it."""
        self.snapshot = self.codec.decode(self.snapshot.payload)
        self.session = self.snapshot.copy()

    @rule()
    def save(self) -> None:
        before = loads(self.snapshot.payload)
        expected = dumps(self.session)
        after = loads(expected)
        same_bytes = expected == self.snapshot.payload

        snapshot, changed = self.snapshot.changed_to(self.session)

        assert snapshot.payload == expected
        different = {
            k
            for k in {**before, **after}
            if dumps({"": before.get(k, ...)} if k in before else {})
            != dumps({"": after.get(k, ...)} if k in after else {})
        }
        assert different <= set(changed)
        if snapshot is self.snapshot:
            assert same_bytes
        self.snapshot = snapshot
        self.session = snapshot.copy()

    @invariant()
    def a_copy_is_what_the_payload_says(self) -> None:
        assert repr(self.snapshot.copy()) == repr(loads(self.snapshot.payload))


TestOneProcess = OneProcess.TestCase


@given(st.dictionaries(keys, values, max_size=5), st.dictionaries(keys, values, max_size=3))
def test_encoding_a_change_is_encoding_the_whole(
    session: dict[str, Any], changes: dict[str, Any]
) -> None:
    base = JsonCodec().encode(session)
    own = base.copy()
    own.update(changes)

    assert base.changed_to(own)[0].payload == dumps(own)


def test_true_is_not_one() -> None:
    """Exactly the same is more than equal: 1 == True == 1.0."""
    base = JsonCodec().encode({"a": 1, "n": {"x": 1}})
    base = base.changed_to({**base.copy(), "b": 0})[0]
    for changed in ({"a": True}, {"a": 1.0}, {"n": {"x": True}}, {"n": {"x": 1.0}}):
        session = {**base.copy(), **changed}
        assert base.changed_to(session)[0].payload == dumps(session)


def test_an_unchanged_session_is_the_same_snapshot() -> None:
    """A touch costs no encoding."""
    base = JsonCodec().encode({"a": 1, "cart": {"x": [1, 2]}})

    snapshot, changed = base.changed_to(base.copy())

    assert snapshot is base
    assert list(changed) == []


def test_every_request_gets_its_own_copy() -> None:
    """An unsaved nested change never leaks into another request."""
    base = JsonCodec().encode({"cart": {"items": [1]}, "list": [[1]]})
    mine = base.copy()
    mine["cart"]["items"].append(2)
    mine["list"][0].append(2)
    mine["new"] = 1

    assert base.copy() == {"cart": {"items": [1]}, "list": [[1]]}


def test_saving_does_not_share_what_the_application_keeps() -> None:
    """The application goes on changing an object after it was saved."""
    cart = {"items": [1]}
    base = JsonCodec().encode({"n": 0})
    saved, _ = base.changed_to({"n": 0, "cart": cart})
    cart["items"].append(2)

    assert saved.copy() == {"n": 0, "cart": {"items": [1]}}


def test_a_copy_is_what_json_makes_of_it() -> None:
    """All processes see the same, also the one that saved: lists for tuples, text keys."""
    base = JsonCodec().encode({"a": 0})

    saved, _ = base.changed_to({"a": 0, "t": (1, 2), "d": {1: "x"}, "s": mark_safe("<b>")})

    assert saved.copy() == {"a": 0, "t": [1, 2], "d": {"1": "x"}, "s": "<b>"}
    assert type(saved.copy()["s"]) is str


def test_keys_that_are_not_text_become_text() -> None:
    base = JsonCodec().encode({"a": 0})
    session: dict[Any, Any] = {"a": 0, 1: "x", None: "y", 2.5: "z"}

    assert base.changed_to(session)[0].payload == dumps(session)


def test_numbers_that_are_none() -> None:
    base = JsonCodec().encode({"a": 0})
    session = {"a": math.nan, "b": math.inf, "c": -0.0}
    saved, _ = base.changed_to(session)

    assert saved.payload == dumps(session)
    assert saved.changed_to(saved.copy())[0].payload == saved.payload


@pytest.mark.parametrize("bad", [object(), {1, 2}, b"bytes", {"x": object()}])
def test_what_cannot_be_encoded_changes_nothing(bad: Any) -> None:
    """Trap 2: encode first; a failure leaves the snapshot as it was."""
    base = JsonCodec().encode({"a": 0})
    base = base.changed_to({"a": 1})[0]

    with pytest.raises(TypeError):
        base.changed_to({"a": 1, "bad": bad})

    assert base.copy() == {"a": 1}


def test_a_session_that_contains_itself_is_refused() -> None:
    base = JsonCodec().encode({"a": 0})
    session = base.copy()
    session["self"] = session

    with pytest.raises(ValueError, match="Circular"):
        base.changed_to(session)


@pytest.mark.parametrize("payload", [b"", b"{", b"\xff", b"[1, 2]", b"null"])
def test_an_unreadable_payload_is_an_empty_session(
    payload: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        assert JsonCodec().decode(payload).copy() == {}


class Backwards:
    """A serializer that is not JSON."""

    def dumps(self, obj: Any) -> bytes:
        return repr(obj)[::-1].encode()

    def loads(self, data: bytes) -> Any:
        return eval(data.decode()[::-1])


def test_any_serializer_works() -> None:
    codec = codec_for(Backwards)
    assert isinstance(codec, SerializerCodec)
    base = codec.encode({"a": (1, 2), "b": {3}})

    session = base.copy()
    assert session == {"a": (1, 2), "b": {3}}
    assert base.changed_to(session) == (base, ())
    session["b"].add(4)
    saved, changed = base.changed_to({**session, "c": 1})

    assert sorted(changed) == ["b", "c"]
    assert base.copy() == {"a": (1, 2), "b": {3}}
    assert codec.decode(saved.payload).copy() == {"a": (1, 2), "b": {3, 4}, "c": 1}
    assert list(saved.changed_to({"a": (1, 2)})[1]) == ["b", "c"]


def test_a_serializer_that_raises_anything(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert SerializerCodec(Backwards).decode(b"(").copy() == {}
    assert "cannot be decoded by Backwards" in caplog.text


def test_django_json_is_recognised() -> None:
    assert isinstance(codec_for(JSONSerializer), JsonCodec)

    class Subclass(JSONSerializer):
        pass

    assert isinstance(codec_for(Subclass), SerializerCodec)


def test_the_tests_compare_with_the_real_thing() -> None:
    assert dumps({"a": [1, "é"]}) == json.dumps({"a": [1, "é"]}, separators=(",", ":")).encode()


def nested(depth: int) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = [value]
    return value


def test_deeper_than_marshal_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    """What JSON takes, a session must give back; how deep depends on the Python."""
    codec = codec_for(JSONSerializer)
    flat = codec.encode({"n": 1, "deep": []})
    shallow, _ = flat.changed_to({"n": 2, "deep": []})
    real = payload_module.packed
    monkeypatch.setattr(
        payload_module, "packed", lambda v: None if str(v).count("[") > 20 else real(v)
    )
    session = {"n": 1, "deep": nested(50)}

    unread = codec.decode(JSONSerializer().dumps({"n": 1, "deep": nested(40)}))
    for before in (flat, shallow, unread, codec.decode(b'{"a":[1]}')):
        snapshot, changed = before.changed_to(session)
        assert "deep" in changed
        assert snapshot.payload == JSONSerializer().dumps(session)
        assert snapshot.copy() == session
        again, changed = snapshot.changed_to({**session, "n": 2})
        assert list(changed) == ["n"]
        assert again.copy() == {**session, "n": 2}


def test_2500_lists_in_each_other() -> None:
    session = {"deep": nested(2500)}
    try:
        payload = JSONSerializer().dumps(session)
    except RecursionError:
        return  # this Python refuses it, as it does with Django's own engines
    snapshot = codec_for(JSONSerializer).decode(payload)
    assert snapshot.copy() == session


def test_values_that_cannot_be_compared_count_as_changed() -> None:
    """An array answers `!=` with an array, which is neither true nor false."""

    class Verbatim:
        def dumps(self, obj: Any) -> bytes:
            return repr(sorted(obj)).encode() + (b"!" if isinstance(obj["a"], Array) else b"")

        def loads(self, data: bytes) -> Any:
            return {"a": 1, "b": 1}

    class Array:
        def __ne__(self, other: object) -> Any:
            raise ValueError("ambiguous")

        __hash__ = None  # type: ignore[assignment]

    snapshot = codec_for(Verbatim).encode({"a": 1, "b": 1})
    _, changed = snapshot.changed_to({"a": Array(), "b": 1})
    assert changed == ["a"]
