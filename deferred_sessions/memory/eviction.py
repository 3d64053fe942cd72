"""What leaves a host store to make room: clean records, by the index `used`.

Called by `transactions` and `store`, inside their transactions. Invariant: what PostgreSQL lacks
never leaves; and each transaction that removes a record counts that.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

import lmdb

from deferred_sessions.memory import indexes
from deferred_sessions.memory.environment import Databases
from deferred_sessions.memory.tables import count_removal
from deferred_sessions.record import DIRTY

_PATIENCE: Final = 8  # dirty sessions that eviction looks past for each it wants


def evict(txn: lmdb.Transaction, dbs: Databases, count: int) -> int:
    """Remove up to `count` clean records: tombstones, then sessions not used for longest.

    Which of those used in the same minute comes first is left open.
    """
    gone = _evict_kind(txn, dbs, indexes.TOMBSTONES, count)
    return gone + _evict_kind(txn, dbs, indexes.SESSIONS, count - gone)


def sweep(txn: lmdb.Transaction, dbs: Databases, before: float, count: int) -> int:
    """Remove up to `count` clean tombstones that were buried before the minute of this time."""
    end = indexes.minute(indexes.TOMBSTONES, before)
    return _forget(txn, dbs, indexes.used_entries(txn, dbs, b"\0", end, count), count)


def _evict_kind(txn: lmdb.Transaction, dbs: Databases, kind: int, count: int) -> int:
    start, end = indexes.USED.pack(kind, 0), indexes.USED.pack(kind + 1, 0)
    while True:
        entries = txn.stat(dbs.used)["entries"]
        candidates = indexes.used_entries(txn, dbs, start, end, count * _PATIENCE)
        gone = _forget(txn, dbs, candidates, count)
        if gone or txn.stat(dbs.used)["entries"] == entries:
            return gone  # else they were entries without a session: look at the next ones


def _forget(
    txn: lmdb.Transaction, dbs: Databases, candidates: Iterable[tuple[bytes, bytes]], count: int
) -> int:
    """Remove the first `count` clean records at places in the index `used`."""
    forgotten = 0
    for entry in candidates:
        if forgotten == count:
            break
        stays = False
        for name, head in indexes.used_in(txn, dbs, entry):
            if head.flags & DIRTY or forgotten == count:
                stays = True
            else:
                txn.delete(name)
                forgotten += 1
        if not stays:
            txn.delete(*entry, dbs.used)
    if forgotten:
        count_removal(txn, dbs)
    return forgotten
