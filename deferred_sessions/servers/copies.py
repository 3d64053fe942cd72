"""The further homes of sessions: what makes them have what the authority has.

Called by `writer` when the authority has committed, and by `write_through`. Invariant: what
is sent here was accepted by the authority; a home that did not take it is told of, so that
the record stays dirty until all homes have it.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Final

from deferred_sessions.exceptions import DeferredSessionsError
from deferred_sessions.servers import fleet_sql
from deferred_sessions.servers.fleet import Fleet
from deferred_sessions.servers.rows import Columns
from deferred_sessions.servers.server import SessionServer

logger = logging.getLogger(__name__)

LOG_INTERVAL: Final = 60.0  # seconds between messages about one server


class Copies:
    """Writes to the homes beside the authority; each server for itself."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet
        self._logged: dict[str, float] = {}

    def write(self, columns: Columns, now: float) -> set[str]:
        """Copy these sessions; return the keys that some home does not have yet."""

        def some(places: Sequence[int]) -> Columns:
            return Columns(*([column[i] for i in places] for column in columns))  # type: ignore[arg-type]

        return self.write_some(columns.key, some, now)

    def write_some(
        self, keys: Sequence[str], columns: Callable[[Sequence[int]], Columns], now: float
    ) -> set[str]:
        """Do the same with what `columns` returns of those at some places of `keys`.

        So nobody encodes what no further home is to have.
        """
        missed: set[str] = set()
        for server, places in self._fleet.further_homes(keys).items():
            part = columns(places)
            missed |= self._try(server, part.key, partial(_copy_to, part, now))
        return missed

    def delete(self, keys: Sequence[str]) -> set[str]:
        """Delete at the further homes; return the keys that some of them may still have.

        While some server may lack a session that exists, or a node not know yet where it
        belongs, all homes remember the deletion, though they have no row; in disorder, when any
        server may have one, all do.
        """
        missed: set[str] = set()
        if not self._fleet.is_in_order():
            for server in self._fleet.live():
                missed |= self._try(server, keys, partial(_delete_and_remember, keys))
            for server in self._fleet.leaving():  # who is away hears of it when it is filled
                self._try(server, keys, partial(_delete, keys))
            return missed
        for server, indexes in self._fleet.further_homes(keys).items():
            part = [keys[i] for i in indexes]
            missed |= self._try(server, part, partial(_delete, part))
        if not self._fleet.is_whole():
            missed |= self._remember(keys)
        return missed

    def remove(self, keys: Sequence[str]) -> None:
        """Remove copies of what somebody else deleted at the authority."""
        for server, indexes in self._fleet.further_homes(keys).items():
            part = [keys[i] for i in indexes]
            self._try(server, part, partial(_remove, part))

    def _remember(self, keys: Sequence[str]) -> set[str]:
        missed: set[str] = set()
        homes: dict[SessionServer, list[str]] = {}
        for key in keys:
            for server in self._fleet.homes(key):
                homes.setdefault(server, []).append(key)
        for server, part in homes.items():
            missed |= self._try(server, part, partial(_delete_and_remember, part))
        return missed

    def _try(
        self, server: SessionServer, keys: Sequence[str], work: Callable[[SessionServer], object]
    ) -> set[str]:
        """Do `work` in a transaction of its own; return the keys that it failed for."""
        block: AbstractContextManager[None] = server.attempt() if len(keys) == 1 else server.batch()
        try:
            with block:
                work(server)
        except DeferredSessionsError as error:
            self._complain(server.alias, len(keys), error)
            return set(keys)
        return set()

    def _complain(self, alias: str, count: int, error: DeferredSessionsError) -> None:
        now = time.monotonic()
        if now - self._logged.get(alias, -LOG_INTERVAL) < LOG_INTERVAL:
            return
        self._logged[alias] = now
        logger.warning(
            "%d sessions have a copy less than they should; they are sent to %r again: %s",
            count,
            alias,
            error,
            extra={"action": "copies_missed", "server": alias, "count": count},
        )


def _copy_to(columns: Columns, now: float, server: SessionServer) -> int:
    return copy(server, columns, server.owner(), now)


def copy(server: SessionServer, columns: Columns, owner: str, now: float) -> int:
    """Make `server` have these sessions, unless it has something later; return how many."""
    count = len(columns.key)
    parameters = [*columns, [owner] * count, [now] * count]
    return server.write(fleet_sql.COPY, parameters, count)


def remove(server: SessionServer, keys: Sequence[str]) -> None:
    """Remove rows that nobody needs to hear of."""
    server.run(fleet_sql.REMOVE, [sorted(keys)])


def _delete(keys: Sequence[str], server: SessionServer) -> None:
    server.delete(keys)


def _remove(keys: Sequence[str], server: SessionServer) -> None:
    remove(server, keys)


def _delete_and_remember(keys: Sequence[str], server: SessionServer) -> None:
    server.delete(keys)
    _remember(keys, server)


def _remember(keys: Sequence[str], server: SessionServer) -> None:
    server.remember_deletion(keys)
