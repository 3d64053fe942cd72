r"""One session as the tiers move it, and its byte layout.

Every tier and the flusher pass `SessionRecord` around; this is the only module that
knows how one becomes bytes. Invariant: `decode(key, encode(record)) == record`.

Layout, little-endian, 100 bytes before the variable part (`FORMAT` 4):

    format    u8      of this layout, so that a later release can read older records
    user_len  u16     bytes of the user id
    flags     u8      CHANGED, TOUCHED, TOMBSTONE, RECOVERED, SHUT
    updates   u32     \ since the last write
    requests  u32     / to PostgreSQL
    version, stored_version, fence                                    u64 each
    created, expires, stored_expires, written, changed, due, used, entered  f64 each
    user id   UTF-8
    payload   what SESSION_SERIALIZER made, to the end

A clean record says most of it twice, so it is kept in 28 to 52 bytes (`SHORT`): what is not
there is zero, or the same as what is stored. Nearly all sessions of a host are clean.

    layout, user_len, flags, same u8 each, version, fence u32 each
    entered, expires, and of created, written, used what `same` does not name  f64 each
    same: 1 created is entered, 2 written is created, 4 used is entered
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from itertools import compress
from typing import Any, Final, NamedTuple

from deferred_sessions.exceptions import RecordCorruptError
from deferred_sessions.policy import Policy

FORMAT: Final = 4
SHORT: Final = FORMAT | 0x80  # what begins a clean record

CHANGED: Final = 1  # PostgreSQL does not have this payload (or this deletion)
TOUCHED: Final = 2  # PostgreSQL has an older expiry
TOMBSTONE: Final = 4  # a remembered deletion; the payload is empty
RECOVERED: Final = 8  # from the journal; nobody has asked yet whether PostgreSQL has a later one
SHUT: Final = 16  # on its way to another node: saves wait until it has left
DIRTY: Final = CHANGED | TOUCHED
CLOSED: Final = TOMBSTONE | SHUT  # what no save may change

_HEADER: Final = struct.Struct("<BHBIIQQQdddddddd")
_SIZE: Final = _HEADER.size
_SHORTS: Final = [struct.Struct("<BBBBII" + "d" * (5 - same.bit_count())) for same in range(8)]
_SAME_AT, _SAME = 3, 7  # place and bits of `same`
_ENTERED, _REST = 6, 8  # places among the fields of a short record
_MOST: Final = 2**32 - 1  # of a version or a fence in a short record
_LONGEST: Final = 255  # bytes of a user id there
_VERSION: Final = struct.Struct("<Q")
_TIME: Final = struct.Struct("<d")
_TIMES: Final = struct.Struct("<ddd")  # due, used, entered: the end of the header
_FLAGS_AT, _VERSION_AT = 3, 12  # places in the header
_TIMES_AT: Final = _SIZE - _TIMES.size
CHANGED_AT: Final = slice(_TIMES_AT - _TIME.size, _TIMES_AT)
"""Where `changed_at` stands in the bytes of a record, as a little-endian double."""
_NEVER: Final = bytes(_TIME.size)
_WRITTEN_AT: Final = slice(CHANGED_AT.start - _TIME.size, CHANGED_AT.start)


class SessionRecord(NamedTuple):
    """A session and its bookkeeping. Times are Unix seconds, 0.0 means "none".

    Immutable: a change makes a new record (see `lifecycle`).
    """

    key: str
    """The session key: 8 to 40 characters of `VALID_KEY`."""
    payload: bytes
    """The bytes `SESSION_SERIALIZER` made; not signed, not compressed."""
    user_id: str
    """`_auth_user_id` of the payload, or "" for a visitor who is not logged in."""
    flags: int
    """CHANGED | TOUCHED | TOMBSTONE | RECOVERED | SHUT."""
    updates: int
    """Saves that changed the payload since the last write to PostgreSQL."""
    requests: int
    """Requests served since the last write to PostgreSQL (only counted on demand)."""
    version: int
    """+1 with each save that changes the payload; 64 bits, never wraps."""
    stored_version: int
    """The last version PostgreSQL is known to hold; 0 = none."""
    fence: int
    """Grows when the right to change the session moves; older writers are refused."""
    created_at: float
    expires_at: float
    stored_expires_at: float
    """The expiry PostgreSQL is known to hold."""
    written_at: float
    """Last write to PostgreSQL; the creation, if there was none yet."""
    changed_at: float
    """First payload change that PostgreSQL does not have; 0.0 when clean."""
    due_at: float
    """From when on the flusher may write it; 0.0 when clean."""
    used_at: float
    """Last use, to about a minute; orders eviction."""
    entered_at: float
    """When the record came into memory. A key that is evicted or deleted and comes back
    may come back with a version it had before; this tells the two apart."""

    def __repr__(self) -> str:
        return f"<SessionRecord of version {self.version}>"  # key and payload are secrets

    @property
    def is_dirty(self) -> bool:
        """PostgreSQL lacks something this record has."""
        return bool(self.flags & DIRTY)

    @property
    def is_changed(self) -> bool:
        """PostgreSQL lacks this payload or this deletion, not only the expiry."""
        return bool(self.flags & CHANGED)

    @property
    def is_tombstone(self) -> bool:
        """The session was deleted; only the memory of that is left."""
        return bool(self.flags & TOMBSTONE)


class Head(NamedTuple):
    """The fixed part of a record's bytes: all that most decisions need."""

    layout: int
    user_length: int
    flags: int
    updates: int
    requests: int
    version: int
    stored_version: int
    fence: int
    created_at: float
    expires_at: float
    stored_expires_at: float
    written_at: float
    changed_at: float
    due_at: float
    used_at: float
    entered_at: float


def encode(record: SessionRecord) -> bytes:
    """Return the bytes of `record`, without its key."""
    user = record.user_id.encode()
    if not record[3] & DIRTY and (head := _short_head(record[3:], len(user))) is not None:
        return head + user + record.payload
    return _HEADER.pack(FORMAT, len(user), *record[3:]) + user + record.payload


def decode_head(data: memoryview | bytes) -> Head:
    """Return the fixed part of the record in `data`.

    Raises:
        RecordCorruptError: Too short, or of a layout this version does not know.
    """
    if len(data) >= _SIZE and data[0] == FORMAT:  # this is the hot path, therefore not _make
        return tuple.__new__(Head, _HEADER.unpack_from(data))
    return tuple.__new__(Head, _fields(data))


def decode(key: str, data: memoryview | bytes) -> SessionRecord:
    """Return the record in `data`; nothing in it refers to `data` any more.

    Raises:
        RecordCorruptError: Too short, or of a layout this version does not know.
    """
    return complete(key, _fields(data), data)


def complete(key: str, head: tuple[Any, ...], data: memoryview | bytes) -> SessionRecord:
    """Return the record in `data` whose head is known: a `Head`, or its fields.

    Raises:
        RecordCorruptError: Too short.
    """
    size = _SIZE if head[0] == FORMAT else _SHORTS[data[_SAME_AT] & _SAME].size
    start = size + head[1]
    if start > len(data):
        raise RecordCorruptError(f"A record of {len(data)} bytes is cut short.")
    user_id = str(data[size:start], "utf-8") if head[1] else ""
    return tuple.__new__(SessionRecord, (key, bytes(data[start:]), user_id, *head[2:]))


def _fields(data: memoryview | bytes) -> tuple[Any, ...]:
    layout = data[0] if data else FORMAT
    try:
        if layout == FORMAT:
            return _HEADER.unpack_from(data)
        if layout == SHORT:
            return _long(_SHORTS[data[_SAME_AT] & _SAME].unpack_from(data))
    except (struct.error, IndexError) as error:
        raise RecordCorruptError(f"A record of {len(data)} bytes is cut short.") from error
    raise RecordCorruptError(
        f"Record layout {layout} is unknown; this version reads layout {FORMAT}."
    )


def _long(fields: tuple[Any, ...]) -> tuple[Any, ...]:
    """Return the fields of a long head that say the same as these of a short one."""
    layout, user_length, flags, same, version, fence, entered, expires = fields[:_REST]
    created, written, used = _PLACES[same & _SAME]
    return (
        layout, user_length, flags, 0, 0, version, version, fence,
        fields[created], expires, expires, fields[written], 0.0, 0.0, fields[used], entered,
    )  # fmt: skip


def _places(same: int) -> tuple[int, int, int]:
    """Return where the creation, the last write and the last use are in a short record."""
    free = iter(range(_REST, _REST + 3))
    created = _ENTERED if same & 1 else next(free)
    written = created if same & 2 else next(free)
    used = _ENTERED if same & 4 else next(free)
    return created, written, used


_PLACES: Final = [_places(same) for same in range(8)]
_NAMED: Final = [tuple(not same & bit for bit in (1, 2, 4)) for same in range(8)]
"""Which of creation, last write and last use stand in a short record."""


def _short_head(fields: tuple[Any, ...], user_length: int) -> bytes | None:
    """Return a short head that says the same as these fields, from the flags on, or None."""
    (
        flags, updates, requests, version, stored_version, fence,
        created, expires, stored_expires, written, changed, due, used, entered,
    ) = fields  # fmt: skip
    if (updates, requests, changed, due) != (0, 0, 0.0, 0.0):
        return None
    if (version, expires) != (stored_version, stored_expires):
        return None
    return _shortened(user_length, flags, version, fence, created, expires, written, used, entered)


def _shortened(  # noqa: PLR0917 - positional, because the flusher does it for each row
    user_length: int,
    flags: int,
    version: int,
    fence: int,
    created: float,
    expires: float,
    written: float,
    used: float,
    entered: float,
) -> bytes | None:
    """Return the short head of a clean record, or None if something is too large for one."""
    if version > _MOST or fence > _MOST or user_length > _LONGEST:
        return None
    same = (created == entered) | (written == created) << 1 | (used == entered) << 2
    return _SHORTS[same].pack(
        *(SHORT, user_length, flags, same, version, fence, entered, expires),
        *compress((created, written, used), _NAMED[same]),
    )


def split_rests(records: Iterable[tuple[Head, bytes]]) -> tuple[list[str], list[bytes]]:
    """Return the user ids and the payloads that stand behind the heads of `records`."""
    user_ids: list[str] = []
    payloads: list[bytes] = []
    for head, data in records:
        size = _SIZE if head[0] == FORMAT else _size(data)
        start = size + head[1]
        user_ids.append(data[size:start].decode() if head[1] else "")
        payloads.append(data[start:])
    return user_ids, payloads


def encode_written(data: bytes, head: Head, now: float) -> bytes:
    """Return the bytes of a record after all that is in `data` was written at `now`.

    The same as decoding, `lifecycle.written` and encoding, at a third of the cost: the
    flusher does it for each row.
    """
    (
        _, user_length, flags, _, _, version, _, fence,
        created_at, expires_at, _, _, _, _, used_at, entered_at,
    ) = head  # fmt: skip
    flags &= SHUT
    written = _shortened(
        user_length, flags, version, fence, created_at, expires_at, now, used_at, entered_at
    )
    if written is None:
        written = _HEADER.pack(
            FORMAT, user_length, flags, 0, 0, version, version, fence,
            created_at, expires_at, expires_at, now, 0.0, 0.0, used_at, entered_at,
        )  # fmt: skip
    return written + data[_SIZE if head[0] == FORMAT else _size(data) :]


def encode_saved_again(  # noqa: PLR0917 - positional, because most saves do it
    data: bytes | memoryview,
    version: int,
    entered_at: float,
    payload: bytes,
    user_id: str,
    expires_at: float,
    used_after: float,
    now: float,
    policy: Policy,
) -> bytes | None:
    """Return the bytes of a changed record after one more change; None if more than that is new.

    The same as decoding, `lifecycle.saved` and encoding, at half of the cost, for a record that
    still is the one of `version` and `entered_at`, was used `used_after` some time, becomes due
    no earlier, and does not expire in PostgreSQL before it is due.
    """
    if len(data) < _SIZE or data[0] != FORMAT:
        return None
    (
        _, user_length, flags, updates, requests, known, stored_version, fence, created_at, _,
        stored_expires_at, written_at, changed_at, due_at, used_at, known_since,
    ) = _HEADER.unpack_from(data)  # fmt: skip
    start, user = _SIZE + user_length, user_id.encode()
    if (
        flags != DIRTY
        or known != version
        or known_since != entered_at
        or not changed_at
        or used_at <= used_after
        or start > len(data)
        or not now + policy.interval < stored_expires_at < expires_at
        or data[start:] == payload
        or (due_at > now and policy.has_reached_count(updates + 1, requests))
    ):
        return None
    head = _HEADER.pack(
        FORMAT, len(user), DIRTY, updates + 1, requests, version + 1, stored_version, fence,
        created_at, expires_at, stored_expires_at, written_at, changed_at, due_at, used_at,
        entered_at,
    )  # fmt: skip
    return b"".join((head, user, payload))


def _size(data: bytes) -> int:
    """Return the bytes of a head that can be read."""
    return _SIZE if data[0] == FORMAT else _SHORTS[data[_SAME_AT] & _SAME].size


def version_of(data: memoryview, start: int, stop: int) -> int:
    """Return the version of the dirty record between two places; a head takes five times as long.

    Raises:
        RecordCorruptError: Too short, or of a layout that a journal of this version has not.
    """
    if stop - start < _SIZE or data[start] != FORMAT:
        layout = data[start] if stop > start else 0
        raise RecordCorruptError(f"A record of layout {layout} and {stop - start} bytes.")
    version: int = _VERSION.unpack_from(data, start + _VERSION_AT)[0]
    return version


def is_tombstone(data: bytes) -> bool:
    """Tell whether the record in `data` is a remembered deletion."""
    return bool(data[_FLAGS_AT] & TOMBSTONE)


def encode_recovered(data: memoryview, now: float) -> bytes:
    """Return the bytes of a dirty record for a store that lost it.

    The same as decoding, `lifecycle.recovered` and encoding, at a fifth of the cost: a
    recovery does it for each session.
    """
    found = bytearray(data)
    is_deletion = found[_FLAGS_AT] & TOMBSTONE
    found[_FLAGS_AT] = found[_FLAGS_AT] & ~SHUT | CHANGED | (0 if is_deletion else RECOVERED)
    if found[CHANGED_AT] == _NEVER:
        found[CHANGED_AT] = found[_WRITTEN_AT]
    _TIMES.pack_into(found, _TIMES_AT, now - 1.0, now, now)
    return bytes(found)
