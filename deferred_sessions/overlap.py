"""What happens when two requests of one visitor overlap: their changes are merged.

Called by `backend` when a save finds that the session has changed since it was loaded.
Invariant: no value is ever dropped uncounted; and nothing here runs inside a
transaction of the host store.
"""

from __future__ import annotations

from typing import Any

from deferred_sessions.memory.cache import Entry
from deferred_sessions.memory.counters import Counter, Counters
from deferred_sessions.merge import merge
from deferred_sessions.payload import Codec, Snapshot
from deferred_sessions.record import SessionRecord
from deferred_sessions.signals import session_conflict


class Overlap:
    """Merges the changes of a request with those of another that was faster."""

    def __init__(self, *, codec: Codec, counters: Counters, is_merging: bool) -> None:
        self.is_merging = is_merging
        """Whether changes are merged at all; otherwise the last save wins."""
        self._codec = codec
        self._counters = counters

    def merge_into(
        self, session: dict[str, Any], base: Snapshot, record: SessionRecord
    ) -> Entry[Snapshot]:
        """Bring `session`, which was loaded as `base`, up to `record`, in place.

        Returns:
            The session of `record`: what `session` differs from by its own changes now.
        """
        theirs = self._codec.decode(record.payload)
        merged = merge(base.copy(), session, theirs.copy(), text=self._codec.text)
        session.clear()
        session.update(merged.session)
        self._counters.add(Counter.MERGES)
        if merged.conflicts:
            self._counters.add(Counter.CONFLICTS, len(merged.conflicts))
            session_conflict.send_robust(
                sender=Overlap, session_key=record.key, keys=merged.conflicts
            )
        return Entry(record.version, record.entered_at, theirs)
