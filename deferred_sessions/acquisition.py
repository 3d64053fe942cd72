"""Getting the lease of a session, and waiting for it if another node has it.

Called by `intake`. Invariant: who waits stands in PostgreSQL's queue, first come, first
served, and leaves it when it gives up; it looks there seldom, because the agent of this
node hears when a lease is granted and has everybody look again.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Final

from deferred_sessions.exceptions import (
    DeferredSessionsError,
    LockTimeoutError,
    RowLockedError,
    SessionBusy,
)
from deferred_sessions.memory.claims import Claim, Claims
from deferred_sessions.memory.counters import Counter, Counters
from deferred_sessions.memory.pulse import Pulse
from deferred_sessions.memory.store import HostStore
from deferred_sessions.servers.fleet_leases import FleetLeases
from deferred_sessions.servers.rows import Answer, Grant, Row

PAUSES: Final = (0.0005,) * 40 + (0.002,) * 40 + (0.005,)  # seconds between looks at memory
LOOK_AGAIN: Final = 0.5  # seconds between looks at PostgreSQL, in case a word got lost


class Acquisition:
    """Waits for leases, for the requests of this process."""

    def __init__(
        self,
        *,
        store: HostStore,
        leases: FleetLeases,
        waiting: Claims,
        pulse: Pulse,
        counters: Counters,
        timeout: float,
        clock: Callable[[], float],
    ) -> None:
        self._store = store
        self._leases = leases
        self._waiting = waiting
        self._pulse = pulse
        self._counters = counters
        self._timeout = timeout
        self._clock = clock

    def take(self, key: str) -> Row | None:
        """Return the row of `key`, whose lease this node has now; None if there is none.

        Raises:
            SessionBusy: Another node held on to it for `LOCK_TIMEOUT`; says which.
            ServerUnavailableError: Nothing is known about the session.
        """
        deadline, waits = self._clock() + self._timeout, False
        place: Claim | None = None
        try:
            while True:
                self._let_go(key, deadline)
                grants = self._pulse.grants
                grant = self._ask(key, waits=waits, deadline=deadline)
                if grant.answer in (Answer.GRANTED, Answer.GONE):
                    waits = False
                    return grant.row
                if grant.answer is Answer.FULL:
                    raise SessionBusy("Too many nodes wait for this session already.")
                if grant.answer is Answer.QUEUED:
                    if not waits:
                        place = self._line_up(key, deadline)
                    waits = True
                    self._wait(grants, deadline, grant.owner)
        finally:
            if place is not None:
                self._waiting.release(place)
            if waits:
                self._withdraw(key)

    def stand_by(self, key: str) -> None:
        """Return when this node has given up the session, or goes on with it.

        Raises:
            SessionBusy: That took longer than `LOCK_TIMEOUT`.
        """
        self._let_go(key, self._clock() + self._timeout)

    def _line_up(self, key: str, deadline: float) -> Claim | None:
        """Let the others of this node know that somebody waits; the kernel knows for how long."""
        self._counters.add(Counter.LEASE_WAITS)
        name = frozenset({secrets.token_hex(8)})
        with suppress(LockTimeoutError):
            return self._waiting.hold(key, name, object(), max(0.0, deadline - self._clock()))
        return None

    def _withdraw(self, key: str) -> None:
        """Leave the queue, unless others of this node wait there: they have one place."""
        try:
            last = self._waiting.hold(key, frozenset(), object(), 0.0)
        except LockTimeoutError:
            return
        try:
            with suppress(DeferredSessionsError):  # else it is passed over before long
                self._leases.withdraw(key)
            self._pulse.granted()  # who has just come stands there no more, and must ask again
        finally:
            if last is not None:
                self._waiting.release(last)

    def find(self, key: str) -> None:
        """Have the session server of `key` know of it, if another one does.

        Raises:
            ServerUnavailableError: Nothing is known about the session.
        """
        self._leases.find(key)

    def _ask(self, key: str, *, waits: bool, deadline: float) -> Grant:
        while True:
            try:
                return self._leases.acquire(
                    key, waits=waits, is_unknown=lambda: self._store.head(key) is None
                )
            except RowLockedError:
                if self._clock() >= deadline:
                    raise

    def _let_go(self, key: str, deadline: float) -> None:
        """Wait while this node is just giving up the lease."""
        while self._store.is_handing_over(key):
            if self._clock() >= deadline:
                raise SessionBusy("This session is being handed to another node.")
            time.sleep(PAUSES[0])

    def _wait(self, grants: float, deadline: float, owner: str) -> None:
        """Return when it is time to ask again."""
        now = self._clock()
        if now >= deadline:
            raise SessionBusy(
                f"Node {owner.partition('#')[0]} has held on to the session for "
                f"{self._timeout:g} s."
                if owner
                else "The session servers have changed places, and not all nodes know yet."
            )
        until, pauses = min(deadline, now + LOOK_AGAIN), iter(PAUSES)
        while self._pulse.grants == grants and self._clock() < until:
            time.sleep(next(pauses, PAUSES[-1]))
