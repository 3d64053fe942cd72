"""`session.lock()`, exclusive mode, `persist()` and the decorators of views."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from asgiref.sync import async_to_sync
from django.contrib.sessions.backends.base import UpdateError
from django.db import connection
from django.http import HttpRequest, HttpResponse

from deferred_sessions.backend import SessionStore
from deferred_sessions.decorators import durable_session, exclusive_session, read_only_session
from deferred_sessions.exceptions import (
    LockOrderError,
    LockTimeoutError,
    ReadOnlySessionError,
    ServerUnavailableError,
    SessionBusy,
)
from deferred_sessions.memory.counters import Counter
from deferred_sessions.models import Session
from deferred_sessions.runtime import Runtime
from tests.integration.conftest import Outage, change, created, forget, record, row

pytestmark = pytest.mark.django_db(transaction=True)
Call = Callable[..., Any]
MODES = ["merge", "exclusive", "last-write-wins"]


def content(session: SessionStore) -> dict[str, Any]:
    return SessionStore(session.session_key).load()


def loaded(session: SessionStore) -> SessionStore:
    again = SessionStore(session.session_key)
    assert again.keys() is not None
    return again


@pytest.fixture(params=["sync", "async"])
def locking(request: pytest.FixtureRequest) -> Callable[..., Any]:
    """Call something with a lock held: in a `with`, then in an `async with` block."""

    def sync(session: SessionStore, *names: str, work: Callable[[], Any], **options: Any) -> Any:
        with session.lock(*names, **options):
            return work()

    async def asynchronous(
        session: SessionStore, *names: str, work: Callable[[], Any], **options: Any
    ) -> Any:
        async with session.lock(*names, **options):
            return work()

    return sync if request.param == "sync" else async_to_sync(asynchronous)


@pytest.mark.parametrize("mode", MODES)
def test_a_locked_portion_is_read_anew_and_saved(
    tune: Callable[..., Runtime], locking: Call, mode: str
) -> None:
    """C05: on entry the key is as it is now, on exit it is as we left it, for all."""
    tune(LOCKING=mode)
    session = created(n=1, other=1)
    ours = loaded(session)
    change(session, n=5, theirs=1)
    ours["mine"] = 1

    def work() -> None:
        assert ours["n"] == 5
        ours["n"] += 1

    locking(ours, "n", work=work)

    assert content(session) == {"n": 6, "other": 1, "theirs": 1, "mine": 1}


@pytest.mark.parametrize("mode", MODES)
def test_two_portions_at_once_keep_both(tune: Callable[..., Runtime], mode: str) -> None:
    """Also where the last write wins: who locks portions saves portions."""
    tune(LOCKING=mode)
    session = created(a=0, b=0)
    meet = threading.Barrier(2, timeout=30)

    def work(name: str) -> None:
        ours = loaded(session)
        with ours.lock(name):
            meet.wait()
            ours[name] = 1
            meet.wait()
        connection.close()

    with ThreadPoolExecutor(2) as pool:
        for done in [pool.submit(work, "a"), pool.submit(work, "b")]:
            done.result(30)

    assert content(session) == {"a": 1, "b": 1}


def test_a_lock_that_is_taken(locking: Call) -> None:
    session = created(n=1)
    with session.lock("n"), ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(locking, loaded(session), "n", work=list, timeout=0.01)
        with pytest.raises(LockTimeoutError, match="Portions .'n'."):
            waiting.result(30)
        other = pool.submit(locking, loaded(session), "other", work=list, timeout=5)
        assert other.result(30) == []


def test_nested_locks(locking: Call) -> None:
    session = created(n=1)

    def inner() -> None:
        with session.lock("n"), session.lock("m"):
            session["n"] = session["m"] = 2

    with session.lock():
        inner()
        assert content(session) == {"n": 2, "m": 2}
    with session.lock("n"):
        inner()
        with pytest.raises(LockOrderError):
            session.lock().__enter__()


def test_a_name_is_a_string(runtime: Runtime) -> None:
    with pytest.raises(TypeError, match="unlike"):
        created(n=1).lock(3)  # type: ignore[arg-type]


def test_the_same_lock_entered_again(runtime: Runtime) -> None:
    session = created(n=1)
    lock = session.lock("n")
    with lock, lock:
        session["n"] = 2
    assert content(session) == {"n": 2}
    with SessionStore(session.session_key).lock("n", timeout=0):
        pass


def test_the_end_of_the_request_does_not_undo_others(
    tune: Callable[..., Runtime], locking: Call, call: Call
) -> None:
    """Where the last write wins, too: what was saved under the lock is not saved again."""
    tune(LOCKING="last-write-wins")
    session = created(n=0)
    request = SessionStore(session.session_key)

    def increment() -> None:
        request["n"] += 1

    locking(request, "n", work=increment)
    change(session, n=request["n"] + 1)
    assert request.modified
    call(request, "save")
    assert content(session) == {"n": 2}


def test_a_block_that_fails_saves_nothing(runtime: Runtime, locking: Call) -> None:
    session = created(n=1)

    def fail() -> None:
        session["n"] = 2
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        locking(session, "n", work=fail)

    assert content(session) == {"n": 1}
    assert runtime.claims._lines == {}


def test_a_new_visitor_gets_a_session(locking: Call) -> None:
    session = SessionStore()
    locking(session, "n", work=lambda: session.__setitem__("n", 1))

    assert row(session.session_key) is not None
    assert content(session) == {"n": 1}


def test_a_session_that_has_left_memory(runtime: Runtime, locking: Call) -> None:
    session = created(n=1)
    ours = loaded(session)
    Session.objects.update(session_data=SessionStore().encode({"n": 7}), version=3)
    forget(runtime)

    def work() -> None:
        forget(runtime)
        ours["n"] += 1

    locking(ours, "n", work=work)
    assert content(session) == {"n": 8}


def test_a_session_that_was_deleted(runtime: Runtime, locking: Call) -> None:
    session = created(n=1)
    ours, late = loaded(session), loaded(session)
    session.delete()
    with pytest.raises(UpdateError):
        locking(ours, "n", work=list)
    forget(runtime)
    with pytest.raises(UpdateError):
        locking(late, "n", work=list)
    assert runtime.claims._lines == {}


def test_a_login_under_a_lock_is_written_through(locking: Call) -> None:
    session = created(n=1)
    locking(session, "n", work=lambda: session.__setitem__("_auth_user_id", "7"))

    assert row(session.session_key) == {"n": 1, "_auth_user_id": "7"}


def test_waiting_on_an_event_loop_is_refused() -> None:
    """`with` cannot wait there: who holds the lock may need the loop to go on."""
    session = created(n=1)

    async def work() -> None:
        async with session.lock("n"):
            with pytest.raises(LockTimeoutError, match="use `async with`"):
                await asyncio.create_task(in_another_task())

    async def in_another_task() -> None:
        with loaded(session).lock("n", timeout=30):
            pass

    async_to_sync(work)()


def test_200_increments_in_8_threads_are_all_kept() -> None:
    """One key, under its lock: exact."""
    session = created(n=0)

    def work(_: int) -> None:
        ours = loaded(session)
        for _turn in range(25):
            with ours.lock("n"):
                ours["n"] += 1
        connection.close()

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(8)))
    assert content(session) == {"n": 200}


# Exclusive mode


def test_b05_a_busy_session_is_not_used_by_others(tune: Callable[..., Runtime], call: Call) -> None:
    """B05: from its first use to the end of the request nobody else gets it."""
    runtime = tune(LOCKING="exclusive", LOCK_TIMEOUT=0.02)
    session = created(n=1)
    assert call(SessionStore(session.session_key), "load") == {"n": 1}

    with runtime.busy.request():
        ours = SessionStore(session.session_key)
        assert ours["n"] == 1
        assert SessionStore(session.session_key)["n"] == 1  # this request may, twice
        with ours.lock("n"):
            ours["n"] = 2

        def other() -> Any:
            with runtime.busy.request():
                return call(SessionStore(session.session_key), "load")

        with ThreadPoolExecutor(1) as pool:
            with pytest.raises(SessionBusy):
                pool.submit(other).result(30)
            assert record(runtime, session).version == 2

    assert other() == {"n": 2}
    assert runtime.claims._lines == {}


def test_a_read_only_request_does_not_wait(tune: Callable[..., Runtime], call: Call) -> None:
    runtime = tune(LOCKING="exclusive", LOCK_TIMEOUT=0.02)
    session = created(n=1)

    def other() -> Any:
        with runtime.busy.request():
            reader = SessionStore(session.session_key)
            reader.is_read_only = True
            assert call(reader, "get", "n") == 1
            reader["n"] = 2
            with pytest.raises(ReadOnlySessionError):
                call(reader, "save")

    with runtime.busy.request():
        assert SessionStore(session.session_key)["n"] == 1
        with ThreadPoolExecutor(1) as pool:
            pool.submit(other).result(30)


# Persist


def test_persist(runtime: Runtime, call: Call) -> None:
    session = created(n=1)
    session["n"] = 2
    call(session, "persist")

    assert row(session.session_key) == {"n": 2}
    assert not record(runtime, session).is_dirty
    call(session, "persist")
    assert runtime.counters.totals()[Counter.WRITES_THROUGH] == 1


def test_persist_says_if_it_could_not(runtime: Runtime, outage: Outage, call: Call) -> None:
    session = created(n=1)
    outage.begin()
    session["n"] = 2
    with pytest.raises(ServerUnavailableError):
        call(session, "persist")
    assert content(session) == {"n": 2}
    outage.end()

    call(session, "persist")
    assert row(session.session_key) == {"n": 2}


def test_persist_of_what_somebody_deleted(runtime: Runtime, call: Call) -> None:
    session = created(n=1)
    Session.objects.all().delete()
    session["n"] = 2
    with pytest.raises(UpdateError):
        call(session, "persist")
    assert content(session) == {}


# Decorators


def requested(session: SessionStore) -> HttpRequest:
    request = HttpRequest()
    request.session = loaded(session)
    return request


def run(decorator: Any, view: Callable[[HttpRequest], Any], request: HttpRequest, how: str) -> Any:
    """Call a view that is decorated, as a function or as a coroutine function."""
    if how == "sync":
        return decorator(view)(request)

    async def aview(request: HttpRequest) -> Any:
        await asyncio.sleep(0)
        return view(request)

    return async_to_sync(decorator(aview))(request)


both = pytest.mark.parametrize("how", ["sync", "async"])


@both
def test_exclusive_session(how: str) -> None:
    session = created(n=0)

    def view(request: HttpRequest) -> HttpResponse:
        request.session["n"] += 1
        return HttpResponse()

    with ThreadPoolExecutor(4) as pool:
        requests = [requested(session) for _ in range(20)]
        list(pool.map(lambda request: run(exclusive_session, view, request, how), requests))
    assert content(session) == {"n": 20}


@both
def test_exclusive_session_of_a_stranger(how: str) -> None:
    request = HttpRequest()
    request.session = SessionStore()
    assert run(exclusive_session, lambda _: 7, request, how) == 7
    assert Session.objects.count() == 0


@both
def test_a_forged_cookie_makes_no_session(how: str) -> None:
    request = HttpRequest()
    request.session = SessionStore("x" * 32)
    assert run(exclusive_session, lambda _: 7, request, how) == 7
    assert Session.objects.count() == 0


@both
@pytest.mark.parametrize("decorator", [exclusive_session, durable_session])
def test_a_view_that_ends_its_session(how: str, decorator: Any) -> None:
    """`logout()` in it: no error, no new session."""
    session = created(n=1)
    request = requested(session)

    async def view(request: HttpRequest) -> None:
        await request.session.aflush()

    if how == "sync":
        decorator(lambda r: r.session.flush())(request)
    else:
        async_to_sync(decorator(view))(request)
    assert content(session) == {}
    assert Session.objects.count() == 0


@both
def test_read_only_session(how: str) -> None:
    session = created(n=1)
    assert run(read_only_session, lambda r: r.session["n"], requested(session), how) == 1

    request = requested(session)
    with pytest.raises(ReadOnlySessionError, match="view"):
        run(read_only_session, lambda r: r.session.update({"n": 2}), request, how)
    with pytest.raises(ReadOnlySessionError):
        request.session.save()
    assert content(session) == {"n": 1}

    request = requested(session)
    run(read_only_session, lambda r: r.session["n"], request, how)
    request.session["n"] = 3  # some other middleware, after the view
    request.session.save()
    assert content(session) == {"n": 3}


@both
def test_durable_session(runtime: Runtime, how: str) -> None:
    session = created(n=1)
    run(durable_session, lambda r: r.session["n"], requested(session), how)
    assert runtime.counters.totals()[Counter.WRITES_THROUGH] == 0

    run(durable_session, lambda r: r.session.update({"n": 2}), requested(session), how)
    assert row(session.session_key) == {"n": 2}
