"""What Django's session middleware does with an engine: cookies, saves, interruptions."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
from asgiref.sync import async_to_sync
from django.contrib.sessions.backends.base import SessionBase
from django.contrib.sessions.exceptions import SessionInterrupted
from django.contrib.sessions.middleware import SessionMiddleware as DjangoMiddleware
from django.http import HttpRequest, HttpResponse
from django.test import RequestFactory

from deferred_sessions.middleware import SessionMiddleware

Engine = type[SessionBase]
View = Callable[[HttpRequest], HttpResponse]
Serve = Callable[..., HttpResponse]


@pytest.fixture(params=[DjangoMiddleware, SessionMiddleware], ids=["djangos", "ours"])
def middleware(request: pytest.FixtureRequest) -> Any:
    """Django's middleware, and ours, which can take its place."""
    return request.param


@pytest.fixture(params=["sync", "async"])
def serve(request: pytest.FixtureRequest, engine: Engine, middleware: Any) -> Serve:
    """Send a request through the middleware to a view; return the response."""

    def do(view: View, http_request: HttpRequest | None = None, cookie: str = "") -> HttpResponse:
        http_request = http_request or RequestFactory().get("/")
        if cookie:
            http_request.COOKIES["sessionid"] = cookie
        if request.param == "sync":
            return middleware(view)(http_request)

        async def aview(request: HttpRequest) -> HttpResponse:
            await asyncio.sleep(0)
            return view(request)

        return async_to_sync(middleware(aview))(http_request)

    return do


def touching(request: HttpRequest) -> HttpResponse:
    request.session._session_cache = {**getattr(request.session, "_session_cache", {}), "hello": 1}  # type: ignore[attr-defined]
    request.session.accessed = request.session.modified = True
    return HttpResponse("touched")


def leaving_alone(_: HttpRequest) -> HttpResponse:
    return HttpResponse("left alone")


@pytest.mark.parametrize(
    ("setting", "value", "attribute", "expected"),
    [
        ("SESSION_COOKIE_SECURE", True, "secure", True),
        ("SESSION_COOKIE_HTTPONLY", True, "httponly", True),
        ("SESSION_COOKIE_HTTPONLY", False, "httponly", ""),
        ("SESSION_COOKIE_SAMESITE", "Strict", "samesite", "Strict"),
    ],
)
def test_the_cookie_is_as_the_settings_say(
    serve: Serve, settings: Any, setting: str, value: Any, attribute: str, expected: Any
) -> None:
    setattr(settings, setting, value)

    response = serve(touching)

    assert response.cookies["sessionid"][attribute] == expected
    assert response.headers["Vary"] == "Cookie"


@pytest.mark.parametrize("status", [500, 503])
def test_errors_of_the_server_save_nothing(serve: Serve, engine: Engine, status: int) -> None:
    request = RequestFactory().get("/")

    def failing(request: HttpRequest) -> HttpResponse:
        return HttpResponse(touching(request).content, status=status)

    response = serve(failing, request)

    assert "sessionid" not in response.cookies
    assert not engine.get_model_class().objects.exists()  # type: ignore[attr-defined]


def test_a_session_deleted_meanwhile_interrupts_the_request(serve: Serve, engine: Engine) -> None:
    session = engine()
    session.save()

    def deleting(request: HttpRequest) -> HttpResponse:
        response = touching(request)
        request.session._session_key = session.session_key  # type: ignore[attr-defined]
        return response

    session.delete()
    with pytest.raises(SessionInterrupted, match="deleted before the request completed"):
        serve(deleting)


def test_the_cookie_of_an_ended_session_is_deleted(
    serve: Serve, settings: Any, engine: Engine
) -> None:
    settings.SESSION_COOKIE_DOMAIN, settings.SESSION_COOKIE_PATH = ".example.local", "/example/"

    def ending(request: HttpRequest) -> HttpResponse:
        request.session._session_cache = {}  # type: ignore[attr-defined]
        request.session._session_key = None  # type: ignore[attr-defined]
        request.session.accessed = request.session.modified = True
        return HttpResponse("ended")

    response = serve(ending, cookie="abc")

    morsel = response.cookies["sessionid"]
    assert morsel.value == ""
    assert morsel["max-age"] == 0
    assert (morsel["domain"], morsel["path"]) == (".example.local", "/example/")
    assert response.headers["Vary"] == "Cookie"


def test_an_unknown_cookie_is_deleted_when_it_is_looked_at(serve: Serve, engine: Engine) -> None:
    def looking(request: HttpRequest) -> HttpResponse:
        return HttpResponse("looked")

    request = RequestFactory().get("/")
    response = serve(looking, request, cookie="unknownunknown")
    assert "sessionid" not in response.cookies

    request.session.get("x")
    response = SessionMiddleware(leaving_alone).process_response(request, HttpResponse())
    assert response.cookies["sessionid"].value == ""


def test_no_cookie_for_a_visitor_who_gets_nothing(serve: Serve) -> None:
    response = serve(leaving_alone)

    assert not response.cookies
    assert "Vary" not in response.headers


def test_saving_every_request_renews_the_cookie(
    serve: Serve, settings: Any, engine: Engine
) -> None:
    settings.SESSION_SAVE_EVERY_REQUEST = True
    first = serve(touching)

    second = serve(leaving_alone, cookie=first.cookies["sessionid"].value)

    assert second.cookies["sessionid"].value == first.cookies["sessionid"].value
    assert second.headers["Vary"] == "Cookie"


def test_a_session_emptied_of_its_data_stays(serve: Serve, engine: Engine) -> None:
    """Emptied, but not ended: it is saved, and the cookie stays."""
    key = serve(touching).cookies["sessionid"].value

    def emptying(request: HttpRequest) -> HttpResponse:
        request.session.clear()
        return HttpResponse("emptied")

    response = serve(emptying, cookie=key)

    assert response.cookies["sessionid"].value == key
    assert engine(key).load() == {}
    assert engine().exists(key) is True
