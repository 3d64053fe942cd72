"""`session.lock("cart")`: exclusive use of a session, or of portions of it.

Made by `backend`; works in `with` and in `async with`. On entry the session is brought up
to date, on exit it is saved. Invariant: whatever the block does or raises, the claim is
given back; and nothing waits for PostgreSQL while it is held, except for a session that
has left memory.
"""

from __future__ import annotations

from types import TracebackType
from typing import Final

from deferred_sessions.busy import is_on_event_loop, owner
from deferred_sessions.deferred_session import DeferredSession
from deferred_sessions.exceptions import LockTimeoutError
from deferred_sessions.memory.claims import Claim, Claims
from deferred_sessions.saving import Rest

SAVED: Final = (Rest.WRITE, Rest.SYNC)  # in memory; what is left needs no lock


class SessionLock:
    """Holds a session, or portions of it, for a block, which may enter it again."""

    def __init__(
        self, session: DeferredSession, claims: Claims, names: frozenset[str], timeout: float
    ) -> None:
        self._session = session
        self._claims = claims
        self._names = names
        self._timeout = timeout
        self._held: list[Claim | None] = []  # one for each entry; None if nothing was missing

    def __enter__(self) -> None:
        key = self._session.key_to_lock()
        if is_on_event_loop():
            self._held.append(self._hold_at_once(key))
        else:
            self._held.append(self._claims.hold(key, self._names, owner(), self._timeout))
        try:
            self._session.renew()
        except BaseException:
            self._release()
            raise

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        session, saving = self._session, None
        try:
            if kind is None and session.session_key is not None:  # else flushed: logged out
                saving = session.save_in_memory(merging=True)
            if saving is not None and saving.rest not in SAVED:  # not saved at all yet
                session.finish(saving)
                saving = None
        finally:
            self._release()
        if saving is not None:
            session.finish(saving)

    async def __aenter__(self) -> None:
        key = await self._session.akey_to_lock()
        self._held.append(await self._claims.ahold(key, self._names, owner(), self._timeout))
        try:
            await self._session.arenew()
        except BaseException:
            self._release()
            raise

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        session, saving = self._session, None
        try:
            if kind is None and session.session_key is not None:
                saving = session.save_in_memory(merging=True)
            if saving is not None and saving.rest not in SAVED:
                await session.afinish(saving)
                saving = None
        finally:
            self._release()
        if saving is not None:
            await session.afinish(saving)

    def _hold_at_once(self, key: str) -> Claim | None:
        try:
            return self._claims.hold(key, self._names, owner(), 0.0)
        except LockTimeoutError as error:
            raise LockTimeoutError(
                f"{error} On an event loop, `with` cannot wait; use `async with`."
            ) from error

    def _release(self) -> None:
        claim = self._held.pop()
        if claim is not None:
            self._claims.release(claim)
