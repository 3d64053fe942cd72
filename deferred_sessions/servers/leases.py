"""Leases: which node may change a session; and the nodes themselves.

Called by `intake` for what this node lacks, by `handover` for what others ask for, by
`membership` for heartbeats, and by `refusals`. Invariant: a lease changes hands in one
transaction, which raises the fence; whatever a node writes under an older fence is refused.

The work is done by functions in the database (migration 0004), one round trip each. None
needs a session of its own, so all of it works through a pooler of transactions.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Final

from deferred_sessions.servers import sql
from deferred_sessions.servers.rows import Answer, Beat, Grant, Refusal, Row
from deferred_sessions.servers.server import SessionServer

QUEUE_LIMIT: Final = 100  # nodes that may wait for one session
PART: Final = 500  # leases released in one transaction


class Leases:
    """The leases on one session server."""

    def __init__(self, server: SessionServer) -> None:
        self._server = server

    def acquire(
        self,
        key: str,
        *,
        waits: bool = False,
        is_unknown: bool = False,
        epoch: int = 0,
    ) -> Grant:
        """Ask for the lease of `key`; `waits` tells that this node stands in its queue.

        Where there are several servers, fences begin at the `epoch` that this node goes by.
        `is_unknown` tells that its memory had nothing of the session when it did so already; then
        the fence of a lease that it has may grow, if servers have come and gone since.
        A lease that this node has already costs a read and writes nothing. Who is queued
        asks again when it is told to, or at least every second or so, and `withdraw`s if
        it gives up: who has not asked for three seconds is passed over.

        Raises:
            ServerUnavailableError: Nothing is known about the session.
            RowLockedError: A transaction holds the row; nothing was changed.
        """
        rows = self._server.run(
            sql.ACQUIRE,
            [key, self._server.owner(), waits, QUEUE_LIMIT, is_unknown, epoch],
        )
        if not rows:
            return Grant(Answer.GONE)
        status, owner, data, expires_at, version, fence, user_id, created_at, written_at = rows[0]
        answer = Answer(status)
        if answer is not Answer.GRANTED:
            return Grant(answer, owner=owner or "")
        row = Row(
            *(key, data, expires_at, version, fence, user_id or "", created_at, written_at),
            owner=owner,
            is_settled=not self._server.in_transaction(),
        )
        return Grant(answer, row, owner)

    def withdraw(self, key: str) -> None:
        """Leave the queue for `key`."""
        self._server.run(sql.WITHDRAW, [key, self._server.owner()])

    def requested(self) -> dict[str, int]:
        """Return the leases of this node, with their fences, that others wait for."""
        self._server.connect()
        return dict(self._server.run(sql.REQUESTED, [self._server.owner()] * 3))

    def release(self, leases: Mapping[str, int], epoch: int = 0) -> dict[str, bool]:
        """Give up these leases, as far as this node still has them under these fences.

        Who has waited longest for one gets it, and is told; what nobody waits for is free.

        Returns:
            The keys this node has no lease of any more, and whether it had one until now.
            Not there is what somebody else holds the row of in this moment.
        """
        released: dict[str, bool] = {}
        keys = sorted(leases)
        for start in range(0, len(keys), PART):
            part = keys[start : start + PART]
            fences = [leases[key] for key in part]
            released |= self._server.run(sql.RELEASE, [self._server.owner(), part, fences, epoch])
        return released

    def held(self, after: str, limit: int) -> dict[str, int]:
        """Return up to `limit` leases of this node that follow the key `after`."""
        return dict(self._server.run(sql.HELD, [self._server.owner(), after, limit]))

    # Nodes

    def beat(self, traits: Mapping[str, str], word: str = "beat") -> list[Beat]:
        """Say that this node lives; return all that are taken to be alive, and this one.

        `word` is "beat"; "join" for the first one, which ends earlier incarnations of the
        node; or "revive", for a node that was found dead and has taken note of it.
        """
        self._server.connect()
        parameters = [self._server.owner(), json.dumps(dict(traits)), word]
        rows = self._server.run(sql.BEAT, parameters)
        return [Beat(node, beat, is_dead, json.loads(text)) for node, beat, is_dead, text in rows]

    def declare_dead(self, node: str, beat: int) -> bool:
        """Free the leases of `node`, unless it has beaten since `beat`; return whether."""
        return bool(self._server.run(sql.DECLARE_DEAD, [node, beat])[0][0])

    # What came too late

    def refuse(self, refusals: Sequence[Refusal]) -> None:
        """Keep what was refused for inspection; durable when this returns."""
        if refusals:
            columns = map(list, zip(*refusals, strict=True))
            self._server.run(sql.REFUSE, [self._server.owner(), *columns])
