"""The cookie that names the node, for directors that set none."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from asgiref.sync import async_to_sync
from django.test import AsyncClient, Client

from deferred_sessions.runtime import Runtime

pytestmark = pytest.mark.django_db(transaction=True)


@pytest.fixture(params=["sync", "async"])
def get(request: pytest.FixtureRequest) -> Callable[..., Any]:
    """Ask the site for an address as one visitor, with cookies that are kept."""
    if request.param == "sync":
        return Client().get
    return async_to_sync(AsyncClient().get)


def test_a_visitor_with_a_session_is_told(tune: Callable[..., Runtime], get: Any) -> None:
    tune(NODE="web1", NODE_COOKIE="sessionnode")
    cookie = get("/probe/count/").cookies["sessionnode"]
    assert cookie.value == "web1"
    assert (cookie["httponly"], cookie["samesite"], cookie["path"]) == (True, "Lax", "/")
    assert (cookie["max-age"], cookie["expires"], cookie["secure"]) == ("", "", "")

    assert "sessionnode" not in get("/probe/count/").cookies  # not again
    tune(NODE="web2")
    assert get("/probe/read/").cookies["sessionnode"].value == "web2"


def test_it_goes_where_the_session_cookie_goes(tune: Callable[..., Runtime], settings: Any) -> None:
    settings.SESSION_COOKIE_SECURE = True
    settings.SESSION_COOKIE_PATH = "/probe/"
    settings.SESSION_COOKIE_DOMAIN = "example.com"
    settings.SESSION_COOKIE_SAMESITE = "Strict"
    tune(NODE="web1", NODE_COOKIE="sessionnode")
    cookies = Client().get("/probe/count/").cookies
    for name in ("secure", "path", "domain", "samesite", "httponly"):
        assert cookies["sessionnode"][name] == cookies["sessionid"][name]


@pytest.mark.parametrize("path", ["/probe/nothing/", "/probe/read/", "/healthz"])
def test_who_has_no_session_gets_no_cookie(
    tune: Callable[..., Runtime], get: Any, path: str
) -> None:
    """Such a page may be kept in a cache that is shared by all."""
    tune(NODE="web1", NODE_COOKIE="sessionnode")
    assert not get(path).cookies


def test_a_page_that_uses_no_session_sets_no_cookie(tune: Callable[..., Runtime], get: Any) -> None:
    get("/probe/count/")
    tune(NODE="web1", NODE_COOKIE="sessionnode")
    response = get("/probe/nothing/")
    assert "sessionnode" not in response.cookies
    response = get("/probe/read/")
    assert "sessionnode" in response.cookies
    assert response["Vary"] == "Cookie"


@pytest.mark.parametrize("changes", [{}, {"NODE": "web1"}, {"NODE_COOKIE": "sessionnode"}])
def test_it_is_off_by_default(tune: Callable[..., Runtime], get: Any, changes: Any) -> None:
    tune(**changes)
    assert set(get("/probe/count/").cookies) == {"sessionid"}
