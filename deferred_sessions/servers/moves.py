"""Sessions on their way from another engine, and to it.

Used by `adoption` and `exporting`. Invariant: a session comes once in its life; the table
that remembers it is written in the statement that creates the row.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from django.db import connections

from deferred_sessions.servers import sql
from deferred_sessions.servers.rows import Columns
from deferred_sessions.servers.server import SessionServer


class Moves:
    """What one session server knows of other engines' sessions.

    Every method raises ServerUnavailableError if PostgreSQL is away.
    """

    def __init__(self, server: SessionServer) -> None:
        self._server = server

    def adopt(self, columns: Columns, owner: str, now: float) -> int:
        """Create sessions that another engine had, but none a second time.

        `owner` is who has their leases; "" for nobody. Returns how many were created.
        """
        return len(self._server.run(sql.ADOPT, [*columns, owner, now]))

    def spend(self, keys: Sequence[str], now: float) -> None:
        """Have none of `keys` ever created by `adopt` from now on."""
        self._server.run(sql.SPEND, [now, sorted(keys)])

    def spent(self, keys: Iterable[str]) -> set[str]:
        """Return those of `keys` that `adopt` would not create."""
        asked = sorted(keys)
        return {key for (key,) in self._server.run(sql.SPENT, [asked, asked])}

    def prune_adopted(self, before: float) -> None:
        """Forget which sessions were taken over that were to expire before this time."""
        self._server.run(sql.PRUNE_ADOPTED, [before])

    def count_written(self, now: float, since: float) -> int:
        """Return how many sessions that are alive at `now` were written since then."""
        return int(self._server.run(sql.COUNT_WRITTEN, [now, since])[0][0])

    def written(
        self, after: str, now: float, since: float, limit: int
    ) -> list[tuple[str, str, float]]:
        """Return key, data and expiry of the next of them, in order of keys."""
        rows = self._server.run(sql.WRITTEN, [after, now, since, limit])
        return [(key, data, expires_at) for key, data, expires_at in rows]

    def export(
        self, table: str, after: str, now: float, since: float, limit: int
    ) -> tuple[list[str], int]:
        """Copy the next of them to a table of Django's, in the same database.

        Returns their keys, and how many were not there as they are.
        """
        quoted = connections[self._server.alias].ops.quote_name(table)
        statement = sql.EXPORT.replace("django_session", quoted)
        rows = self._server.run(statement, [after, now, since, limit])
        return [key for key, _ in rows], sum(is_written for _, is_written in rows)

    def gone(self) -> set[str]:
        """Return the sessions that were deleted in the last day."""
        return {key for (key,) in self._server.run(sql.GONE, [])}
