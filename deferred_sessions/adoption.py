"""Takes over the sessions of the engine that a site used before.

Called by `intake` for sessions that nobody here knows, by `tiers` when one is deleted, and
by `manage.py importsessions` for all. Invariant: a session is taken over once in its life.
Which ones were is kept in a table of its own, in the transaction that creates the row; so
neither a logout, nor an expiry, nor another node can make one come back.

The old engine is asked outside of every lock and transaction of this package.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from typing import Final

from deferred_sessions.encoding import RowEncoder
from deferred_sessions.exceptions import DeferredSessionsError
from deferred_sessions.old_engine import OldEngine, OldSession
from deferred_sessions.payload import Codec
from deferred_sessions.servers.copies import Copies
from deferred_sessions.servers.fleet import Fleet
from deferred_sessions.servers.moves import Moves
from deferred_sessions.servers.rows import USER_KEY, Columns, Row, as_text

logger = logging.getLogger(__name__)

VERSION: Final = 1
FENCE: Final = 1  # the first lease; 0 stands for none
UNREADABLE: Final = (TypeError, ValueError, OverflowError, RecursionError)


class Adoption:
    """Carries sessions from the old engine to the session servers."""

    def __init__(
        self,
        *,
        engine: OldEngine,
        servers: Fleet,
        copies: Copies,
        codec: Codec,
        encoder: RowEncoder,
    ) -> None:
        self._engine = engine
        self._servers = servers
        self._copies = copies
        self._codec = codec
        self._encoder = encoder

    def take_over(self, key: str, now: float) -> Row | None:
        """Take over the session of `key`, which has no row here; this node has its lease.

        Returns the row as it is committed now, also within a transaction of the application;
        None if there is no such session, or another request was faster: then look again.

        Raises:
            ServerUnavailableError: The old engine or PostgreSQL is away.
        """
        found = self._engine.read(key)
        if found is None:
            return None
        columns = self._columns([found], now, fence=FENCE)
        owner = self._servers.owner()
        with self._servers.outside():
            if self._is_spent_elsewhere(key) or not self._adopt(columns, owner, now):
                return None
        (data,), (expires_at,), (user_id,) = columns.data, columns.expires_at, columns.user_id
        return Row(
            *(key, data, expires_at, VERSION, FENCE, user_id, now, now),
            owner=owner,
            is_settled=True,
        )

    def take_over_all(self, now: float, batch: int) -> Iterator[tuple[int, int]]:
        """Take over all sessions; yield how many were looked at and how many came, per batch.

        What was taken over before is passed over, so it may be ended and begun again.

        Raises:
            NotListableError: The old engine cannot tell which sessions it has.
            ServerUnavailableError, RowRefusedError: Batches so far are committed.
        """
        for keys in self._engine.pages(batch):
            spent = {key for server in self._servers.live() for key in Moves(server).spent(keys)}
            found = list(self._engine.read_many(sorted(set(keys) - spent)))
            came = 0
            for _, part in self._servers.by_authority(found, lambda session: session.key):
                came += self._adopt(self._columns(part, now, fence=0), "", now)
            yield len(keys), came

    def count(self) -> int | None:
        """Return about how many sessions the old engine has; None if nobody knows.

        Raises:
            ServerUnavailableError: It cannot be asked.
        """
        return self._engine.count()

    def bar(self, key: str, now: float) -> None:
        """Have the session of `key` never taken over from now on. Never raises.

        To be called before it is deleted here: a take-over that is under way then either is
        finished, and deleted with the rest, or fails.
        """
        try:
            with self._servers.outside():
                for server in self._servers.live():
                    Moves(server).spend([key], now)
        except DeferredSessionsError as error:
            self._complain(error)

    def delete(self, key: str) -> None:
        """Delete the session of `key` in the old engine, too. Never raises."""
        try:
            self._engine.delete(key)
        except DeferredSessionsError as error:
            self._complain(error)

    def _columns(self, found: Iterable[OldSession], now: float, *, fence: int) -> Columns:
        """Return the sessions as PostgreSQL is to have them, without those that it cannot."""
        readable: list[tuple[OldSession, bytes]] = []
        for session in found:
            try:
                readable.append((session, self._codec.encode(session.data).payload))
            except UNREADABLE as error:
                logger.error(  # noqa: TRY400 - the traceback would show what is in the session
                    "A session was not taken over, because SESSION_SERIALIZER cannot encode what "
                    "is in it (%s). It stays where it was.",
                    type(error).__name__,
                    extra={"action": "session_not_adopted"},
                )
        sessions: Sequence[OldSession] = [session for session, _ in readable]
        return Columns(
            [session.key for session in sessions],
            self._encoder.to_texts(payload for _, payload in readable),
            [session.expires_at for session in sessions],
            [VERSION] * len(sessions),
            [fence] * len(sessions),
            [as_text(session.data.get(USER_KEY) or "") for session in sessions],
            [now] * len(sessions),
        )

    def _adopt(self, columns: Columns, owner: str, now: float) -> int:
        """Create sessions on the server that decides about all of them, and their copies."""
        if not columns.key:
            return 0
        adopted = Moves(self._servers.at(columns.key[0])).adopt(columns, owner, now)
        if adopted:
            self._copies.write(columns, now)
        return adopted

    def _is_spent_elsewhere(self, key: str) -> bool:
        """Tell whether another server knows that the session was taken over before."""
        others = (s for s in self._servers.live() if s is not self._servers.at(key))
        return any(Moves(server).spent([key]) for server in others)

    @staticmethod
    def _complain(error: DeferredSessionsError) -> None:
        logger.error(
            "A session was deleted here, but perhaps not in the engine of before: %s",
            error,
            extra={"action": "not_deleted_in_import_engine"},
        )
