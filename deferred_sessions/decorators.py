"""Decorators for views that need more, or less, of their session than others.

    @exclusive_session      no other request uses the session meanwhile
    @read_only_session      does not wait for others, and must not change the session
    @durable_session        its changes are in PostgreSQL before the response leaves

They work on sync and on async views. Invariant: a view that raises changes nothing here.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from functools import wraps
from typing import Any

from asgiref.sync import iscoroutinefunction

from deferred_sessions.exceptions import ReadOnlySessionError

View = Callable[..., Any]

CHANGED = "The view {} is decorated with @read_only_session, but changed the session."


def exclusive_session(view: View) -> View:
    """Let `view` have the session of its visitor to itself, whatever `LOCKING` says.

    What the view changed is saved before the next one goes on. A visitor without a
    session has nothing to share, and gets none from this.
    """

    def run(request: Any, *args: Any, **kwargs: Any) -> Any:
        request.session.keys()  # loads: a cookie alone is no session
        if request.session.session_key is None:
            return view(request, *args, **kwargs)
        with request.session.lock():
            return view(request, *args, **kwargs)

    async def arun(request: Any, *args: Any, **kwargs: Any) -> Any:
        await request.session.akeys()
        if request.session.session_key is None:
            return await view(request, *args, **kwargs)
        async with request.session.lock():
            return await view(request, *args, **kwargs)

    return _like(view, run, arun)


def read_only_session(view: View) -> View:
    """Let `view` read the session without waiting for requests that use it.

    Raises:
        ReadOnlySessionError: It changed the session; nothing of that is saved.
    """

    def run(request: Any, *args: Any, **kwargs: Any) -> Any:
        was_modified = request.session.modified
        request.session.is_read_only = True
        response = view(request, *args, **kwargs)
        _end_reading(request, view, was_modified=was_modified)
        return response

    async def arun(request: Any, *args: Any, **kwargs: Any) -> Any:
        was_modified = request.session.modified
        request.session.is_read_only = True
        response = await view(request, *args, **kwargs)
        _end_reading(request, view, was_modified=was_modified)
        return response

    return _like(view, run, arun)


def durable_session(view: View) -> View:
    """Have what `view` changed in PostgreSQL before its response leaves.

    Raises:
        ServerUnavailableError: PostgreSQL is away; memory has the change all the same.
    """

    def run(request: Any, *args: Any, **kwargs: Any) -> Any:
        response = view(request, *args, **kwargs)
        if request.session.modified and not request.session.is_empty():
            request.session.persist()
        return response

    async def arun(request: Any, *args: Any, **kwargs: Any) -> Any:
        response = await view(request, *args, **kwargs)
        if request.session.modified and not request.session.is_empty():
            await request.session.apersist()
        return response

    return _like(view, run, arun)


def _end_reading(request: Any, view: View, *, was_modified: bool) -> None:
    if request.session.modified and not was_modified:
        raise ReadOnlySessionError(CHANGED.format(getattr(view, "__qualname__", view)))
    request.session.is_read_only = False


def _like(view: View, run: View, arun: Callable[..., Awaitable[Any]]) -> View:
    return wraps(view)(arun if iscoroutinefunction(view) else run)
