"""What happens when a request has ended and its response has gone out.

Called by Django's `request_started` and `request_finished` signals (see `apps`) and by
`backend` when a session is loaded. Invariant: nothing here delays or fails a response.

Django's signals do not say which request they are about, so uses are kept in the
context of the request, which asgiref carries along between threads and event loops.
"""

from __future__ import annotations

import logging
from contextvars import ContextVar
from functools import partial
from typing import Final

from deferred_sessions import lifecycle
from deferred_sessions.exceptions import DeferredSessionsError
from deferred_sessions.flusher import Flusher
from deferred_sessions.memory.counters import Counter, Counters
from deferred_sessions.memory.store import HostStore
from deferred_sessions.policy import Policy

logger = logging.getLogger(__name__)

MAX_USES: Final = 100  # kept outside of requests, where nobody settles them

_uses: ContextVar[dict[str, None] | None] = ContextVar("deferred_sessions_uses", default=None)
"""The sessions that this request has used so far, in order."""


class RequestEnd:
    """Counts the requests that used a session, and flushes it if it is due."""

    def __init__(
        self,
        *,
        store: HostStore,
        flusher: Flusher,
        counters: Counters,
        policy: Policy,
        flush: bool,
    ) -> None:
        self._store = store
        self._flusher = flusher
        self._counters = counters
        self._policy = policy
        self._counts = policy.after_requests is not None
        self._flushes = flush
        self.is_needed = self._counts or self._flushes
        """Whether uses have to be noted at all; by default they need not."""

    def note_use(self, key: str) -> None:
        """Note that this request uses the session of `key`."""
        uses = _uses.get()
        if uses is None:
            uses = {}
            _uses.set(uses)
        uses[key] = None
        if len(uses) > MAX_USES:
            del uses[next(iter(uses))]

    def begin(self) -> None:
        """Forget uses in this context that did not belong to a request."""
        if self.is_needed:
            _uses.set({})

    def finish(self, now: float) -> None:
        """Settle the uses of the request that has ended."""
        self._counters.add(Counter.REQUESTS)
        if not self.is_needed or not (uses := _uses.get()):
            return
        keys = list(uses)
        uses.clear()
        try:
            self._settle(keys, now)
        except DeferredSessionsError:
            logger.exception(
                "The end of a request could not be counted.",
                extra={"action": "request_end_failed"},
            )

    def _settle(self, keys: list[str], now: float) -> None:
        if self._counts:
            served = partial(lifecycle.served, now=now, policy=self._policy)
            for key in keys:
                self._store.update(key, lambda record: record and served(record))
        if self._flushes:
            self._flusher.flush_due(keys, now)
