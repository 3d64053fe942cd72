"""Waits for a word from PostgreSQL: that something was revoked, or that a lease is asked for.

Used by the agent, between its rounds. Invariant: an accelerator and nothing else; without
a connection, or behind a pooler that does not pass notifications on, waiting just takes
its time.
"""

from __future__ import annotations

import hashlib
import logging
import selectors
import threading
import time
from collections.abc import Callable, Collection
from types import TracebackType
from typing import Any, Final

import psycopg
from django.db import connections

logger = logging.getLogger(__name__)

CHANNEL: Final = "deferred_sessions"
REVOKED: Final = ""  # what is said to all
REQUESTED: Final = "r"  # and to one node: somebody asks for a session that it has
AT_ONCE: Final = 0.001  # seconds to take what has arrived
GRANTED: Final = "g"  # it was given a session that it waits for


def channel_of(node: str) -> str:
    """Return the channel on which `node` is spoken to, as the database computes it."""
    digest = hashlib.md5(node.encode(), usedforsecurity=False).hexdigest()
    return f"{CHANNEL}_{digest[:16]}"


def connect(alias: str) -> psycopg.Connection[Any]:
    """Connect as Django does, but with a connection of one's own, past any pool of Django's.

    Raises:
        psycopg.Error: It cannot be reached.
    """
    parameters = connections[alias].get_connection_params()
    for ours in ("context", "cursor_factory", "prepare_threshold", "pool"):
        parameters.pop(ours, None)
    return psycopg.connect(**parameters, autocommit=True)


class Listener:
    """A connection of its own that listens; opened by the first wait."""

    def __init__(self, alias: str, *, node: Callable[[], str], retry_after: float) -> None:
        self._alias = alias
        self._node = node
        self._retry_after = retry_after
        self._connection: psycopg.Connection[Any] | None = None
        self._try_at = 0.0

    def wait(self, seconds: float, stop: threading.Event) -> set[str]:
        """Wait until told, or for `seconds`; return what it was told."""
        connection = self._connection or self._open()
        if connection is None:
            stop.wait(seconds)
            return set()
        try:
            return {word.payload for word in connection.notifies(timeout=seconds, stop_after=1)}
        except psycopg.Error as error:
            logger.info("Listening was interrupted: %s", error, extra={"action": "not_listening"})
            self.close()
            stop.wait(seconds)
            return set()

    @property
    def is_open(self) -> bool:
        """There is a connection."""
        return self._connection is not None

    def socket(self) -> int | None:
        """Return what can be polled for words; connect if it is time to; None if that failed."""
        connection = self._connection or self._open()
        return None if connection is None else connection.fileno()

    def _open(self) -> psycopg.Connection[Any] | None:
        """Connect as Django does, and listen; None if it is too early to try again."""
        now = time.monotonic()
        if now < self._try_at:
            return None
        self._try_at = now + self._retry_after
        try:
            self._connection = connect(self._alias)
            self._connection.execute(f"LISTEN {CHANNEL}")
            self._connection.execute(f"LISTEN {channel_of(self._node())}".encode())
        except psycopg.Error:
            self.close()
        return self._connection

    def close(self) -> None:
        """Listen no more."""
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.close()


class Listeners:
    """Listens to all session servers that are not out; closed by the end of a `with`."""

    def __init__(
        self, make: Callable[[str], Listener], live: Callable[[], Collection[str]]
    ) -> None:
        self._make = make
        self._live = live
        self._listeners: dict[str, Listener] = {}

    def __enter__(self) -> Listeners:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for listener in self._listeners.values():
            listener.close()

    def wait(self, seconds: float, stop: threading.Event) -> set[str]:
        """Wait until any of them tells something, or for `seconds`; return what it was told."""
        # psycopg would wake up ten times a second to look for signals, and whoever wakes up makes
        # all the requests of the process that are under way wait.
        words: set[str] = set()
        with selectors.DefaultSelector() as selector:
            for listener in map(self._at, self._live()):
                if not listener.is_open and listener.socket() is not None:
                    words |= listener.wait(AT_ONCE, stop)  # said while it was opened
                if (place := listener.socket()) is not None:
                    selector.register(place, selectors.EVENT_READ, listener)
            if words:
                return words
            if not selector.get_map():
                stop.wait(seconds)
            else:
                for key, _ in selector.select(seconds):
                    words |= key.data.wait(AT_ONCE, stop)
        return words

    def _at(self, alias: str) -> Listener:
        if alias not in self._listeners:
            self._listeners[alias] = self._make(alias)
        return self._listeners[alias]
