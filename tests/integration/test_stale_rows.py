"""Rows that were read before memory changed: never put in place of something later."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest

from deferred_sessions.backend import SessionStore
from deferred_sessions.models import Session
from deferred_sessions.record import SessionRecord
from deferred_sessions.runtime import Runtime
from tests.integration.conftest import change, created, dirty, forget, no_room_to, record, row

pytestmark = pytest.mark.django_db(transaction=True)
Call = Callable[..., Any]


def after_the_read(runtime: Runtime, patch: pytest.MonkeyPatch, work: Callable[[], object]) -> None:
    """Have `work` done by others after the next row was read, before it is used."""
    acquire = runtime.leases.acquire

    def slow(key: str, **options: bool) -> Any:
        found = acquire(key, **options)
        patch.undo()
        work()
        return found

    patch.setattr(runtime.leases, "acquire", slow)


def test_saved_flushed_and_evicted_while_the_row_was_on_its_way(
    runtime: Runtime, monkeypatch: pytest.MonkeyPatch, call: Call
) -> None:
    session = created(a=1)
    forget(runtime)

    def others() -> None:
        change(session, a=2)
        assert runtime.flusher.flush_once(time.time() + 61).updated == 1
        assert runtime.store.evict(10) == 1

    after_the_read(runtime, monkeypatch, others)
    again = SessionStore(session.session_key)
    assert call(again, "load") == {"a": 2}
    assert record(runtime, session).version == 2

    change(session, b=3)
    assert runtime.flusher.flush_once(time.time() + 122).updated == 1
    assert row(session.session_key) == {"a": 2, "b": 3}


def test_removals_all_the_time_only_mean_that_nothing_is_kept(
    runtime: Runtime, monkeypatch: pytest.MonkeyPatch, call: Call
) -> None:
    """A store under pressure: the session is served and saved all the same."""
    session = created(a=1)
    forget(runtime)
    acquire = runtime.leases.acquire

    def pressed(key: str, **options: bool) -> Any:
        found = acquire(key, **options)
        runtime.store.count_removal()
        return found

    monkeypatch.setattr(runtime.leases, "acquire", pressed)
    again = SessionStore(session.session_key)
    assert call(again, "get", "a") == 1
    assert runtime.store.get(session.session_key or "") is None
    again["a"] = 2
    call(again, "save")

    assert row(session.session_key) == {"a": 2}


def test_saved_past_memory_while_the_row_was_on_its_way(
    runtime: Runtime, monkeypatch: pytest.MonkeyPatch, call: Call
) -> None:
    """Memory has no room for the one that changes it, and room again for the one that loads it."""
    session = created(a=1)
    again = SessionStore(session.session_key)
    again["b"] = 2
    forget(runtime)

    def others() -> None:
        with no_room_to("remember"):
            again.save()
        assert row(session.session_key) == {"a": 1, "b": 2}

    after_the_read(runtime, monkeypatch, others)
    assert call(SessionStore(session.session_key), "load") == {"a": 1, "b": 2}


def test_the_same_version_with_other_data_is_not_taken_for_written(runtime: Runtime) -> None:
    """A replica that lags answered the read, say: the node itself wrote that version."""
    session = dirty(1)[0]
    before = record(runtime, session)
    runtime.flusher.flush_once(time.time() + 61)
    runtime.store.update(before.key, lambda _: before._replace(payload=b'{"n":"other"}'))

    report = runtime.flusher.flush_once(time.time() + 61)

    assert (report.repeated, report.superseded) == (0, 1)
    assert SessionStore(session.session_key).load() == {"n": 1}


def test_an_older_version_than_the_row_is_forgotten(runtime: Runtime) -> None:
    session = dirty(1)[0]
    before = record(runtime, session)
    change(session, n=2)
    runtime.flusher.flush_once(time.time() + 61)
    runtime.store.update(before.key, lambda _: before)

    runtime.flusher.flush_once(time.time() + 61)

    assert SessionStore(session.session_key).load() == {"n": 2}


def test_a_row_of_another_key_logs_nobody_out(
    runtime: Runtime, call: Call, settings: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SECRET_KEY changes process by process: the others must still find the session."""
    session = created(_auth_user_id="7")
    forget(runtime)
    encoder = runtime.tiers._intake._encoder
    with monkeypatch.context() as patch:
        patch.setattr(type(encoder), "to_payload", refuse)
        assert call(SessionStore(session.session_key), "load") == {}

    assert call(SessionStore(session.session_key), "load") == {"_auth_user_id": "7"}


def refuse(_: object, text: str) -> bytes:
    from deferred_sessions.exceptions import RecordCorruptError

    raise RecordCorruptError(text)


def test_an_unknown_key_leaves_no_trace(runtime: Runtime, call: Call) -> None:
    """A flood of made-up keys, logged out or looked at, must not fill memory."""
    for number in range(20):
        call(SessionStore(f"nosuchkey{number:08d}"), "load")
        call(SessionStore(), "delete", f"nosuchkey{number:08d}")

    assert runtime.store.status().records == 0


def test_a_deleted_row_is_not_kept_by_a_load_under_way(
    runtime: Runtime, monkeypatch: pytest.MonkeyPatch, call: Call
) -> None:
    session = created(a=1)
    forget(runtime)
    after_the_read(runtime, monkeypatch, lambda: SessionStore().delete(session.session_key))

    assert call(SessionStore(session.session_key), "load") == {}
    assert runtime.store.status().records == 0


def test_the_owner_is_this_very_store(runtime: Runtime) -> None:
    """Two hosts of the same name, and a host before and after a reboot, are told apart."""
    session = created(a=1)
    owner = Session.objects.get(pk=session.session_key).owner or ""
    assert owner.endswith(f"#{runtime.store.incarnation()}")
    runtime.store.close()
    assert owner.endswith(f"#{runtime.store.incarnation()}")


def test_an_expiry_that_another_flusher_wrote(runtime: Runtime) -> None:
    """What is marked as stored is what PostgreSQL has, not what we have."""
    session = dirty(1)[0]
    before: SessionRecord = record(runtime, session)
    runtime.flusher.flush_once(time.time() + 61)
    runtime.store.update(before.key, lambda _: before._replace(expires_at=before.expires_at + 500))

    assert runtime.flusher.flush_once(time.time() + 61).repeated == 1

    after = record(runtime, session)
    assert after.stored_expires_at == pytest.approx(before.expires_at, abs=0.01)
    assert after.is_dirty
