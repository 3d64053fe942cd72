"""One session server: a PostgreSQL database behind one of Django's connections.

Called by `tiers` and `flusher`. Invariant: a failure of the database is reported as a
failure, never as "no such session"; and a batch is written as a whole or not at all.

Django's connection is used as it is, also inside the application's own transaction:
what is written there becomes durable if that transaction commits, and nobody can tell
before; callers ask `in_transaction` to know.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Final, LiteralString

from deferred_sessions.exceptions import ServerUnavailableError
from deferred_sessions.servers import fleet_sql, sql
from deferred_sessions.servers.breaker import Breaker
from deferred_sessions.servers.connection import ServerConnection
from deferred_sessions.servers.rows import Columns, Revocation, Revocations, Row, State
from deferred_sessions.servers.stream import StatementStream

LEASED_GRACE: Final = 3600.0  # seconds; a node that lives writes an expiry well before it bites
UPDATED: Final = slice(6)  # the columns that an update writes: not the creation
CLEAR_BATCH: Final = 5000  # rows; locks are held for well under a second


class SessionServer(ServerConnection):
    """The sessions of one database alias."""

    def __init__(
        self,
        alias: str,
        *,
        owner: Callable[[], str],
        timeout: float | None = None,
        breaker: Breaker | None = None,
    ) -> None:
        super().__init__(alias, timeout=timeout, breaker=breaker or Breaker())
        self.owner = owner
        """Returns the node that writes; stands in each row it wrote."""

    def name(self) -> str:
        """Return how the owner begins in each row that any incarnation of this node wrote."""
        return self.owner().partition("#")[0] + "#"

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

    def update_parameters(self, columns: Sequence[Any], now: float) -> list[Any]:
        """Return the parameters with which `update_stream` does what `update` does.

        Of the `Columns` it needs those of `UPDATED`, which may be encoded already.
        """
        return [self.owner(), now, *columns[UPDATED], self.name()]

    def update_stream(self) -> StatementStream | None:
        """Return a stream of updates: see `stream`."""
        return self.stream(sql.UPDATE_ALONE)

    def stream(self, statement: LiteralString) -> StatementStream | None:
        """Return a stream of statements that commit one by one; None in an atomic block.

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
        return StatementStream(connection.connection, statement, self.timeout)

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
        asked = sorted(keys)
        return {key for (key,) in self.run(sql.REVOKED, [asked, asked])}

    def revoked_since(self, created: Mapping[str, float]) -> set[str]:
        """Return those of these keys that somebody deleted or changed after they were created."""
        keys = sorted(created)
        found = self.run(sql.REVOKED_SINCE, [keys, [created[key] for key in keys], keys])
        return {key for (key,) in found}

    def remember_deletion(self, keys: Iterable[str]) -> None:
        """Have it on record that these were deleted, also where there is no row."""
        self.run(fleet_sql.RECORD_DELETION, [self.owner(), list(keys)])

    def prune_revocations(self, before: float) -> None:
        """Remove revocations that were made before this time."""
        self._execute(sql.PRUNE_REVOCATIONS, [before])
