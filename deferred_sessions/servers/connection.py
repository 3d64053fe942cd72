"""Statements on one of Django's connections, and what becomes of them when it breaks.

The base of `server.SessionServer`. Invariant: the application's own transaction is as it was
after whatever fails here, and no statement of ours waits for ever.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from functools import partial
from typing import Any, Final, LiteralString, TypeVar

import psycopg
from django.db import connections, transaction
from django.db.backends.base.base import BaseDatabaseWrapper
from django.db.backends.utils import CursorWrapper
from psycopg.pq import TransactionStatus

from deferred_sessions.exceptions import DeferredSessionsError, ServerUnavailableError
from deferred_sessions.servers import sql
from deferred_sessions.servers.breaker import Breaker
from deferred_sessions.servers.deadline import bounded
from deferred_sessions.servers.errors import translated

T = TypeVar("T")

LOCK_TIMEOUT: Final = "1s"  # for rows that an application transaction holds
AT_ONCE: Final = 1000  # rows that are decoded at once


class ServerConnection:
    """The connection of each thread to one database alias."""

    def __init__(self, alias: str, *, timeout: float | None, breaker: Breaker) -> None:
        self.alias = alias
        self.timeout = timeout
        """Seconds after which a statement without an answer has failed; None: it is waited for."""
        self.breaker = breaker
        """Refuses to connect for a request just after connecting has failed."""

    @property
    def is_named(self) -> bool:
        """DATABASES has it; while hosts with other settings are rolled out, it may not."""
        return self.alias in connections.settings

    def in_transaction(self) -> bool:
        """Tell whether what is written now waits for somebody else's commit.

        That of an atomic block, of manual transaction management (`AUTOCOMMIT` off), or
        of a BEGIN that the application sent by itself.
        """
        if not self.is_named:
            return False
        connection = connections[self.alias]
        if connection.in_atomic_block:
            return True
        raw = connection.connection
        if raw is None or raw.closed:
            return False
        return not raw.autocommit or raw.pgconn.transaction_status != TransactionStatus.IDLE

    @contextmanager
    def attempt(self) -> Iterator[None]:
        """Let a failure in the block be caught without spoiling an open transaction.

        PostgreSQL refuses everything after an error, and turns the application's COMMIT
        into a rollback; a savepoint keeps that away from it.
        """
        self._connect(self._connection())
        if not self.in_transaction():
            yield
            return
        self.run(sql.SAVEPOINT, [])
        try:
            yield
        except BaseException:
            with suppress(ServerUnavailableError):
                self.run(sql.ROLLBACK_TO_SAVEPOINT, [])
            raise
        self.run(sql.RELEASE_SAVEPOINT, [])

    def connect(self) -> None:
        """Connect, also if that has failed a moment ago; for what happens in the background.

        Raises:
            ServerUnavailableError: The server is away.
        """
        self._connect(self._connection(), insist=True)

    @contextmanager
    def apart(self) -> Iterator[None]:
        """Use another connection in the block, outside of the application's transaction."""
        ours = connections[self.alias]
        self.leave_pool()
        apart = connections[self.alias]
        try:
            yield
        finally:
            connections[self.alias] = ours
            apart.close()

    def leave_pool(self) -> None:
        """Have this thread use a connection of its own from now on, past any pool of Django's.

        A pool may be empty, because all of its connections wait for what this one is about to do.
        """
        if not self.is_named:
            return
        connections[self.alias] = apart = connections[self.alias].copy()
        apart.settings_dict["OPTIONS"].pop("pool", None)

    @contextmanager
    def outside(self) -> Iterator[None]:
        """Be outside of the application's transaction in the block, if there is one."""
        with self.apart() if self.in_transaction() else nullcontext():
            yield

    def disconnect(self) -> None:
        """Close this thread's connection, on which a statement may be under way."""
        self._connection().close()

    @contextmanager
    def visit(self) -> Iterator[None]:
        """Leave the thread's connection as it was: closed, if the block opened it.

        For work after Django has closed its connections, in a thread that may end.
        """
        if not self.is_named:
            yield
            return
        connection = self._connection()
        was_open = connection.connection is not None
        try:
            yield
        finally:
            if not was_open:
                connection.close()

    @contextmanager
    def batch(self) -> Iterator[None]:
        """Make the writes in the block one transaction that does not wait for long locks.

        Raises:
            ServerUnavailableError: The server cannot be used; nothing was written.
            RowRefusedError: The server refused some row; nothing was written.
            RowLockedError: Somebody holds some row; nothing was written.
        """
        connection = self._connection()
        outermost = not connection.in_atomic_block
        self._connect(connection, insist=True)
        with (
            translated(),
            bounded(connection, self.timeout),
            transaction.atomic(using=self.alias),
        ):
            if outermost:
                self.run(sql.LOCK_TIMEOUT, [LOCK_TIMEOUT])
            yield

    # Statements

    def write(self, statement: LiteralString, parameters: list[Any], sessions: int) -> int:
        """Return how many rows `statement` wrote, which is about so many `sessions`.

        One session goes through Django's cursor, where query logs see it; many through
        psycopg's own, which sends arrays in binary.

        Raises:
            ServerUnavailableError, RowLockedError, RowRefusedError: It was in vain.
        """
        if sessions == 1:
            return self._execute(statement, parameters)[1]
        with self._binary_cursor(self._connection()) as cursor:
            return cursor.execute(statement, parameters).rowcount

    def _connection(self) -> BaseDatabaseWrapper:
        """Return Django's connection, without one that is known to be broken.

        Raises:
            ServerUnavailableError: DATABASES does not name it.
        """
        if not self.is_named:
            raise ServerUnavailableError(
                f"The session server {self.alias!r} is in use, and DATABASES does not name it: "
                "name it there until `manage.py rebalancesessions` has emptied it."
            )
        connection = connections[self.alias]
        raw = connection.connection
        if raw is not None and raw.closed and not connection.in_atomic_block:
            connection.close()
        return connection

    def _connect(self, connection: BaseDatabaseWrapper, *, insist: bool = False) -> None:
        """Connect, unless connected; who does not `insist` is kept from trying in vain.

        Raises:
            ServerUnavailableError: The server is away, or was a moment ago.
        """
        if connection.connection is not None:
            return
        pause = 0.0 if insist else self.breaker.pause()
        if pause:
            raise ServerUnavailableError(
                f"PostgreSQL was away a moment ago; it is tried again in {pause:.1f} s."
            )
        began = self.breaker.clock()
        try:
            with translated():
                connection.ensure_connection()
        except DeferredSessionsError:
            self.breaker.failed(self.breaker.clock() - began)
            raise
        self.breaker.succeeded()

    def run(self, statement: LiteralString, parameters: list[Any]) -> list[tuple[Any, ...]]:
        """Return the rows of `statement`, one of `sql`.

        Raises:
            ServerUnavailableError, RowLockedError, RowRefusedError: It was in vain.
        """
        return self._execute(statement, parameters)[0]

    def ask(self, statement: LiteralString, parameters: list[Any]) -> list[tuple[Any, ...]]:
        """Do what `run` does, past Django's cursor and its logs, at half the cost.

        For long lists: they travel in binary, both ways.
        """
        return self._repeated(partial(self._ask_once, statement, parameters))

    def change(self, statement: LiteralString, parameters: list[Any]) -> int:
        """Return how many rows `statement`, one of `sql`, has written.

        Raises:
            ServerUnavailableError, RowLockedError, RowRefusedError: It was in vain.
        """
        return self._execute(statement, parameters)[1]

    def borrow(self) -> psycopg.Connection[Any]:
        """Return the connection of this thread, for what no statement of `sql` can do.

        Raises:
            ServerUnavailableError: There is none.
        """
        connection = self._connection()
        self._connect(connection, insist=True)
        borrowed: psycopg.Connection[Any] = connection.connection
        return borrowed

    def _execute(
        self, statement: LiteralString, parameters: list[Any]
    ) -> tuple[list[tuple[Any, ...]], int]:
        """Return the rows of `statement` and how many it touched.

        Goes through Django's cursor, so that query logs and `assertNumQueries` see it.
        """
        return self._repeated(partial(self._execute_once, statement, parameters))

    def _repeated(self, work: Callable[[], T]) -> T:
        """Do `work`; again on a new connection if that died while it was idle.

        Every statement of this package may be repeated.
        """
        connection, in_transaction = self._connection(), self.in_transaction()
        began = time.monotonic()
        try:
            return work()
        except ServerUnavailableError:
            if self.timeout is not None and time.monotonic() - began >= self.timeout:
                self.breaker.failed()  # it hangs: that is no connection that was idle
                raise
            if in_transaction or connection.is_usable():
                raise
            connection.close()
            return work()

    def _execute_once(
        self, statement: LiteralString, parameters: list[Any]
    ) -> tuple[list[tuple[Any, ...]], int]:
        connection = connections[self.alias]
        self._connect(connection)
        with (
            translated(),
            bounded(connection, self.timeout),
            connection.cursor() as cursor,
        ):
            cursor.execute(statement, parameters)
            return _rows(cursor) if cursor.description else [], cursor.rowcount

    def _ask_once(self, statement: LiteralString, parameters: list[Any]) -> list[tuple[Any, ...]]:
        with self._binary_cursor(connections[self.alias]) as cursor:
            return cursor.execute(statement, parameters, binary=True).fetchall()

    @contextmanager
    def _binary_cursor(self, connection: BaseDatabaseWrapper) -> Iterator[psycopg.Cursor[Any]]:
        """Yield a cursor of psycopg's own, which sends arrays in binary, past query logs."""
        self._connect(connection)
        with (
            translated(),
            bounded(connection, self.timeout),
            connection.wrap_database_errors,
            psycopg.Cursor(connection.connection) as cursor,
        ):
            yield cursor


def _rows(cursor: CursorWrapper) -> list[tuple[Any, ...]]:
    """Return all rows; some at a time, because no other thread runs while they are decoded."""
    rows: list[tuple[Any, ...]] = []
    while True:
        part = cursor.fetchmany(AT_ONCE)
        rows += part
        if len(part) < AT_ONCE:
            return rows
