"""An optional drop-in for Django's session middleware.

    MIDDLEWARE = [..., "deferred_sessions.middleware.SessionMiddleware", ...]

It does what Django's does, and besides: under ASGI it never leaves the event loop for a
session in memory; it gives back a session that was claimed for the request (`LOCKING`
"exclusive"), however the request ends; and where Django's answers with an internal
error because a session is busy or PostgreSQL is away, it says 503, come again. With
`NODE_COOKIE` it names the node to visitors who have a session. Invariant: an answer of 503
leaves the visitor's cookie alone.
"""

from __future__ import annotations

import logging
from typing import Any, Final

from django.contrib.sessions.backends.base import UpdateError
from django.contrib.sessions.middleware import SessionMiddleware as DjangoSessionMiddleware
from django.http import HttpRequest, HttpResponse
from django.http.response import HttpResponseBase

from deferred_sessions.client import client_of
from deferred_sessions.deferred_session import EXPIRY_KEY, DeferredSession
from deferred_sessions.exceptions import (
    JournalError,
    LockTimeoutError,
    ServerUnavailableError,
    StoreFullError,
)
from deferred_sessions.runtime import Runtime, get_runtime_in_use

logger = logging.getLogger(__name__)

UNAVAILABLE: Final = 503
RETRY_AFTER: Final = 1  # seconds
TROUBLE: Final = (ServerUnavailableError, LockTimeoutError, StoreFullError, JournalError)
TEXT: Final = "The site is busy. Please try again in a moment."


class SessionMiddleware(DjangoSessionMiddleware):
    """Gives each request its session, and saves it when the response is ready."""

    def __call__(self, request: HttpRequest) -> Any:
        """Serve a request; a coroutine if the rest of the site is async."""
        runtime = get_runtime_in_use()
        if runtime is None:  # the project uses another engine
            return super().__call__(request)
        if self.async_mode:
            return self._aserve(request, runtime)
        return self._serve(request, runtime)

    def process_exception(self, request: HttpRequest, exception: Exception) -> HttpResponse | None:
        """Answer for a view that failed because its session was out of reach."""
        return self._come_again(request, exception) if isinstance(exception, TROUBLE) else None

    def process_response(self, request: HttpRequest, response: HttpResponse) -> HttpResponse:
        """Save the session and set its cookie, and the one that names this node."""
        answer = super().process_response(request, response)
        runtime = get_runtime_in_use()
        if runtime is not None and runtime.node_cookie is not None:
            runtime.node_cookie.mark(request, answer)
        return answer

    def _serve(self, request: HttpRequest, runtime: Runtime) -> HttpResponseBase:
        with runtime.busy.request():
            self.process_request(request)
            response: Any = self.get_response(request)
            if response.status_code >= 500:  # noqa: PLR2004
                return self._failed(request, response)
            self._note_client(request, runtime)
            try:
                return self.process_response(request, response)
            except TROUBLE as error:
                return self._come_again(request, error)

    async def _aserve(self, request: HttpRequest, runtime: Runtime) -> HttpResponseBase:
        with runtime.busy.request():
            self.process_request(request)
            response = await self.get_response(request)  # type: ignore[misc]
            if response.status_code >= 500:  # noqa: PLR2004
                return self._failed(request, response)
            self._note_client(request, runtime)
            session: Any = request.session
            failure: Exception | None = None
            try:
                if self._is_to_be_saved(session, runtime):
                    if "_session_cache" not in session.__dict__:  # it may be gone: a new key then
                        await session.aget(EXPIRY_KEY)
                    await session.asave()
                else:
                    return self.process_response(request, response)
            except UpdateError as error:
                failure = error
            except TROUBLE as error:
                return self._come_again(request, error)
            session.saved_already = (failure,)
            try:
                return self.process_response(request, response)
            finally:
                session.saved_already = None

    def _is_to_be_saved(self, session: Any, runtime: Runtime) -> bool:
        return (session.modified or runtime.saves_every_request) and not session.is_empty()

    def _note_client(self, request: HttpRequest, runtime: Runtime) -> None:
        settings, session = runtime.settings, request.session
        if settings.record_client and isinstance(session, DeferredSession):
            session.note_client(client_of(request.META, settings.trusted_proxies))

    def _failed(self, request: HttpRequest, response: HttpResponse) -> HttpResponseBase:
        """Return the answer to a request that failed, perhaps for want of its session."""
        trouble = getattr(request.session, "trouble", None)
        if trouble is not None and response.status_code == UNAVAILABLE:
            return response  # `process_exception` has said it
        if trouble is not None:
            return self._come_again(request, trouble)
        return self.process_response(request, response)

    def _come_again(self, request: HttpRequest, error: Exception) -> HttpResponse:
        logger.warning(
            "%s %s answered with 503: %s",
            request.method,
            request.path,
            error,
            extra={"action": "session_out_of_reach", "status_code": 503},
        )
        headers = {"Retry-After": str(RETRY_AFTER), "Cache-Control": "no-store"}
        return HttpResponse(TEXT, status=503, content_type="text/plain", headers=headers)
