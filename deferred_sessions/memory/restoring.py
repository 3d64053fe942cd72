"""Puts what a journal had into a host store, within one transaction.

Called by `recovery`, for a part of the records at a time. Invariant: what is there of a session
gives way only to a later state of it; and every record gets its places in the indexes.
"""

from __future__ import annotations

from typing import Final

import lmdb

from deferred_sessions.memory import indexes
from deferred_sessions.memory.environment import Databases
from deferred_sessions.record import CHANGED_AT, decode, is_tombstone

_NO_LOG: Final = bytes(4)  # instead of a generation: whichever log has it


def restore(
    txn: lmdb.Transaction, dbs: Databases, records: list[tuple[bytes, bytes]], now: float
) -> None:
    """Put records, by name and as `encode_recovered` made them at `now`, in order of names.

    What is there already stays if it is the same state or a later one. In a new store,
    and with names that grow from call to call, all is appended to full pages.
    """
    if not _is_behind(txn, dbs.records, records):
        records = [each for each in records if _gives_way(txn, dbs, *each)]
    due = indexes.DUE.pack(indexes.microseconds(now - 1.0))
    alive = [name for name, data in records if not is_tombstone(data)]
    deleted = [name for name, data in records if is_tombstone(data)]
    for database, items in (
        (dbs.records, records),
        (dbs.due, [(due + name, data[CHANGED_AT] + _NO_LOG) for name, data in records]),
        (dbs.used, _used(indexes.SESSIONS, alive, now)),
        (dbs.used, _used(indexes.TOMBSTONES, deleted, now)),
    ):
        cursor = txn.cursor(database)
        is_dup = database is dbs.used
        cursor.putmulti(items, append=_is_behind(txn, database, items, is_dup=is_dup))


def _used(kind: int, names: list[bytes], now: float) -> list[tuple[bytes, bytes]]:
    """Return the places of sessions, or of deletions, in the index of last uses."""
    minute = indexes.minute(kind, now)
    return [(minute, start) for start in dict.fromkeys(map(indexes.start_of, names))]


def _is_behind(
    txn: lmdb.Transaction,
    database: lmdb._Database,
    items: list[tuple[bytes, bytes]],
    *,
    is_dup: bool = False,
) -> bool:
    """Tell whether all of `items`, which are in order, come after all that is there."""
    cursor = txn.cursor(database)
    if not items or not cursor.last():
        return True
    # Of the keys alone, where each has one value: what has the same key is to be looked at.
    return cursor.item() < items[0] and (is_dup or bytes(cursor.key()) < items[0][0])


def _gives_way(txn: lmdb.Transaction, dbs: Databases, name: bytes, data: bytes) -> bool:
    """Take what is there of a session out of the indexes if `data` is later."""
    known = txn.get(name)
    if known is None:
        return True
    before, after = (decode(name.decode(), each) for each in (known, data))
    if (before.fence, before.version) >= (after.fence, after.version):
        return False
    indexes.reindex(txn, dbs, before, None)
    return True
