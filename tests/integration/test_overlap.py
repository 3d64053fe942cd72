"""Overlapping requests of one visitor: their changes are merged, or the last one wins."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest
from django.contrib.sessions.backends.base import UpdateError

from deferred_sessions.backend import SessionStore
from deferred_sessions.memory.counters import Counter
from deferred_sessions.runtime import Runtime
from deferred_sessions.signals import session_conflict
from tests.integration.conftest import change, created, forget, row

pytestmark = pytest.mark.django_db(transaction=True)
Call = Callable[..., Any]


def loaded(session: SessionStore) -> SessionStore:
    """Return the session as another request has it at hand."""
    again = SessionStore(session.session_key)
    again.load()
    assert again.keys() is not None
    return again


def content(session: SessionStore) -> dict[str, Any]:
    return SessionStore(session.session_key).load()


def test_d07_changes_of_different_keys_are_all_kept(runtime: Runtime, call: Call) -> None:
    """D07: whoever saves later does not undo what the other saved."""
    session = created(a=1, b=1, c=1)
    ours, theirs = loaded(session), loaded(session)
    theirs["b"] = 2
    del theirs["c"]
    theirs["d"] = 4
    call(theirs, "save")
    ours["a"] = 2
    call(ours, "save")

    assert content(session) == {"a": 2, "b": 2, "d": 4}
    assert runtime.counters.totals()[Counter.MERGES] == 1
    assert runtime.counters.totals()[Counter.CONFLICTS] == 0


def test_a_request_that_goes_on_has_the_merged_session(runtime: Runtime, call: Call) -> None:
    """Else its next save would take their keys for deleted by us."""
    session = created(a=1)
    ours, theirs = loaded(session), loaded(session)
    theirs["b"] = 2
    call(theirs, "save")
    ours["a"] = 2
    call(ours, "save")
    assert dict(ours.items()) == {"a": 2, "b": 2}
    ours["a"] = 3
    call(ours, "save")

    assert content(session) == {"a": 3, "b": 2}
    assert runtime.counters.totals()[Counter.MERGES] == 1


def test_a_conflict_is_counted_and_signalled(runtime: Runtime, call: Call) -> None:
    session = created(a=1)
    ours, theirs = loaded(session), loaded(session)
    theirs["a"] = 2
    call(theirs, "save")
    heard: list[dict[str, Any]] = []
    session_conflict.connect(lambda **named: heard.append(named), weak=False, dispatch_uid="test")
    try:
        ours["a"] = 3
        call(ours, "save")
    finally:
        session_conflict.disconnect(dispatch_uid="test")

    assert content(session) == {"a": 3}
    assert [(h["session_key"], h["keys"]) for h in heard] == [(session.session_key, ["a"])]
    assert runtime.counters.totals()[Counter.CONFLICTS] == 1


def test_nested_values_that_changed_in_place(call: Call) -> None:
    session = created(cart={"lamp": 1}, seen=[1])
    ours, theirs = loaded(session), loaded(session)
    theirs["seen"].append(2)
    call(theirs, "save")
    ours["cart"]["lamp"] = 2
    call(ours, "save")

    assert content(session) == {"cart": {"lamp": 2}, "seen": [1, 2]}


def test_the_last_write_wins_if_so_set(tune: Callable[..., Runtime], call: Call) -> None:
    """Django's own behaviour."""
    runtime = tune(LOCKING="last-write-wins")
    session = created(a=1, b=1)
    ours, theirs = loaded(session), loaded(session)
    theirs["b"] = 2
    call(theirs, "save")
    ours["a"] = 2
    call(ours, "save")

    assert content(session) == {"a": 2, "b": 1}
    assert runtime.counters.totals()[Counter.MERGES] == 0


def test_what_changed_nothing_is_no_last_write(tune: Callable[..., Runtime], call: Call) -> None:
    """Another order of the keys is no change; also if another process had saved the session."""
    runtime = tune(LOCKING="last-write-wins")
    session = created(a=1, b=1)
    runtime.cache.clear()
    ours, theirs = SessionStore(session.session_key), SessionStore(session.session_key)
    ours["a"] = ours.pop("a")  # decoded for this
    runtime.cache.clear()
    theirs["b"] = 2
    call(theirs, "save")
    call(ours, "save")

    assert content(session) == {"a": 1, "b": 2}


def test_a_login_elsewhere_is_kept_and_written(call: Call) -> None:
    """What they changed that must not wait was written by them; ours is written by us."""
    session = created(a=1)
    ours, theirs = loaded(session), loaded(session)
    theirs["a"] = 2
    call(theirs, "save")
    ours["_auth_user_id"] = "7"
    call(ours, "save")

    assert row(session.session_key) == {"a": 2, "_auth_user_id": "7"}


def test_a_deleted_session_is_not_merged(call: Call) -> None:
    session = created(a=1)
    ours, theirs = loaded(session), loaded(session)
    call(theirs, "delete")
    ours["a"] = 2

    with pytest.raises(UpdateError):
        call(ours, "save")


def test_merged_also_with_what_postgresql_has(runtime: Runtime, call: Call) -> None:
    """Evicted after their change was flushed: ours meets it in the row."""
    session = created(a=1)
    ours = loaded(session)
    change(session, b=2)
    runtime.flusher.flush_once(time.time() + 61)
    forget(runtime)
    ours["a"] = 2
    call(ours, "save")

    assert content(session) == {"a": 2, "b": 2}


def test_evicted_and_unchanged_is_no_overlap(runtime: Runtime, call: Call) -> None:
    session = created(a=1)
    ours = loaded(session)
    forget(runtime)
    ours["a"] = 2
    call(ours, "save")

    assert content(session) == {"a": 2}
    assert runtime.counters.totals()[Counter.MERGES] == 0


def test_cycle_key_takes_along_what_others_saved(call: Call) -> None:
    """A login that overlaps with another request does not undo that one's change."""
    session = created(a=1)
    ours = loaded(session)
    change(session, b=2)
    ours["a"] = 2
    call(ours, "cycle_key")
    call(ours, "save")

    assert content(ours) == {"a": 2, "b": 2}
    assert content(session) == {}


def test_merges_into_an_empty_session(call: Call) -> None:
    session = created()
    ours, theirs = loaded(session), loaded(session)
    theirs["a"] = 1
    call(theirs, "save")
    ours["b"] = 2
    call(ours, "save")

    assert content(session) == {"a": 1, "b": 2}


def test_what_is_saved_while_the_new_key_is_created_moves_along(
    runtime: Runtime, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Acknowledged under the old key between the INSERT of the new and the deletion."""
    session = created(cart=0)
    again = SessionStore(session.session_key)
    assert call(again, "get", "cart") == 0
    real = runtime.server.insert

    def insert(*arguments: Any) -> int:
        inserted = real(*arguments)
        change(session, cart=99)
        return inserted

    monkeypatch.setattr(runtime.server, "insert", insert)
    call(again, "cycle_key")

    assert SessionStore(again.session_key).load() == {"cart": 99}
    assert SessionStore(session.session_key).load() == {}


def test_cycle_key_asks_postgresql_for_what_has_left_memory(runtime: Runtime, call: Call) -> None:
    session = created(a=1)
    again = loaded(session)
    change(session, b=2)
    runtime.flusher.flush_once(time.time(), everything=True)
    forget(runtime)
    call(again, "cycle_key")

    assert content(again) == {"a": 1, "b": 2}
