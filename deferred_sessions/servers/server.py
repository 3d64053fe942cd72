"""One session server: a PostgreSQL database behind one of Django's connections.

Called by `tiers` and `flusher`. Invariant: a failure of the database is reported as a
failure, never as "no such session"; and a batch is written as a whole or not at all.

Django's connection is used as it is, also inside the application's own transaction:
what is written there becomes durable if that transaction commits, and nobody can tell
before; callers ask `in_transaction` to know.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from typing import Any, Final, LiteralString

import psycopg
from django.db import connections, transaction
from django.db.backends.base.base import BaseDatabaseWrapper
from psycopg.pq import TransactionStatus

from deferred_sessions.exceptions import DeferredSessionsError, ServerUnavailableError
from deferred_sessions.servers import sql
from deferred_sessions.servers.breaker import Breaker
from deferred_sessions.servers.deadline import bounded
from deferred_sessions.servers.errors import translated
from deferred_sessions.servers.rows import Columns, Revocation, Revocations, Row, State
from deferred_sessions.servers.stream import StatementStream

LOCK_TIMEOUT: Final = "1s"  # for rows that an application transaction holds
LEASED_GRACE: Final = 3600.0  # seconds; a node that lives writes an expiry well before it bites
CLEAR_BATCH: Final = 5000  # rows; locks are held for well under a second


class SessionServer:
    """The sessions of one database alias."""

    def __init__(
        self,
        alias: str,
        *,
        owner: Callable[[], str],
        timeout: float | None = None,
        breaker: Breaker | None = None,
    ) -> None:
        self.alias = alias
        self.owner = owner
        """Returns the node that writes; stands in each row it wrote."""
        self.timeout = timeout
        """Seconds after which a statement without an answer has failed; None: it is waited for."""
        self.breaker = breaker or Breaker()
        """Refuses to connect for a request just after connecting has failed."""

    def name(self) -> str:
        """Return how the owner begins in each row that any incarnation of this node wrote."""
        return self.owner().partition("#")[0] + "#"

    def in_transaction(self) -> bool:
        """Tell whether what is written now waits for somebody else's commit.

        That of an atomic block, of manual transaction management (`AUTOCOMMIT` off), or
        of a BEGIN that the application sent by itself.
        """
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
        connections[self.alias] = apart = connections[self.alias].copy()
        apart.settings_dict["OPTIONS"].pop("pool", None)

    @contextmanager
    def outside(self) -> Iterator[None]:
        """Be outside of the application's transaction in the block, if there is one."""
        with self.apart() if self.in_transaction() else nullcontext():
            yield

    def disconnect(self) -> None:
        """Close this thread's connection, on which a statement may be under way."""
        connections[self.alias].close()

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
        rows = self.run(sql.READ, [key])
        if not rows:
            return None
        *columns, is_latest = rows[0]
        data, expires_at, version, fence, user_id, created_at, written_at, owner = columns
        is_settled = is_latest or not self.in_transaction()
        return Row(
            *(key, data, expires_at, version, fence, user_id or "", created_at, written_at),
            owner=owner,
            is_settled=is_settled,
        )

    def exists(self, key: str, now: float) -> bool:
        """Tell whether a session with this key is alive at `now`.

        Raises:
            ServerUnavailableError: Nothing is known about the session.
        """
        return bool(self.run(sql.EXISTS, [key, now]))

    # Many sessions at once; each returns how many rows it wrote. If that is fewer than
    # were given, `states` tells which and why.

    def insert(self, columns: Columns, now: float) -> int:
        """Create sessions; leaves keys alone that exist already."""
        return self.write(sql.INSERT, [self.owner(), now, *columns], len(columns.key))

    def update(self, columns: Columns, now: float) -> int:
        """Write changed sessions; leaves alone what was deleted, newer or fenced."""
        return self.write(sql.UPDATE, self.update_parameters(columns, now), len(columns.key))

    def touch(self, columns: Columns, now: float) -> int:
        """Write new expiries; leaves alone what was deleted, changed or fenced."""
        return self.write(
            sql.TOUCH,
            [
                *(self.owner(), now, columns.key, columns.expires_at, columns.version),
                *(columns.fence, self.name()),
            ],
            len(columns.key),
        )

    def update_parameters(self, columns: Columns, now: float) -> list[Any]:
        """Return the parameters with which `update_stream` does what `update` does."""
        return [self.owner(), now, *columns[:6], self.name()]

    def update_stream(self) -> StatementStream | None:
        """Return a stream of updates that commit one by one; None in an atomic block.

        Raises:
            ServerUnavailableError: There is no connection, or none that ever commits.
        """
        connection = self._connection()
        if connection.in_atomic_block:
            return None
        self._connect(connection, insist=True)
        if self.in_transaction():
            raise ServerUnavailableError(
                f"The connection {self.alias!r} is in a transaction that nobody commits. Leave "
                "AUTOCOMMIT on for the database of the sessions; see SERVERS."
            )
        return StatementStream(connection.connection, sql.UPDATE_ALONE, self.timeout)

    def delete(self, keys: Sequence[str]) -> int:
        """Delete sessions, whether they exist or not; return how many did."""
        return self._execute(sql.DELETE, [sorted(keys), self.owner()])[1]

    def states(self, keys: Iterable[str]) -> dict[str, State]:
        """Return what stands in the rows of `keys`; leaves out those without a row."""
        rows = self.run(sql.STATES, [sorted(keys)])
        return {key: State(*state) for key, *state in rows}

    def versions(self, keys: Iterable[str]) -> dict[str, int]:
        """Return the version in each row of `keys`; leaves out those without a row."""
        return dict(self.run(sql.VERSIONS, [sorted(keys)]))

    def unlocked(self, keys: Iterable[str]) -> set[str]:
        """Return those of `keys` whose row exists and is held by no transaction."""
        return {key for (key,) in self.run(sql.UNLOCKED, [sorted(keys)])}

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

    # Housekeeping

    def clear_expired(self, now: float, *, spare: Sequence[str] = (), is_node: bool = True) -> int:
        """Delete what has expired by `now`, in batches that skip locked rows.

        `spare` are keys whose row is older than the session; they are left alone. So are, for
        `LEASED_GRACE`, rows that another node has and that is not found dead: what its memory
        has may live longer than the row, if somebody held the row when it was to be written.
        A host without memory is not `is_node`: no lease is its own.

        Returns:
            How many rows were deleted.

        Raises:
            ServerUnavailableError: The rest stays for the next time.
        """
        total, mine = 0, self.name() if is_node else "#"  # what no owner begins with
        while True:
            deleted = self._execute(
                sql.CLEAR_EXPIRED,
                [now, now, now - LEASED_GRACE, mine, list(spare), CLEAR_BATCH],
            )[1]
            total += deleted
            if deleted < CLEAR_BATCH:
                return total

    def revocations(self, since: int) -> Revocations:
        """Return what was revoked by transaction `since` and later.

        Raises:
            ServerUnavailableError: Nothing was read.
        """
        self.connect()
        rows = self.run(sql.REVOCATIONS, [since])
        revoked = [Revocation(*row[:5]) for row in rows if row[0] is not None]
        return Revocations(revoked, *rows[0][5:])

    def revoked(self, keys: Iterable[str]) -> set[str]:
        """Return those of `keys` that somebody deleted or changed in the last day."""
        return {key for (key,) in self.run(sql.REVOKED, [sorted(keys)])}

    def prune_revocations(self, before: float) -> None:
        """Remove revocations that were made before this time."""
        self._execute(sql.PRUNE_REVOCATIONS, [before])

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
        connection = self._connection()
        self._connect(connection)
        with (
            translated(),
            bounded(connection, self.timeout),
            connection.wrap_database_errors,
            psycopg.Cursor(connection.connection) as cursor,
        ):
            return cursor.execute(statement, parameters).rowcount

    def _connection(self) -> BaseDatabaseWrapper:
        """Return Django's connection, without one that is known to be broken."""
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
        A connection that died while it was idle is replaced once: every statement of
        this package may be repeated.
        """
        connection, in_transaction = self._connection(), self.in_transaction()
        began = time.monotonic()
        try:
            return self._execute_once(statement, parameters)
        except ServerUnavailableError:
            if self.timeout is not None and time.monotonic() - began >= self.timeout:
                self.breaker.failed()  # it hangs: that is no connection that was idle
                raise
            if in_transaction or connection.is_usable():
                raise
            connection.close()
            return self._execute_once(statement, parameters)

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
            return cursor.fetchall() if cursor.description else [], cursor.rowcount
