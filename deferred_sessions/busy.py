"""The busy indicator: in exclusive mode a session belongs to one request at a time.

Called by `middleware` around each request and by `backend` when a session is loaded.
Invariant: what a request holds is given back when the request ends, however it ends; and
outside of requests nothing is held, because nobody would give it back.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Hashable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from typing import Final

from deferred_sessions.exceptions import LockTimeoutError, SessionBusy
from deferred_sessions.memory.claims import Claim, Claims

_request: ContextVar[list[Claim] | None] = ContextVar("deferred_sessions_busy", default=None)
"""What the request of this context holds; None outside of requests."""
_NOTHING_HELD: Final = nullcontext()


class Busy:
    """Claims whole sessions for requests."""

    def __init__(self, claims: Claims, *, is_exclusive: bool, timeout: float) -> None:
        self.is_exclusive = is_exclusive
        """Whether requests claim their sessions at all."""
        self._claims = claims
        self._timeout = timeout

    def request(self) -> AbstractContextManager[None]:
        """Be the request that holds what is loaded in the block."""
        return self._holding() if self.is_exclusive else _NOTHING_HELD

    @contextmanager
    def _holding(self) -> Iterator[None]:
        held: list[Claim] = []
        token = _request.set(held)
        try:
            yield
        finally:
            _request.reset(token)
            while held:
                self._claims.release(held.pop())

    def take(self, key: str) -> None:
        """Wait until no other request uses the session, and hold it to the end of this one.

        Raises:
            SessionBusy: It took longer than `LOCK_TIMEOUT`; or it would have to wait on an
                event loop, which the request that has the session may need to go on.
        """
        held = _request.get()
        if held is None:
            return
        timeout = 0.0 if is_on_event_loop() else self._timeout
        try:
            claim = self._claims.hold(key, frozenset(), id(held), timeout)
        except LockTimeoutError as error:
            raise SessionBusy(str(error)) from error
        if claim is not None:
            held.append(claim)

    async def atake(self, key: str) -> None:
        """Do what `take` does, without holding up the event loop."""
        held = _request.get()
        if held is None:
            return
        try:
            claim = await self._claims.ahold(key, frozenset(), id(held), self._timeout)
        except LockTimeoutError as error:
            raise SessionBusy(str(error)) from error
        if claim is not None:
            held.append(claim)


def owner() -> Hashable:
    """Return who would hold a claim made now: the request, the task, or the thread."""
    held = _request.get()
    if held is not None:
        return id(held)
    if is_on_event_loop():
        return asyncio.current_task()
    return threading.get_ident()


def is_on_event_loop() -> bool:
    """Tell whether waiting here would hold up an event loop."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True
