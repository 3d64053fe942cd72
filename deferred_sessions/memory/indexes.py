"""The places of records in the indexes of a host store: when due, and when last used.

Called by `tables` and `handing`, inside their transactions. Invariant: every record stands in
the index `used`, and a dirty one in `due` as well, under exactly the entries that its own
fields say.
"""

from __future__ import annotations

import struct
from itertools import islice
from typing import Final

import lmdb

from deferred_sessions.memory.environment import Databases
from deferred_sessions.record import DIRTY, TOMBSTONE, SessionRecord

DUE: Final = struct.Struct(">Q")  # microseconds; big-endian sorts by time
USED: Final = struct.Struct(">BQ")  # kind, microseconds
SINCE: Final = struct.Struct("<d")
TOMBSTONES, SESSIONS = 0, 1  # kinds of the used index
_FAR: Final = 1e12  # seconds


def has_moved(before: SessionRecord, after: SessionRecord) -> bool:
    """Tell whether the two may have different places in the indexes."""
    # Flags; changed, due, used. By place, because by name it costs three times as much.
    return before[3] != after[3] or before[13:16] != after[13:16]


def reindex(
    txn: lmdb.Transaction,
    dbs: Databases,
    before: SessionRecord | None,
    after: SessionRecord | None,
) -> None:
    """Remove the index entries that `before` has, and make those that `after` has.

    What stays where it is costs nothing: its page may not have been touched for long.
    """
    was_used = None if before is None else used_entry(before)
    is_used = None if after is None else used_entry(after)
    if was_used != is_used:
        if was_used is not None:
            txn.delete(was_used, db=dbs.used)
        if is_used is not None:
            txn.put(is_used, b"", db=dbs.used)
    if before is not None and before.flags & DIRTY:
        if after is not None and after.flags & DIRTY and before[13:15] == after[13:15]:
            return  # due at the same time, changed since the same time
        txn.delete(due_entry(before.due_at, before.key), db=dbs.due)
    if after is not None and after.flags & DIRTY:
        since = SINCE.pack(after.changed_at)
        txn.put(due_entry(after.due_at, after.key), since, db=dbs.due)


def due_entry(due_at: float, key: str) -> bytes:
    """Return the place in `due`."""
    return DUE.pack(microseconds(due_at)) + key.encode()


def used_entry(record: SessionRecord) -> bytes:
    """Return the place in `used`."""
    kind = TOMBSTONES if record.flags & TOMBSTONE else SESSIONS
    return USED.pack(kind, microseconds(record.used_at)) + record.key.encode()


def entries(
    txn: lmdb.Transaction, database: lmdb._Database, start: bytes, count: int
) -> list[bytes]:
    """Return up to `count` entries of an index from `start` on."""
    cursor = txn.cursor(database)
    if not cursor.set_range(start):
        return []
    return [bytes(entry) for entry in islice(cursor.iternext(values=False), count)]


def microseconds(seconds: float) -> int:
    """Return a time as the indexes have it; "never" is their last one."""
    return max(0, int(seconds * 1_000_000)) if seconds < _FAR else 2**64 - 1
