"""What happens when a request has ended and its response has gone out.

Called by Django's `request_started` and `request_finished` signals (see `apps`) and by
`backend` when a session is loaded. Invariant: nothing here delays or fails a response.

Django's signals do not say which request they are about. Under WSGI a request stays
on its thread, so uses are kept by thread; under ASGI it wanders, so the end of any
request settles all uses noted so far, at most a request too early.
"""

from __future__ import annotations

import logging
import threading
from functools import partial

from deferred_sessions import lifecycle
from deferred_sessions.exceptions import DeferredSessionsError
from deferred_sessions.flusher import Flusher
from deferred_sessions.memory.counters import Counter, Counters
from deferred_sessions.memory.store import HostStore
from deferred_sessions.policy import Policy

logger = logging.getLogger(__name__)


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
        self._uses: dict[int, list[str]] = {}

    def note_use(self, key: str) -> None:
        """Note that the request on this thread uses the session of `key`."""
        self._uses.setdefault(threading.get_ident(), []).append(key)

    def begin(self) -> None:
        """Forget uses on this thread that did not belong to a request."""
        self._uses.pop(threading.get_ident(), None)

    def finish(self, now: float, *, on_this_thread: bool) -> None:
        """Settle the uses of the request that has ended."""
        self._counters.add(Counter.REQUESTS)
        if not self._uses:
            return
        try:
            self._settle(self._take(on_this_thread=on_this_thread), now)
        except DeferredSessionsError:
            logger.exception(
                "The end of a request could not be counted.",
                extra={"action": "request_end_failed"},
            )

    def _take(self, *, on_this_thread: bool) -> list[str]:
        if on_this_thread:
            return self._uses.pop(threading.get_ident(), [])
        taken, self._uses = self._uses, {}
        return [key for keys in taken.values() for key in keys]

    def _settle(self, keys: list[str], now: float) -> None:
        if self._counts:
            served = partial(lifecycle.served, now=now, policy=self._policy)
            for key in keys:
                self._store.update(key, lambda record: record and served(record))
        if self._flushes:
            self._flusher.flush_due(list(dict.fromkeys(keys)), now)
