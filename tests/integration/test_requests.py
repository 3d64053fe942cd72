"""Real requests through Django's handlers: login, logout, and the ends of requests."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest
from asgiref.sync import async_to_sync
from django.contrib.auth.models import User
from django.db import connection
from django.test import AsyncClient, Client
from django.test.utils import CaptureQueriesContext
from freezegun import freeze_time

from deferred_sessions import request_end
from deferred_sessions.memory.counters import Counter
from deferred_sessions.models import Session
from deferred_sessions.runtime import Runtime, get_runtime
from tests.integration.conftest import row

pytestmark = pytest.mark.django_db(transaction=True)


def key_of(client: Client) -> str:
    return str(client.cookies["sessionid"].value)


def test_d07_every_request_updates_the_session(client: Client) -> None:
    values = [client.get("/probe/count/").json()["value"] for _ in range(5)]

    assert values == [1, 2, 3, 4, 5]
    assert row(key_of(client)) == {"count": 1}


def test_a_visitor_who_only_reads_causes_no_write(client: Client, runtime: Runtime) -> None:
    """No write to PostgreSQL, and none to memory either."""
    client.get("/probe/count/")
    before = runtime.counters.totals()
    with CaptureQueriesContext(connection) as queries:
        for _ in range(10):
            client.get("/probe/read/")
            client.get("/probe/nothing/")

    after = runtime.counters.totals()
    assert len(queries) == 0
    assert runtime.flusher.flush_once(time.time() + 3600).rows == 0
    assert after[Counter.UPDATES] == before[Counter.UPDATES]
    assert after[Counter.TOUCHES] == before[Counter.TOUCHES] == 0


def test_a_visitor_without_a_session_gets_none(client: Client) -> None:
    client.get("/probe/read/")
    client.get("/probe/nothing/")

    assert "sessionid" not in client.cookies
    assert not Session.objects.exists()


def test_save_every_request_does_not_write_either(client: Client, settings: Any) -> None:
    settings.SESSION_SAVE_EVERY_REQUEST = True
    client.get("/probe/count/")
    for _ in range(10):
        client.get("/probe/read/")

    runtime = get_runtime()
    assert runtime.counters.totals()[Counter.TOUCHES] >= 10
    assert runtime.flusher.flush_once(time.time() + 3600).updated <= 1
    assert runtime.flusher.flush_once(time.time() + 7200).rows == 0


def test_login_is_in_postgresql_before_the_response(client: Client) -> None:
    """A crash of the host right after the response does not log anybody out."""
    User.objects.create_user("ann", password="secret")
    client.get("/probe/count/")
    before = key_of(client)

    answer = client.post("/probe/login/", {"username": "ann", "password": "secret"}).json()

    assert answer["user"] == "ann"
    assert key_of(client) != before
    stored = row(key_of(client))
    assert stored is not None
    assert stored["count"] == 1
    assert stored["_auth_user_id"]
    assert stored["_auth_user_hash"]
    assert row(before) is None


def test_logout_is_in_postgresql_before_the_response(client: Client) -> None:
    User.objects.create_user("ann", password="secret")
    client.post("/probe/login/", {"username": "ann", "password": "secret"})
    key = key_of(client)

    client.post("/probe/logout/")

    assert row(key) is None
    stolen = Client()
    stolen.cookies["sessionid"] = key
    assert stolen.get("/probe/read/").json()["session"] is None


def test_the_test_client_works(client: Client) -> None:
    """`client.session`, `login` and `logout`, as in every project's tests."""
    User.objects.create_user("ann", password="secret")
    assert client.login(username="ann", password="secret")
    session = client.session
    session["count"] = 41
    session.save()

    assert client.get("/probe/count/").json()["value"] == 42
    client.logout()
    assert client.get("/probe/read/").json()["value"] is None


def test_the_async_test_client_works() -> None:
    User.objects.create_user("ann", password="secret")

    async def work() -> None:
        client = AsyncClient()
        await client.alogin(username="ann", password="secret")
        session = await client.asession()
        await session.aset("count", 41)
        await session.asave()
        assert (await client.get("/probe/acount/")).json()["value"] == 42

    async_to_sync(work)()


def test_the_admin_works(client: Client) -> None:
    User.objects.create_superuser("root", password="secret")
    assert client.login(username="root", password="secret")

    assert client.get("/admin/").status_code == 200


def test_a_failing_view_saves_nothing(client: Client) -> None:
    client.raise_request_exception = False
    client.get("/probe/count/")
    client.get("/probe/fail/")

    assert client.get("/probe/read/failed/").json()["value"] is None


# The ends of requests


@pytest.mark.parametrize(("requests", "written"), [(2, False), (3, True)])
def test_a08_written_after_n_requests_and_not_before(
    tune: Callable[..., Runtime], client: Client, requests: int, written: bool
) -> None:
    """A08: N requests cause the write, one less does not; reads count as well."""
    runtime = tune(FLUSH_AFTER_REQUESTS=3)
    client.get("/probe/count/")
    client.get("/probe/count/")
    for _ in range(requests - 1):
        client.get("/probe/read/")

    assert runtime.flusher.flush_once(time.time()).rows == int(written)


def test_a08_requests_without_the_session_do_not_count(
    tune: Callable[..., Runtime], client: Client
) -> None:
    runtime = tune(FLUSH_AFTER_REQUESTS=2)
    client.get("/probe/count/")
    client.get("/probe/count/")
    for _ in range(5):
        client.get("/probe/nothing/")

    assert runtime.flusher.flush_once(time.time()).rows == 0


def test_a08_looking_at_a_session_outside_of_a_request_does_not_count(
    tune: Callable[..., Runtime], client: Client
) -> None:
    """Tests, shells and tasks are not visitors."""
    runtime = tune(FLUSH_AFTER_REQUESTS=2)
    client.get("/probe/count/")
    client.get("/probe/count/")
    for _ in range(5):
        assert client.session["count"] == 2
        client.get("/probe/nothing/")

    assert runtime.flusher.flush_once(time.time()).rows == 0


def test_a04_a_due_session_is_written_at_the_end_of_its_request(
    tune: Callable[..., Runtime], client: Client
) -> None:
    """A04: after the response; nobody else needs to come."""
    tune(FLUSH_AT_REQUEST_END=True, FLUSH_AFTER_UPDATES=2)
    client.get("/probe/count/")
    client.get("/probe/count/")
    assert row(key_of(client)) == {"count": 1}

    client.get("/probe/count/")

    assert row(key_of(client)) == {"count": 3}


def test_a09_the_first_request_after_the_interval_writes(
    tune: Callable[..., Runtime], client: Client
) -> None:
    """A09: with a time threshold, at the end of the first request after it was reached."""
    tune(FLUSH_AT_REQUEST_END=True, FLUSH_AFTER_UPDATES=None)
    with freeze_time("2026-06-01 12:00:00", ignore=["psycopg"]) as clock:
        client.get("/probe/count/")
        clock.tick(10)
        client.get("/probe/count/")
        assert row(key_of(client)) == {"count": 1}
        clock.tick(49)
        client.get("/probe/read/")
        assert row(key_of(client)) == {"count": 1}

        clock.tick(1)
        client.get("/probe/read/")
        assert row(key_of(client)) == {"count": 2}


def test_a09_the_first_request_after_n_requests_writes(
    tune: Callable[..., Runtime], client: Client
) -> None:
    """A09: with a count threshold, at the end of the request that reached it."""
    tune(FLUSH_AT_REQUEST_END=True, FLUSH_AFTER_REQUESTS=3)
    client.get("/probe/count/")
    client.get("/probe/count/")
    client.get("/probe/read/")
    assert row(key_of(client)) == {"count": 1}

    client.get("/probe/read/")
    assert row(key_of(client)) == {"count": 2}


def test_without_the_setting_requests_write_nothing(
    tune: Callable[..., Runtime], client: Client
) -> None:
    tune(FLUSH_AFTER_UPDATES=2)
    for _ in range(10):
        client.get("/probe/count/")

    assert row(key_of(client)) == {"count": 1}


def test_requests_are_counted_under_asgi(tune: Callable[..., Runtime]) -> None:
    """There a request wanders between threads, and is counted all the same."""
    runtime = tune(FLUSH_AT_REQUEST_END=True, FLUSH_AFTER_REQUESTS=3)

    async def work() -> str:
        client = AsyncClient()
        for _ in range(4):
            await client.get("/probe/acount/")
        return str(client.cookies["sessionid"].value)

    key = async_to_sync(work)()
    assert row(key) == {"count": 4}
    assert runtime.counters.totals()[Counter.REQUESTS] == 4


def test_async_views_are_counted_under_wsgi(client: Client, tune: Callable[..., Runtime]) -> None:
    """The view runs on another thread than the request."""
    tune(FLUSH_AT_REQUEST_END=True, FLUSH_AFTER_REQUESTS=3)
    for _ in range(4):
        client.get("/probe/acount/")

    assert row(key_of(client)) == {"count": 4}


def test_uses_outside_of_requests_do_not_pile_up(tune: Callable[..., Runtime]) -> None:
    """A Celery worker that looks at sessions never ends a request."""
    runtime = tune(FLUSH_AFTER_REQUESTS=3)
    runtime.request_end.begin()
    for number in range(1000):
        runtime.request_end.note_use(f"session{number:05d}")

    uses = request_end._uses.get()
    assert uses is not None
    assert len(uses) == request_end.MAX_USES
    assert "session00999" in uses


def test_the_end_of_a_request_survives_an_outage(
    tune: Callable[..., Runtime], client: Client, outage: Any, caplog: pytest.LogCaptureFixture
) -> None:
    runtime = tune(FLUSH_AT_REQUEST_END=True, FLUSH_AFTER_UPDATES=2)
    client.get("/probe/count/")
    outage.begin()
    for _ in range(3):
        assert client.get("/probe/count/").status_code == 200
    assert "The flush at the end of a request failed" in caplog.text

    outage.end()
    client.get("/probe/read/")
    assert row(key_of(client)) == {"count": 4}
    assert runtime.store.status().dirty == 0


def test_the_end_of_a_request_survives_a_broken_store(
    tune: Callable[..., Runtime], client: Client, caplog: pytest.LogCaptureFixture
) -> None:
    """The response is out; all that is left is to say what went wrong."""
    runtime = tune(FLUSH_AFTER_REQUESTS=2)
    client.get("/probe/count/")

    def broken(*_: Any) -> Any:
        from deferred_sessions.exceptions import StoreUnavailableError

        raise StoreUnavailableError("broken")

    with pytest.MonkeyPatch.context() as patch:
        runtime.request_end.note_use(key_of(client))
        patch.setattr(runtime.store, "update", broken)
        runtime.request_end.finish(time.time())

    assert "The end of a request could not be counted" in caplog.text
