"""What this node wrote too late: the session had passed to another node.

Called by `writer`. Invariant: a refused change leaves memory only after it was stored for
inspection; it is counted, signalled and logged, never dropped in silence.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from contextlib import suppress

from deferred_sessions.encoding import RowEncoder
from deferred_sessions.exceptions import RecordCorruptError
from deferred_sessions.memory.counters import Counter, Counters
from deferred_sessions.memory.tables import Dirty
from deferred_sessions.payload import Codec
from deferred_sessions.servers.fleet_leases import FleetLeases
from deferred_sessions.servers.rows import Refusal, State
from deferred_sessions.signals import session_fenced

logger = logging.getLogger(__name__)


class Refusals:
    """Keeps refused writes in PostgreSQL, and tells of them."""

    def __init__(
        self, leases: FleetLeases, encoder: RowEncoder, codec: Codec, counters: Counters
    ) -> None:
        self._leases = leases
        self._encoder = encoder
        self._codec = codec
        self._counters = counters

    def keep(self, refused: Sequence[tuple[Dirty, State]]) -> None:
        """Store what was refused, with what stood in its way; durable with the transaction.

        Raises:
            ServerUnavailableError, RowRefusedError: Nothing was stored; keep it in memory.
        """
        self._leases.refuse([self._refusal(dirty, state) for dirty, state in refused])

    def tell(self, refused: Sequence[tuple[Dirty, State]]) -> None:
        """Count, log and signal what was refused and is stored."""
        if not refused:
            return
        self._counters.add(Counter.FENCED, len(refused))
        logger.warning(
            "%d changes of sessions that have passed to another node were refused; they are kept "
            "in the table of refused writes.",
            len(refused),
            extra={"action": "sessions_fenced", "count": len(refused)},
        )
        for dirty, state in refused:
            session_fenced.send_robust(
                sender=Refusals,
                session_key=dirty.key,
                fence=dirty.head.fence,
                version=dirty.head.version,
                keys=self._changed_keys(dirty, state),
                owner=state.owner,
            )

    def _refusal(self, dirty: Dirty, state: State) -> Refusal:
        record = dirty.record
        return Refusal(
            key=dirty.key,
            fence=dirty.head.fence,
            version=dirty.head.version,
            changed_keys=json.dumps(self._changed_keys(dirty, state)),
            data=self._encoder.to_texts([record.payload])[0],
            owner=state.owner,
            owner_fence=state.fence,
        )

    def _changed_keys(self, dirty: Dirty, state: State) -> list[str]:
        """Return in which of its keys the session differs from what PostgreSQL has."""
        with suppress(RecordCorruptError):
            ours = self._codec.decode(dirty.record.payload).copy()
            theirs = self._codec.decode(self._encoder.to_payload(state.data)).copy()
            return sorted(
                str(key)
                for key in ours.keys() | theirs.keys()
                if key not in ours or key not in theirs or ours[key] != theirs[key]
            )
        return []
