"""Giving up leases: to the nodes that ask for them, or because this one goes away.

Called by the agent and by `manage.py drainsessions`. Invariant: a session is flushed, then
leaves memory, then PostgreSQL passes its lease on; whatever dies in between, a mark in the
host store stays until the last step is done, and nobody on this host uses the session.

Requests that had loaded it before go on: their save finds it gone, asks for it, and merges.
So does the save of a session that was changed while it was being flushed: then it is shut for
saves and flushed again, or those who change it all the time would keep it here for ever.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Final

from deferred_sessions.exceptions import (
    LockTimeoutError,
    RowRefusedError,
    ServerUnavailableError,
)
from deferred_sessions.memory.claims import Claim, Claims
from deferred_sessions.memory.counters import Counter, Counters
from deferred_sessions.memory.pulse import Pulse
from deferred_sessions.memory.store import HostStore
from deferred_sessions.servers.fleet import Fleet
from deferred_sessions.servers.fleet_leases import FleetLeases
from deferred_sessions.writer import RecordWriter

HOLD: Final = 0.01  # seconds that a session stays at least: who has it shall get to use it
PART: Final = 500  # sessions given up at once
ATTEMPTS: Final = 3  # at releasing a lease whose row somebody holds just now
PAUSE: Final = 0.003  # seconds between them; who asks for a lease holds its row for less
WANTED: Final = "wanted"  # note: what others ask for and requests of this node still hold


class Handover:
    """Gives up leases of this node; one process of the node does this at a time."""

    def __init__(
        self,
        *,
        store: HostStore,
        servers: Fleet,
        leases: FleetLeases,
        claims: Claims,
        writer: RecordWriter,
        counters: Counters,
        pulse: Pulse,
    ) -> None:
        self._store = store
        self._servers = servers
        self._leases = leases
        self._claims = claims
        self._writer = writer
        self._counters = counters
        self._pulse = pulse
        self._pending: dict[str, int] = {}
        self._noted: frozenset[str] | None = None

    def release_once(self, now: float, *, ask: bool = True, reserve: bool = True) -> bool:
        """Give up what others wait for, as far as no request holds it.

        Without `ask`, only what they were known to wait for. With `reserve`, who comes new to
        what is left waits behind them; not so if nobody looks again soon.

        Returns:
            Whether something is left, so that it is worth looking again soon.

        Raises:
            ServerUnavailableError: What is left is done the next time.
        """
        if ask:
            self._pending = self._requested()
        self._let_go(self._pending, now, now - HOLD)
        self._note(frozenset(self._pending if reserve else ()))
        return bool(self._pending)

    def release_all(self, now: float, report: Callable[[int], object]) -> int:
        """Give up all that this node has; `report` is called with each number given up.

        Returns:
            How many sessions stayed, because requests hold them, or PostgreSQL refused them.

        Raises:
            ServerUnavailableError: The rest stays.
        """
        after, stayed = "", 0
        while part := self._leases.held(after, PART):
            after = max(part)
            left = dict(part)
            self._let_go(left, now, time.time())
            report(len(part) - len(left))
            stayed += len(left)
        return stayed

    def is_wanted(self, key: str) -> bool:
        """Tell whether another node waits for what requests of this node hold.

        Who comes new should wait for its turn, or the other one might never get it.
        """
        if not self._pulse.wanted:
            return False
        return key in (self._store.note(WANTED) or b"").decode().split()

    def _let_go(self, leases: dict[str, int], now: float, entered_before: float) -> None:
        """Give up these leases; what is given up is removed from the dictionary."""
        going = self._store.handing_over()  # whoever began that may have died
        self._store.reopen()
        if leases:
            with self._claimed(leases) as free:
                flushed = self._flushed(free, now)
                leases.update(flushed)
                gone = self._store.hand_over(flushed, entered_before)
                gone += self._insist(set(flushed).difference(gone), leases, now, entered_before)
            going.update((key, leases.pop(key)) for key in gone)
        if going:
            released = self._release(going)
            self._counters.add(Counter.HANDED_OVER, sum(released.values()))
            self._store.handed_over({key: going[key] for key in released})

    def _release(self, going: Mapping[str, int]) -> dict[str, bool]:
        """Have these leases passed on; what is not returned stays marked for the next time."""
        released = self._leases.release(going)
        for _ in range(1, ATTEMPTS):
            held = {key: fence for key, fence in going.items() if key not in released}
            if not held:
                break
            time.sleep(PAUSE)
            with suppress(ServerUnavailableError):  # of some of these; the others are passed on
                released |= self._leases.release(held)
        return released

    @contextmanager
    def _claimed(self, leases: Mapping[str, int]) -> Iterator[dict[str, int]]:
        """Claim what no request holds; return it."""
        held: list[Claim] = []
        free: dict[str, int] = {}
        try:
            for key, fence in leases.items():
                try:
                    claim = self._claims.hold(key, frozenset(), self, 0.0)
                except LockTimeoutError:
                    continue
                if claim is not None:
                    held.append(claim)
                free[key] = fence
            yield free
        finally:
            for claim in held:
                self._claims.release(claim)

    def _flushed(self, leases: dict[str, int], now: float) -> dict[str, int]:
        """Write what is dirty of these; return them, under the fence that their rows have then."""
        dirty = self._store.find_dirty(sorted(leases))
        if not dirty:
            return leases
        leases = {**leases, **{one.key: max(leases[one.key], one.head.fence) for one in dirty}}
        parts = self._servers.by_authority(dirty, lambda one: one.key)
        for server, part in parts:
            try:
                self._writer.write(part, now)
            except RowRefusedError:
                unlocked = server.unlocked([one.key for one in part])
                for one in part if len(part) > 1 else ():
                    if one.key in unlocked:
                        self._flushed({one.key: 0}, now)
            except ServerUnavailableError:
                if len(parts) == 1:
                    raise
        return leases  # what is dirty still stays where it is

    def _insist(
        self, left: Iterable[str], leases: Mapping[str, int], now: float, entered_before: float
    ) -> list[str]:
        """Give up what requests have changed while it was written; their saves wait meanwhile."""
        dirty = self._store.find_dirty(sorted(left))
        changed = {one.key: leases[one.key] for one in dirty if one.head.written_at == now}
        if not changed:
            return []
        self._store.shut(changed)
        try:
            return self._store.hand_over(self._flushed(changed, now), entered_before)
        finally:
            self._store.reopen()

    def _requested(self) -> dict[str, int]:
        """Return what others wait for; while PostgreSQL is away nobody does."""
        try:
            return self._leases.requested()
        except ServerUnavailableError:
            self._pending = {}
            self._note(frozenset())
            raise

    def _note(self, wanted: frozenset[str]) -> None:
        """Leave word for the requests of this node."""
        if wanted != self._noted:
            self._noted = wanted
            self._store.set_note(WANTED, " ".join(wanted).encode())
            self._pulse.want(len(wanted))
