"""Views that do one thing to a session each, for the tests and the benchmarks."""

from __future__ import annotations

import os
import signal

from django.contrib.auth import authenticate, login, logout
from django.http import HttpRequest, HttpResponse, JsonResponse
from django.urls import path
from django.views.decorators.csrf import csrf_exempt

from deferred_sessions.decorators import durable_session, exclusive_session


def count(request: HttpRequest, key: str = "count") -> JsonResponse:
    """Read, change and save the session."""
    request.session[key] = request.session.get(key, 0) + 1
    return _answer(request, key)


async def acount(request: HttpRequest, key: str = "count") -> JsonResponse:
    """Do the same as `count`, asynchronously."""
    await request.session.aset(key, await request.session.aget(key, 0) + 1)
    return _answer(request, key)


def locked(request: HttpRequest, key: str = "count") -> JsonResponse:
    """Do the same as `count`, with `key` locked."""
    with request.session.lock(key):
        request.session[key] = request.session.get(key, 0) + 1
    return _answer(request, key)


async def alocked(request: HttpRequest, key: str = "count") -> JsonResponse:
    """Do the same as `locked`, asynchronously."""
    async with request.session.lock(key):
        await request.session.aset(key, await request.session.aget(key, 0) + 1)
    return _answer(request, key)


@exclusive_session
def exclusive(request: HttpRequest, key: str = "count") -> JsonResponse:
    """Do the same as `count`, with the session to itself."""
    return count(request, key)


@durable_session
def durable(request: HttpRequest, key: str = "count") -> JsonResponse:
    """Do the same as `count`, in PostgreSQL before the answer."""
    return count(request, key)


def read(request: HttpRequest, key: str = "count") -> JsonResponse:
    """Read the session and leave it alone."""
    return _answer(request, key)


def who(request: HttpRequest) -> JsonResponse:
    """Change the session of whoever is logged in, and say who that is."""
    name = request.user.get_username()
    return _answer(request, "count") if not name else count(request)


def nothing(_: HttpRequest) -> HttpResponse:
    """Do not look at the session at all."""
    return HttpResponse("nothing")


def fail(request: HttpRequest) -> HttpResponse:
    """Change the session, then break."""
    request.session["failed"] = True
    raise RuntimeError("This view always fails.")


@csrf_exempt
def die(_: HttpRequest) -> HttpResponse:
    """Take the worker along."""
    os.kill(os.getpid(), signal.SIGKILL)
    return HttpResponse("never seen")


@csrf_exempt
def log_in(request: HttpRequest) -> JsonResponse:
    """Log in with `username` and `password`."""
    user = authenticate(
        request, username=request.POST["username"], password=request.POST["password"]
    )
    if user is not None:
        login(request, user)
    return JsonResponse({"user": str(request.user), "session": request.session.session_key})


@csrf_exempt
def log_out(request: HttpRequest) -> JsonResponse:
    """Log out."""
    logout(request)
    return JsonResponse({"user": str(request.user)})


def _answer(request: HttpRequest, key: str) -> JsonResponse:
    return JsonResponse(
        {
            "pid": os.getpid(),
            "value": request.session.get(key),
            "session": request.session.session_key,
            "user": str(request.user) if hasattr(request, "_cached_user") else None,
        }
    )


urlpatterns = [
    path("count/", count),
    path("count/<key>/", count),
    path("acount/", acount),
    path("locked/", locked),
    path("alocked/", alocked),
    path("exclusive/", exclusive),
    path("durable/", durable),
    path("read/", read),
    path("read/<key>/", read),
    path("nothing/", nothing),
    path("who/", who),
    path("fail/", fail),
    path("die/", die),
    path("login/", log_in),
    path("logout/", log_out),
]
