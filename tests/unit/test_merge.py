"""Three-way merge of session dictionaries."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deferred_sessions.merge import Merged, merge


def merged(base: Any, ours: Any, theirs: Any) -> Merged:
    return merge(base, ours, theirs, text=json.dumps)


@pytest.mark.parametrize(
    ("base", "ours", "theirs", "session"),
    [
        ({}, {"a": 1}, {"b": 2}, {"b": 2, "a": 1}),
        ({"a": 1, "b": 1}, {"a": 2, "b": 1}, {"a": 1, "b": 2}, {"a": 2, "b": 2}),
        ({"a": 1, "b": 1}, {"b": 1}, {"a": 1, "b": 2}, {"b": 2}),
        ({"a": 1, "b": 1}, {"a": 2, "b": 1}, {"a": 1}, {"a": 2}),
        ({"a": 1}, {}, {}, {}),
        ({"a": 1}, {"a": 2}, {"a": 2}, {"a": 2}),
        ({"a": None}, {}, {"a": None}, {}),
    ],
    ids=["added", "changed", "we deleted", "they deleted", "both deleted", "same", "none"],
)
def test_what_does_not_conflict_is_kept(base: Any, ours: Any, theirs: Any, session: Any) -> None:
    assert merged(base, ours, theirs) == (session, [])


@pytest.mark.parametrize(
    ("base", "ours", "theirs", "session"),
    [
        ({"a": 1}, {"a": 2}, {"a": 3}, {"a": 2}),
        ({}, {"a": 2}, {"a": 3}, {"a": 2}),
        ({"a": 1}, {}, {"a": 3}, {}),
        ({"a": 1}, {"a": 2}, {}, {"a": 2}),
        ({"a": 0}, {"a": True}, {"a": 1}, {"a": True}),
    ],
    ids=["changed", "added", "we deleted", "they deleted", "kinds"],
)
def test_of_a_conflict_the_later_save_stands(
    base: Any, ours: Any, theirs: Any, session: Any
) -> None:
    result = merged(base, ours, theirs)
    assert json.dumps(result.session) == json.dumps(session)
    assert result.conflicts == ["a"]


sessions = st.dictionaries(st.sampled_from("abcd"), st.sampled_from([0, 1, True, None, "x"]))


@given(sessions, sessions, sessions)
def test_every_change_of_one_side_alone_is_in_the_result(base: Any, ours: Any, theirs: Any) -> None:
    session, conflicts = merged(base, ours, theirs)
    for key in "abcd":
        before, mine, other, now = (
            json.dumps([s.get(key, "-")]) for s in (base, ours, theirs, session)
        )
        if mine != before:
            assert now == mine
        else:
            assert now == other
        assert (key in conflicts) == (len({before, mine, other}) == 3)


@given(sessions, sessions)
def test_alone_nothing_is_merged(base: Any, ours: Any) -> None:
    assert merged(base, ours, base) == (ours, [])
    assert merged(base, base, ours) == (ours, [])
