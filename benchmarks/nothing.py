"""A session engine that stores nothing: the most that any engine can reach.

Every session has the same content, and every save is forgotten.
"""

from __future__ import annotations

from typing import Any

from django.contrib.sessions.backends.base import SessionBase
from django.contrib.sessions.middleware import SessionMiddleware as DjangoSessionMiddleware

from benchmarks.sessions import content

CONTENT = content(300)
KEY = "x" * 32


class SessionStore(SessionBase):
    """Loads and saves without doing it."""

    def load(self) -> dict[str, Any]:
        """Return what every session has."""
        return CONTENT.copy()

    async def aload(self) -> dict[str, Any]:
        """Do what `load` does."""
        return CONTENT.copy()

    def save(self, must_create: bool = False) -> None:  # noqa: ARG002 - Django's signature
        """Forget it."""
        self._session_key = self._session_key or KEY

    def create(self) -> None:
        """Make a key."""
        self._session_key = KEY


class SessionMiddleware(DjangoSessionMiddleware):
    """Gives requests a session, and sets the cookie; under ASGI without Django's threads."""

    async def __acall__(self, request: Any) -> Any:
        """Do what Django's does, on the event loop: the answer is the same as under WSGI."""
        self.process_request(request)
        response = await self.get_response(request)  # type: ignore[misc]
        return self.process_response(request, response)
