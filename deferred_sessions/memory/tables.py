"""What one transaction does to the named databases of a host store.

Called by `store`, always inside a transaction whose default database is `records`;
the layout of the databases is known here alone. Invariants: every record stands in the
index `used`, and a dirty one in the index `due` as well, under exactly the entries
that its own fields say; and each transaction that removes a record counts that, so that
nobody who asked PostgreSQL before puts an older state in its place.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from operator import itemgetter
from typing import Final, NamedTuple

import lmdb

from deferred_sessions.exceptions import RecordCorruptError, StoreFullError
from deferred_sessions.memory import handing, indexes
from deferred_sessions.memory.environment import Databases
from deferred_sessions.policy import Policy
from deferred_sessions.record import (
    DIRTY,
    Head,
    SessionRecord,
    complete,
    decode,
    decode_head,
    encode,
    encode_saved_again,
    encode_written,
)

Transition = Callable[[SessionRecord | None], SessionRecord | None]
Change = tuple[SessionRecord | None, SessionRecord | None]
Again = tuple[int, float, bytes, str, float, float, float, Policy]
"""What `encode_saved_again` takes, after the bytes."""

FULL: Final = (
    "The session store is full of changes that PostgreSQL does not have yet. Is the "
    "flusher running? Otherwise raise DEFERRED_SESSIONS['STORE_SIZE']."
)
_REMOVALS: Final = b"removals"  # note: transactions that removed something, 64 bits
MAX_BATCH: Final = 8 << 20  # bytes of records at once: a flush must fit into memory


class StoreStatus(NamedTuple):
    """The host store at a glance."""

    records: int
    """Sessions and tombstones held."""
    dirty: int
    """Records that PostgreSQL does not have as they are."""
    size: int
    """Bytes of the map."""
    used: int
    """Bytes of the map that hold something."""
    reusable: int
    """Bytes that held something before, and will again."""


def get(txn: lmdb.Transaction, _dbs: Databases, key: str) -> SessionRecord | None:
    """Return the record of `key`."""
    data = txn.get(key.encode())
    return None if data is None else decode(key, data)


def head(txn: lmdb.Transaction, _dbs: Databases, key: str) -> Head | None:
    """Return the fixed part of the record of `key`."""
    data = txn.get(key.encode())
    return None if data is None else decode_head(data)


def look(
    txn: lmdb.Transaction, _dbs: Databases, key: str, version: int, entered_at: float
) -> Head | SessionRecord | None:
    """Return the record of `key`; only its fixed part if it is the one that is known."""
    data = txn.get(key.encode())
    if data is None:
        return None
    found = decode_head(data)
    if found.version == version and found.entered_at == entered_at:
        return found
    return complete(key, found, data)


def page(txn: lmdb.Transaction, dbs: Databases, after: str, limit: int) -> list[SessionRecord]:
    """Return the `limit` records that follow the key `after`."""
    names = indexes.entries(txn, dbs.records, after.encode() + b"\0", limit)
    return [decode(name.decode(), txn.get(name, b"")) for name in names]


def update(
    txn: lmdb.Transaction, dbs: Databases, key: str, transition: Transition, may_grow: bool
) -> Change:
    """Replace the record of `key` by what `transition` makes of it.

    Raises:
        StoreFullError: It would take more room than before, and must not.
    """
    name = key.encode()
    return _replaced(txn, dbs, key, name, txn.get(name), transition, may_grow)


def save(  # noqa: PLR0917 - positional, because each save pays for keywords
    txn: lmdb.Transaction,
    dbs: Databases,
    key: str,
    again: Again,
    transition: Transition,
    may_grow: bool,
) -> Change | None:
    """Do `update`; return None if it was the change that `again` says, which takes half of it."""
    name = key.encode()
    data = txn.get(name)
    if data is not None and may_grow:
        new_data = encode_saved_again(data, *again)
        if new_data is not None:
            if dbs.log is not None:
                dbs.log.append(name, new_data)
            txn.put(name, new_data)
            return None
    return _replaced(txn, dbs, key, name, data, transition, may_grow)


def _replaced(  # noqa: PLR0917 - see `save`
    txn: lmdb.Transaction,
    dbs: Databases,
    key: str,
    name: bytes,
    data: bytes | memoryview | None,
    transition: Transition,
    may_grow: bool,
) -> Change:
    before = None if data is None else decode(key, data)
    after = transition(before)
    if after is before:
        return before, after
    if after is None:
        txn.delete(name)
        count_removal(txn, dbs)
    else:
        new_data = encode(after)
        # What becomes dirty takes some bytes more; there is room kept back for that.
        if not may_grow and (before is None or len(after.payload) > len(before.payload)):
            raise StoreFullError(FULL)
        if dbs.log is not None and after.flags & DIRTY:
            dbs.log.append(name, new_data)
        txn.put(name, new_data)
    if before is None or after is None or indexes.has_moved(before, after):
        indexes.reindex(txn, dbs, before, after)
    return before, after


def update_unlogged(
    txn: lmdb.Transaction, dbs: Databases, key: str, transition: Transition
) -> Change:
    """Do `update` past the journal."""
    return update(txn, dbs._replace(log=None), key, transition, True)


def give_up(txn: lmdb.Transaction, dbs: Databases, key: str, transition: Transition) -> Change:
    """Do `update` after a save past memory; the journal learns that it has nothing of what is gone.

    What is left is right in memory even if the journal is too full to take it.
    """
    count_removal(txn, dbs)
    try:
        change = update(txn, dbs, key, transition, True)
    except StoreFullError:
        change = update_unlogged(txn, dbs, key, transition)
    if change[1] is None and dbs.log is not None:
        with suppress(StoreFullError):  # then a recovery asks PostgreSQL in vain, that is all
            dbs.log.append(key.encode(), b"")
    return change


def keep(
    txn: lmdb.Transaction,
    dbs: Databases,
    record: SessionRecord,
    known_removals: bytes,
    may_grow: bool,
) -> SessionRecord | None:
    """Put `record`, which PostgreSQL has, unless there is one; return what is there now.

    Returns None, and puts nothing, if anything was removed since there had been
    `known_removals`: it may have been a later state of the same session. So it does if the
    session is being handed to another node.

    Raises:
        StoreFullError: There is no room.
    """
    data = txn.get(record.key.encode())
    if data is not None:
        return decode(record.key, data)
    if removals(txn, dbs, record.key) != known_removals or handing.is_marked(txn, dbs, record.key):
        return None
    return update(txn, dbs, record.key, lambda _: record, may_grow)[1]


def removals(txn: lmdb.Transaction, dbs: Databases, key: str) -> bytes:
    """Return what changes with each transaction that may have removed the record of `key`."""
    return bytes(txn.get(_REMOVALS, b"", dbs.notes)) + handing.counted(txn, dbs, key)


def count_removal(txn: lmdb.Transaction, dbs: Databases) -> None:
    """Count a transaction that removes records."""
    known = int.from_bytes(txn.get(_REMOVALS, b"", dbs.notes), "little")
    count = (known + 1) % 2**64
    txn.put(_REMOVALS, count.to_bytes(8, "little"), db=dbs.notes)


def update_many(
    txn: lmdb.Transaction, dbs: Databases, transitions: Iterable[tuple[str, Transition]]
) -> None:
    """Do `update` for each key, in the order of the keys, which is that of the pages.

    What the journal does not take stays as it is.
    """
    for key, transition in sorted(transitions, key=itemgetter(0)):
        with suppress(StoreFullError):
            update(txn, dbs, key, transition, True)


class Dirty(NamedTuple):
    """A dirty record as it was found, decoded only as far as has been needed."""

    key: str
    head: Head
    data: bytes
    """The record as it is stored."""
    entry: bytes
    """Its place in the due index."""

    def __repr__(self) -> str:
        return f"<Dirty of version {self.head.version}>"  # a session key is a secret

    @classmethod
    def of(cls, record: SessionRecord) -> Dirty:
        """Return `record` as if it had been found."""
        data = encode(record)
        return cls(
            record.key, decode_head(data), data, indexes.due_entry(record.due_at, record.key)
        )

    @property
    def record(self) -> SessionRecord:
        """The record, decoded."""
        return decode(self.key, self.data)


def due(
    txn: lmdb.Transaction, dbs: Databases, now: float, limit: int, after: bytes
) -> tuple[list[Dirty], list[bytes]]:
    """Return up to `limit` records due at `now`, and the entries of unreadable ones.

    Those that have been due for longest are chosen, and returned in order of their keys;
    fewer if they are large.
    """
    found: list[Dirty] = []
    unreadable: list[bytes] = []
    end = indexes.DUE.pack(indexes.microseconds(now)) + b"\xff"
    room = MAX_BATCH
    for entry in indexes.entries(txn, dbs.due, after + b"\0", limit):
        if entry > end or room <= 0:
            break
        name = entry[indexes.DUE.size :]
        data = bytes(txn.get(name, b""))
        room -= len(data)
        try:  # not Dirty(...): this is what the flusher does for each row
            found.append(tuple.__new__(Dirty, (name.decode(), decode_head(data), data, entry)))
        except RecordCorruptError:
            unreadable.append(entry)
    return sorted(found, key=itemgetter(0)), unreadable


def find(txn: lmdb.Transaction, _dbs: Databases, keys: Iterable[str]) -> list[Dirty]:
    """Return those of `keys` that are dirty."""
    found: list[Dirty] = []
    for key in keys:
        data = bytes(txn.get(key.encode(), b""))
        if data and (head := decode_head(data)).flags & DIRTY:
            found.append(Dirty(key, head, data, indexes.due_entry(head.due_at, key)))
    return found


def clean_many(
    txn: lmdb.Transaction, dbs: Databases, written: Iterable[Dirty], now: float
) -> list[str]:
    """Mark records as written if they are still as they were found.

    Returns the keys of the others, which are left alone.
    """
    others: list[str] = []
    cursor = txn.cursor()  # it finds the place for both: the flusher does this for each row
    for key, head, data, entry in written:
        name = key.encode()
        if not cursor.set_key(name) or cursor.value() != data:
            others.append(key)
            continue
        cursor.put(name, encode_written(data, head, now))
        txn.delete(entry, b"", dbs.due)
    return others


def take_out(txn: lmdb.Transaction, dbs: Databases, entries: Iterable[bytes]) -> None:
    """Remove entries from the due index, leaving their records."""
    for entry in entries:
        txn.delete(entry, db=dbs.due)


def clear(txn: lmdb.Transaction, dbs: Databases) -> None:
    """Remove every record."""
    for database in (dbs.records, dbs.due, dbs.used):
        txn.drop(database, delete=False)
    count_removal(txn, dbs)


def dirty_names(txn: lmdb.Transaction, dbs: Databases) -> Iterator[bytes]:
    """Yield the names of the dirty records, those first that are due first."""
    for entry in txn.cursor(dbs.due).iternext(values=False):
        yield bytes(entry[indexes.DUE.size :])


def oldest_change(txn: lmdb.Transaction, dbs: Databases) -> float | None:
    """Return the time of the oldest payload change among the dirty records."""
    return min((since for since, _ in _waiting(txn, dbs) if since), default=None)


def is_needed(txn: lmdb.Transaction, dbs: Databases, generation: int) -> bool:
    """Tell whether this log, or an older one, may be the only one that has a dirty record."""
    return any(since <= generation for _, since in _waiting(txn, dbs))


def _waiting(txn: lmdb.Transaction, dbs: Databases) -> Iterator[tuple[float, int]]:
    return map(indexes.WAITING.unpack, txn.cursor(dbs.due).iternext(keys=False))


def used_pages(txn: lmdb.Transaction, dbs: Databases) -> int:
    """Return how many pages of the map hold something."""
    databases = (dbs.records, dbs.due, dbs.used, dbs.notes)
    return sum(
        stat["branch_pages"] + stat["leaf_pages"] + stat["overflow_pages"]
        for stat in map(txn.stat, databases)
    )


def status(txn: lmdb.Transaction, dbs: Databases) -> StoreStatus:
    """Return the figures of the store."""
    info, page_size, pages = dbs.env.info(), dbs.env.stat()["psize"], used_pages(txn, dbs)
    return StoreStatus(
        records=txn.stat(dbs.records)["entries"],
        dirty=txn.stat(dbs.due)["entries"],
        size=info["map_size"],
        used=pages * page_size,
        reusable=max(0, info["last_pgno"] + 1 - pages) * page_size,
    )


def note(txn: lmdb.Transaction, dbs: Databases, name: str) -> bytes | None:
    """Return a note, or None."""
    value = txn.get(name.encode(), db=dbs.notes)
    return None if value is None else bytes(value)


def set_note(
    txn: lmdb.Transaction, dbs: Databases, name: str, value: bytes, voids_loads: bool
) -> None:
    """Leave a note; have loads that are under way be of no use, if it says so."""
    txn.put(name.encode(), value, db=dbs.notes)
    if voids_loads:
        count_removal(txn, dbs)
