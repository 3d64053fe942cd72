"""The places of records in the indexes of a host store: when due, and when last used.

Called by `tables` and `handing`, inside their transactions. Invariant: every record stands in
the index `used`, and a dirty one in `due` as well, under exactly the entries that its own
fields say.

A place in `used` is a minute and the start of the key, which takes a third of the room of exact
times and whole keys. Sessions whose keys start alike share it; Django's keys, which are random, do
not. Where some do, an entry may outlive its last session, until eviction or a sweep comes by.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from itertools import islice, takewhile
from typing import Final

import lmdb

from deferred_sessions.memory.environment import Databases
from deferred_sessions.record import DIRTY, TOMBSTONE, Head, SessionRecord, decode_head

DUE: Final = struct.Struct(">Q")  # microseconds; big-endian sorts by time
USED: Final = struct.Struct(">BI")  # kind, grains of time
GRAIN: Final = 60.0  # seconds: how exactly eviction knows who was used before whom
START: Final = 12  # bytes of a key; LMDB wants all values of such an index to be of one size
WAITING: Final = struct.Struct("<dI")
"""What stands in `due`: when the first change was that PostgreSQL lacks, 0 if it only lacks an
expiry; and the generation of a log such that this log, or a later one, has the record."""
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
    was_used = None if before is None else minute_of(before)
    is_used = None if after is None else minute_of(after)
    if was_used != is_used:
        if before is not None and was_used is not None:
            _leave(txn, dbs, was_used, before.key.encode())
        if after is not None and is_used is not None:
            txn.put(is_used, start_of(after.key.encode()), db=dbs.used)
    if before is not None and before.flags & DIRTY:
        if after is not None and after.flags & DIRTY and before[13:15] == after[13:15]:
            return  # due at the same time, changed since the same time
        txn.delete(due_entry(before.due_at, before.key), db=dbs.due)
    if after is not None and after.flags & DIRTY:
        generation = 0 if dbs.log is None else dbs.log.generation()
        waiting = WAITING.pack(after.changed_at, generation)
        txn.put(due_entry(after.due_at, after.key), waiting, db=dbs.due)


def due_entry(due_at: float, key: str) -> bytes:
    """Return the place in `due`."""
    return DUE.pack(microseconds(due_at)) + key.encode()


def minute_of(record: SessionRecord) -> bytes:
    """Return the minute of its last use, as it stands in `used`."""
    return minute(TOMBSTONES if record.flags & TOMBSTONE else SESSIONS, record.used_at)


def minute(kind: int, seconds: float) -> bytes:
    """Return where those begin in `used` that were used last in the minute of this time."""
    return USED.pack(kind, min(max(0, int(seconds // GRAIN)), 2**32 - 1))


def start_of(name: bytes) -> bytes:
    """Return what stands in `used` of a key."""
    return name[:START].ljust(START, b"\0")


def used_in(
    txn: lmdb.Transaction, dbs: Databases, entry: tuple[bytes, bytes]
) -> Iterator[tuple[bytes, Head]]:
    """Yield the sessions, with their heads, that have this place in `used`."""
    when, start = entry
    for name in list(_starting(txn, dbs, start)):
        head = decode_head(txn.get(name, b""))
        if minute(SESSIONS, head.used_at)[1:] == when[1:]:  # whatever it has become
            yield name, head


def _leave(txn: lmdb.Transaction, dbs: Databases, when: bytes, name: bytes) -> None:
    """Take `name` out of `used`, unless another record may have the same place."""
    start = start_of(name)
    if all(other == name for other in islice(_starting(txn, dbs, start), 2)):
        txn.delete(when, start, dbs.used)


def _starting(txn: lmdb.Transaction, dbs: Databases, start: bytes) -> Iterator[bytes]:
    """Yield the names of the records that start like this: there is one, as a rule."""
    cursor = txn.cursor(dbs.records)
    if cursor.set_range(start.rstrip(b"\0")):
        names = map(bytes, cursor.iternext(values=False))
        yield from takewhile(lambda name: start_of(name) == start, names)


def used_entries(
    txn: lmdb.Transaction, dbs: Databases, start: bytes, end: bytes, count: int
) -> list[tuple[bytes, bytes]]:
    """Return up to `count` entries of `used`, minutes and starts, between two minutes."""
    cursor = txn.cursor(dbs.used)
    if not cursor.set_range(start):
        return []
    found = takewhile(lambda item: bytes(item[0]) < end, islice(cursor.iternext(), count))
    return [(bytes(when), bytes(name)) for when, name in found]


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
