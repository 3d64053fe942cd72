"""A session engine that keeps encoded sessions in a dictionary of the process.

The least that an engine can do which keeps anything: no sharing, no locks, no expiry. Shows
what share of the engine that does nothing could be reached at all.
"""

from __future__ import annotations

import json
from typing import Any

from django.contrib.sessions.backends.base import SessionBase

from benchmarks.nothing import CONTENT, KEY

ENCODED = json.dumps(CONTENT, separators=(",", ":")).encode()
_kept: dict[str | None, bytes] = {}


class SessionStore(SessionBase):
    """Decodes with each load, encodes with each save."""

    def load(self) -> dict[str, Any]:
        """Return the session; a new process has the same for every key."""
        session: dict[str, Any] = json.loads(_kept.get(self._session_key, ENCODED))
        return session

    def save(self, must_create: bool = False) -> None:  # noqa: ARG002 - Django's signature
        """Keep it for this process."""
        self._session_key = self._session_key or KEY
        session = self._get_session()  # type: ignore[attr-defined]
        _kept[self._session_key] = json.dumps(session, separators=(",", ":")).encode()

    def create(self) -> None:
        """Make a key."""
        self._session_key = KEY
