"""Our session middleware: 503 where Django's fails, and no thread for what is in memory."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from asgiref.sync import async_to_sync, sync_to_async
from django.contrib.sessions.exceptions import SessionInterrupted
from django.db import connection
from django.http import HttpRequest, HttpResponse, StreamingHttpResponse
from django.test import AsyncClient, Client, RequestFactory

from deferred_sessions.backend import SessionStore
from deferred_sessions.conf import MIDDLEWARE
from deferred_sessions.memory.counters import Counter
from deferred_sessions.middleware import SessionMiddleware
from deferred_sessions.runtime import Runtime
from tests.integration.conftest import Outage, created, forget, row

pytestmark = pytest.mark.django_db(transaction=True)
View = Callable[[HttpRequest], Any]
Serve = Callable[..., Any]


@pytest.fixture(params=["sync", "async"])
def serve(request: pytest.FixtureRequest) -> Serve:
    """Send a request with the cookie of a session to a view; return the response."""

    def do(session: SessionStore | None, view: View) -> Any:
        http_request = RequestFactory().get("/")
        if session is not None:
            http_request.COOKIES["sessionid"] = str(session.session_key)
        if request.param == "sync":
            return SessionMiddleware(view)(http_request)

        async def aview(request: HttpRequest) -> Any:
            return await sync_to_async(view)(request)

        return async_to_sync(SessionMiddleware(aview))(http_request)  # type: ignore[arg-type]

    return do


@pytest.fixture(params=["sync", "async"])
def get(request: pytest.FixtureRequest) -> Callable[[str, str], Any]:
    """Ask the whole site for an address with a cookie."""

    def ask(key: str, path: str) -> Any:
        if request.param == "sync":
            client = Client(raise_request_exception=False)
            client.cookies["sessionid"] = key
            return client.get(path)

        async def aask() -> Any:
            client = AsyncClient(raise_request_exception=False)
            client.cookies["sessionid"] = key
            return await client.get(path)

        return async_to_sync(aask)()

    return ask


def assert_come_again(response: Any) -> None:
    assert response.status_code == 503
    assert response["Retry-After"] == "1"
    assert "sessionid" not in response.cookies
    assert b"try again" in response.content


def count(request: HttpRequest) -> HttpResponse:
    request.session["n"] = request.session.get("n", 0) + 1
    return HttpResponse(str(request.session["n"]))


def test_it_is_in_use(settings: Any) -> None:
    assert MIDDLEWARE in settings.MIDDLEWARE


def test_an_unknown_cookie_while_postgresql_is_away(
    runtime: Runtime,
    outage: Outage,
    get: Callable[[str, str], Any],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Never a logout: the cookie stays as it is; and it is logged once."""
    session = created(count=1)
    forget(runtime)
    outage.begin()
    assert_come_again(get(session.session_key or "", "/probe/count/"))
    assert caplog.text.count("/probe/count/ answered with 503") == 1
    outage.end()

    assert get(session.session_key or "", "/probe/count/").json()["value"] == 2


def test_a_failure_behind_another_middleware(
    runtime: Runtime, outage: Outage, serve: Serve
) -> None:
    """Django has made a 500 of it before it gets to us."""
    session = created(n=1)
    forget(runtime)
    outage.begin()

    def view(request: HttpRequest) -> HttpResponse:
        try:
            count(request)
        except ConnectionError:
            return HttpResponse("Server Error (500)", status=500)
        raise AssertionError

    assert_come_again(serve(session, view))


def test_another_failure_stays_a_failure(get: Callable[[str, str], Any]) -> None:
    session = created(n=1)
    assert get(session.session_key or "", "/probe/fail/").status_code == 500
    assert row(session.session_key) == {"n": 1}


def test_a_save_that_cannot_be_done(runtime: Runtime, outage: Outage, serve: Serve) -> None:
    """It was evicted while the view ran, and nobody knows whether it still exists."""
    session = created(n=1)

    def view(request: HttpRequest) -> HttpResponse:
        response = count(request)
        forget(runtime)
        outage.begin()
        return response

    assert_come_again(serve(session, view))


def test_a_session_deleted_during_the_request(serve: Serve) -> None:
    session = created(n=1)

    def view(request: HttpRequest) -> HttpResponse:
        response = count(request)
        session.delete()
        return response

    with pytest.raises(SessionInterrupted):
        serve(session, view)


def test_a_session_that_is_gone_goes_on_under_another_key(serve: Serve, settings: Any) -> None:
    """Also if only the middleware saves it."""
    settings.SESSION_SAVE_EVERY_REQUEST = True
    session = created(n=1)
    key = str(session.session_key)
    session.delete()

    response = serve(session, lambda _: HttpResponse())
    assert response.cookies["sessionid"].value not in ("", key)


def test_it_saves_once(runtime: Runtime, serve: Serve) -> None:
    session = created(n=1)

    def saves() -> int:
        return sum(map(runtime.counters.total, (Counter.UPDATES, Counter.TOUCHES)))

    before = saves()
    serve(session, count)
    assert saves() == before + 1


def test_code_around_it_may_save_once_more(serve: Serve) -> None:
    """After the response, say another middleware or a test."""
    session = created(n=1)
    served: list[Any] = []

    def view(request: HttpRequest) -> HttpResponse:
        served.append(request.session)
        return count(request)

    serve(session, view)
    served[0]["n"] = 7
    served[0].save()
    assert SessionStore(session.session_key)["n"] == 7


def test_busy(tune: Callable[..., Runtime], serve: Serve) -> None:
    runtime = tune(LOCKING="exclusive", LOCK_TIMEOUT=0.02)
    session = created(n=1)
    with runtime.busy.request():
        assert SessionStore(session.session_key)["n"] == 1
        with ThreadPoolExecutor(1) as pool:
            busy = pytest.raises(TimeoutError)
            with busy:
                pool.submit(serve, session, count).result(30)

    assert serve(session, count).content == b"2"


def test_busy_over_the_whole_site(
    tune: Callable[..., Runtime], get: Callable[[str, str], Any]
) -> None:
    runtime = tune(LOCKING="exclusive", LOCK_TIMEOUT=0.02)
    session = created(count=1)
    with runtime.busy.request():
        assert SessionStore(session.session_key)["count"] == 1
        with ThreadPoolExecutor(1) as pool:
            assert_come_again(pool.submit(get, session.session_key, "/probe/count/").result(30))


@pytest.mark.parametrize("ending", ["raises", "streams", "answers"])
def test_a_busy_session_is_given_back(
    tune: Callable[..., Runtime], serve: Serve, ending: str
) -> None:
    runtime = tune(LOCKING="exclusive", LOCK_TIMEOUT=0.02)
    session = created(n=1)

    def view(request: HttpRequest) -> Any:
        response = count(request)
        assert len(runtime.claims._lines) == 1
        if ending == "raises":
            raise ValueError("no")
        return StreamingHttpResponse([b"a", b"b"]) if ending == "streams" else response

    if ending == "raises":
        with pytest.raises(ValueError, match="no"):
            serve(session, view)
    else:
        serve(session, view)
    assert runtime.claims._lines == {}
    assert SessionStore(session.session_key)["n"] == (1 if ending == "raises" else 2)


def test_a_client_that_goes_away(tune: Callable[..., Runtime]) -> None:
    """The server cancels the request; whoever waits for the session goes on."""
    runtime = tune(LOCKING="exclusive")
    session = created(n=1)

    async def work() -> None:
        started = asyncio.Event()

        async def view(request: HttpRequest) -> HttpResponse:
            assert await request.session.aget("n") == 1
            started.set()
            await asyncio.sleep(60)
            return HttpResponse()

        request = RequestFactory().get("/")
        request.COOKIES["sessionid"] = str(session.session_key)
        task = asyncio.create_task(SessionMiddleware(view)(request))  # type: ignore[arg-type]
        await started.wait()
        assert len(runtime.claims._lines) == 1
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    async_to_sync(work)()
    assert runtime.claims._lines == {}


def test_a_hit_never_leaves_the_event_loop(settings: Any) -> None:
    """Neither the load, nor the save, nor the cookie takes a thread."""
    settings.SESSION_SAVE_EVERY_REQUEST = True
    session = created(n=1)
    before = threading.active_count()

    async def view(request: HttpRequest) -> HttpResponse:
        await request.session.aset("n", await request.session.aget("n") + 1)
        return HttpResponse()

    async def untouched(request: HttpRequest) -> HttpResponse:
        return HttpResponse()

    async def work() -> Any:
        for each in (view, untouched):
            request = RequestFactory().get("/")
            request.COOKIES["sessionid"] = str(session.session_key)
            response = await SessionMiddleware(each)(request)  # type: ignore[arg-type]
        assert threading.active_count() == before
        return response

    connection.close()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("asgiref.sync.SyncToAsync.__call__", None)
        response = asyncio.run(work())
    assert response.cookies["sessionid"].value == session.session_key
    assert SessionStore(session.session_key)["n"] == 2


def test_another_engine(settings: Any, serve: Serve) -> None:
    """It does what Django's does if the project goes back to another engine."""
    settings.SESSION_ENGINE = "django.contrib.sessions.backends.signed_cookies"
    response = serve(None, count)
    assert response.status_code == 200
    assert response.cookies["sessionid"].value
