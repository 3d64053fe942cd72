"""Sessions on their way out of a host's memory, to be handed to another node.

Called by `store`, inside its transactions. Invariant: from the moment a session has left
memory until PostgreSQL has passed its lease on, a mark stands for it, which outlives the
death of any process; nobody puts the session back meanwhile, nor what was read before.

A session that requests keep changing is shut before it is written for the last time: their
saves wait then. What is shut stands in a note, so that it is opened again if nobody lives to.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping
from itertools import takewhile
from typing import Final
from zlib import crc32

import lmdb

from deferred_sessions.memory import indexes
from deferred_sessions.memory.environment import Databases
from deferred_sessions.record import DIRTY, SHUT, decode, decode_head, encode

_MARK: Final = b"handing:"  # note: the fence of the lease that is being given up
_SHUT: Final = b"shut"  # note: the keys of the sessions that are shut
_COUNT: Final = b"handed:"  # note: sessions handed over, for one of 256 groups of keys
_SET_BACK: Final = 1.0  # seconds; what entered memory later than that, by another clock
_FENCE: Final = struct.Struct("<q")


def hand_over(
    txn: lmdb.Transaction, dbs: Databases, leases: Mapping[str, int], entered_before: float
) -> list[str]:
    """Remove the records of `leases` (fences by key) that may go, and mark their keys.

    Returns these keys. Others are dirty, or were loaded since `entered_before`.
    """
    gone: list[str] = []
    for key, fence in sorted(leases.items()):
        name = key.encode()
        data = bytes(txn.get(name, b""))
        if not _may_go(data, entered_before):
            continue
        if data:
            indexes.reindex(txn, dbs, decode(key, data), None)
            txn.delete(name)
        mark(txn, dbs, key, fence)
        gone.append(key)
    return gone


def mark(txn: lmdb.Transaction, dbs: Databases, key: str, fence: int) -> None:
    """Mark `key`, whose record has been removed in this transaction."""
    txn.put(_MARK + key.encode(), _FENCE.pack(fence), db=dbs.notes)
    count(txn, dbs, key)


def unmark(txn: lmdb.Transaction, dbs: Databases, leases: Mapping[str, int]) -> None:
    """Take these marks away: PostgreSQL has passed the leases on. Later ones stay."""
    for key, fence in leases.items():
        name = _MARK + key.encode()
        if txn.get(name, b"", dbs.notes) == _FENCE.pack(fence):
            txn.delete(name, db=dbs.notes)
            count(txn, dbs, key)


def is_marked(txn: lmdb.Transaction, dbs: Databases, key: str) -> bool:
    """Tell whether the lease of `key` is being given up, and its record has left memory."""
    return txn.get(_MARK + key.encode(), db=dbs.notes) is not None


def is_leaving(txn: lmdb.Transaction, dbs: Databases, key: str) -> bool:
    """Tell whether `key` is shut, or has left and its lease is being given up."""
    data = txn.get(key.encode())
    if data is not None and decode_head(data).flags & SHUT:
        return True
    return is_marked(txn, dbs, key)


def shut(txn: lmdb.Transaction, dbs: Databases, keys: Iterable[str]) -> None:
    """Have saves of these sessions wait until `reopen`, or until they have left."""
    shut = [key for key in keys if _flag(txn, key, SHUT)]
    txn.put(_SHUT, " ".join([*_shut(txn, dbs), *shut]).encode(), db=dbs.notes)


def reopen(txn: lmdb.Transaction, dbs: Databases) -> None:
    """Have saves go on, as far as what was shut has not left."""
    for key in _shut(txn, dbs):
        _flag(txn, key, 0)
    txn.delete(_SHUT, db=dbs.notes)


def is_any_shut(txn: lmdb.Transaction, dbs: Databases) -> bool:
    """Tell whether there is anything to reopen."""
    return txn.get(_SHUT, db=dbs.notes) is not None


def _shut(txn: lmdb.Transaction, dbs: Databases) -> list[str]:
    return bytes(txn.get(_SHUT, b"", dbs.notes)).decode().split()


def _flag(txn: lmdb.Transaction, key: str, flag: int) -> bool:
    """Shut a session, or open it; return whether it is there. Its indexes stay."""
    name = key.encode()
    data = txn.get(name)
    if data is None:
        return False
    record = decode(key, data)
    if not record.is_tombstone:
        txn.put(name, encode(record._replace(flags=record.flags & ~SHUT | flag)))
    return True


def marked(txn: lmdb.Transaction, dbs: Databases) -> dict[str, int]:
    """Return all marks: the fences by key."""
    cursor = txn.cursor(dbs.notes)
    if not cursor.set_range(_MARK):
        return {}
    marks = takewhile(lambda item: bytes(item[0]).startswith(_MARK), cursor.iternext())
    return {
        bytes(name)[len(_MARK) :].decode(): _FENCE.unpack(bytes(fence))[0] for name, fence in marks
    }


def counted(txn: lmdb.Transaction, dbs: Databases, key: str) -> bytes:
    """Return how often sessions of this group were handed over."""
    return bytes(txn.get(_group(key), b"", dbs.notes))


def count(txn: lmdb.Transaction, dbs: Databases, key: str) -> None:
    """Have what was read of this session before now not be kept any more."""
    number = int.from_bytes(counted(txn, dbs, key), "little") + 1
    txn.put(_group(key), number.to_bytes(8, "little"), db=dbs.notes)


def _may_go(data: bytes, entered_before: float) -> bool:
    """Tell whether a record, as it is stored, is clean and was not loaded just now."""
    if not data:
        return True  # it has been evicted
    head = decode_head(data)
    is_new = entered_before < head.entered_at < entered_before + _SET_BACK
    return not head.flags & DIRTY and not is_new


def _group(key: str) -> bytes:
    return _COUNT + bytes([crc32(key.encode()) & 0xFF])
