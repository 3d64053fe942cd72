"""One session server: a PostgreSQL database behind one of Django's connections.

Called by `tiers` and `flusher`. Invariant: a failure of the database is reported as a
failure, never as "no such session"; and a batch is written as a whole or not at all.

Django's connection is used as it is, also inside the application's own transaction:
what is written there becomes durable when that transaction commits, and callers ask
`in_transaction` to know.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Final, LiteralString, NamedTuple

import psycopg
from django.db import DatabaseError, InterfaceError, connections, transaction
from django.db.backends.base.base import BaseDatabaseWrapper

from deferred_sessions.exceptions import RowLockedError, RowRefusedError, ServerUnavailableError
from deferred_sessions.servers import sql
from deferred_sessions.servers.stream import StatementStream

LOCK_TIMEOUT: Final = "1s"  # for rows that an application transaction holds
CLEAR_BATCH: Final = 5000  # rows; locks are held for well under a second

# SQLSTATE classes that speak of the rows in a statement: data exception, integrity
# constraint, transaction rollback (deadlock), program limit, and what triggers raise.
# Anything else speaks of the server.
ROW_CLASSES: Final = frozenset({"22", "23", "40", "54", "P0"})
LOCK_NOT_AVAILABLE: Final = "55P03"


class Row(NamedTuple):
    """A session as PostgreSQL keeps it. Times are Unix seconds."""

    key: str
    data: str
    """What Django's `SessionStore.encode` makes: signed text."""
    expires_at: float
    version: int
    fence: int
    user_id: str
    created_at: float
    written_at: float


class Columns(NamedTuple):
    """Sessions to be written, column by column, sorted by key against deadlocks."""

    key: list[str]
    data: list[str]
    expires_at: list[float]
    version: list[int]
    fence: list[int]
    user_id: list[str]
    created_at: list[float]


class State(NamedTuple):
    """What PostgreSQL holds of a session, without the data."""

    version: int
    fence: int
    owner: str


class SessionServer:
    """The sessions of one database alias."""

    def __init__(self, alias: str, *, owner: str) -> None:
        self.alias = alias
        self.owner = owner
        """The node that writes; stands in each row it wrote."""

    def in_transaction(self) -> bool:
        """Tell whether what is written now waits for the application's commit."""
        return connections[self.alias].in_atomic_block

    def after_commit(self, action: Callable[[], object]) -> None:
        """Call `action` when the application's transaction has committed."""
        transaction.on_commit(action, using=self.alias, robust=True)

    @contextmanager
    def visit(self) -> Iterator[None]:
        """Leave the thread's connection as it was: closed, if the block opened it.

        For work after Django has closed its connections, in a thread that may end.
        """
        connection = self._connection()
        was_open = connection.connection is not None
        try:
            yield
        finally:
            if not was_open:
                connection.close()

    # One session

    def read(self, key: str) -> Row | None:
        """Return the row of `key`, expired or not, or None if there is none.

        Raises:
            ServerUnavailableError: Nothing is known about the session.
        """
        rows = self._run(sql.READ, [key])
        if not rows:
            return None
        data, expires_at, version, fence, user_id, created_at, written_at = rows[0]
        return Row(key, data, expires_at, version, fence, user_id or "", created_at, written_at)

    def exists(self, key: str, now: float) -> bool:
        """Tell whether a session with this key is alive at `now`.

        Raises:
            ServerUnavailableError: Nothing is known about the session.
        """
        return bool(self._run(sql.EXISTS, [key, now]))

    # Many sessions at once; each returns how many rows it wrote. If that is fewer than
    # were given, `states` tells which and why.

    def insert(self, columns: Columns, now: float) -> int:
        """Create sessions; leaves keys alone that exist already."""
        return self._write(sql.INSERT, [self.owner, now, *columns])

    def update(self, columns: Columns, now: float) -> int:
        """Write changed sessions; leaves alone what was deleted, newer or fenced."""
        return self._write(sql.UPDATE, self.update_parameters(columns, now))

    def touch(self, columns: Columns, now: float) -> int:
        """Write new expiries; leaves alone what was deleted, changed or fenced."""
        return self._write(
            sql.TOUCH,
            [self.owner, now, columns.key, columns.expires_at, columns.version, columns.fence],
        )

    def update_parameters(self, columns: Columns, now: float) -> list[Any]:
        """Return the parameters with which `update_stream` does what `update` does."""
        return [self.owner, now, *columns[:6]]

    def update_stream(self) -> StatementStream | None:
        """Return a stream of updates that commit one by one; None in a transaction.

        Raises:
            ServerUnavailableError: There is no connection.
        """
        connection = self._connection()
        if connection.in_atomic_block:
            return None
        with _translated():
            connection.ensure_connection()
            is_alone = connection.get_autocommit()
        return StatementStream(connection.connection, sql.UPDATE_ALONE) if is_alone else None

    def delete(self, keys: Sequence[str]) -> None:
        """Delete sessions, whether they exist or not."""
        self._execute(sql.DELETE, [sorted(keys)])

    def states(self, keys: Iterable[str]) -> dict[str, State]:
        """Return what stands in the rows of `keys`; leaves out those without a row."""
        rows = self._run(sql.STATES, [sorted(keys)])
        return {key: State(version, fence, owner) for key, version, fence, owner in rows}

    def unlocked(self, keys: Iterable[str]) -> set[str]:
        """Return those of `keys` whose row exists and is held by no transaction."""
        return {key for (key,) in self._run(sql.UNLOCKED, [sorted(keys)])}

    @contextmanager
    def batch(self) -> Iterator[None]:
        """Make the writes in the block one transaction that does not wait for long locks.

        Raises:
            ServerUnavailableError: The server cannot be used; nothing was written.
            RowRefusedError: The server refused some row; nothing was written.
            RowLockedError: Somebody holds some row; nothing was written.
        """
        outermost = not self._connection().in_atomic_block
        with _translated(), transaction.atomic(using=self.alias):
            if outermost:
                self._run(sql.LOCK_TIMEOUT, [LOCK_TIMEOUT])
            yield

    # Housekeeping

    def clear_expired(self, now: float) -> int:
        """Delete what has expired by `now`, in batches that skip locked rows.

        Returns:
            How many rows were deleted.

        Raises:
            ServerUnavailableError: The rest stays for the next time.
        """
        total = 0
        while True:
            deleted = self._execute(sql.CLEAR_EXPIRED, [now, now, CLEAR_BATCH])[1]
            total += deleted
            if deleted < CLEAR_BATCH:
                return total

    # Statements

    def _write(self, statement: LiteralString, parameters: list[Any]) -> int:
        """Return how many rows `statement` wrote.

        One session goes through Django's cursor, where query logs see it; many through
        psycopg's own, which sends arrays in binary.
        """
        if len(parameters[-1]) == 1:
            return self._execute(statement, parameters)[1]
        connection = self._connection()
        with _translated():
            connection.ensure_connection()
            with connection.wrap_database_errors, psycopg.Cursor(connection.connection) as cursor:
                return cursor.execute(statement, parameters).rowcount

    def _connection(self) -> BaseDatabaseWrapper:
        """Return Django's connection, without one that is known to be broken."""
        connection = connections[self.alias]
        raw = connection.connection
        if raw is not None and raw.closed and not connection.in_atomic_block:
            connection.close()
        return connection

    def _run(self, statement: LiteralString, parameters: list[Any]) -> list[tuple[Any, ...]]:
        return self._execute(statement, parameters)[0]

    def _execute(
        self, statement: LiteralString, parameters: list[Any]
    ) -> tuple[list[tuple[Any, ...]], int]:
        """Return the rows of `statement` and how many it touched.

        Goes through Django's cursor, so that query logs and `assertNumQueries` see it.
        A connection that died while it was idle is replaced once: every statement of
        this package may be repeated.
        """
        connection = self._connection()
        try:
            return self._execute_once(statement, parameters)
        except ServerUnavailableError:
            if connection.in_atomic_block or connection.is_usable():
                raise
            connection.close()
            return self._execute_once(statement, parameters)

    def _execute_once(
        self, statement: LiteralString, parameters: list[Any]
    ) -> tuple[list[tuple[Any, ...]], int]:
        with _translated(), connections[self.alias].cursor() as cursor:
            cursor.execute(statement, parameters)
            return cursor.fetchall() if cursor.description else [], cursor.rowcount


@contextmanager
def _translated() -> Iterator[None]:
    """Turn the driver's errors into the two that callers tell apart."""
    try:
        yield
    except (DatabaseError, InterfaceError) as error:
        state = getattr(error.__cause__, "sqlstate", None) or ""
        # Without the details, which quote the row: a session key is a secret.
        message = str(error).partition("\nDETAIL:")[0]
        if state == LOCK_NOT_AVAILABLE:
            raise RowLockedError(f"A transaction holds a session: {message}") from None
        if state[:2] in ROW_CLASSES:
            raise RowRefusedError(f"PostgreSQL refused the rows: {message}") from None
        raise ServerUnavailableError(f"PostgreSQL cannot be asked: {message}") from None
