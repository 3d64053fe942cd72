r"""One session as the tiers move it, and its byte layout.

Every tier and the flusher pass `SessionRecord` around; this is the only module that
knows how one becomes bytes. Invariant: `decode(key, encode(record)) == record`.

Layout, little-endian, 100 bytes before the variable part (`FORMAT` 2):

    format    u8      of this layout, so that a later release can read older records
    user_len  u16     bytes of the user id
    flags     u8      CHANGED, TOUCHED, TOMBSTONE
    updates   u32     \ since the last write
    requests  u32     / to PostgreSQL
    version, stored_version, fence                                    u64 each
    created, expires, stored_expires, written, changed, due, used, entered  f64 each
    user id   UTF-8
    payload   what SESSION_SERIALIZER made, to the end
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from typing import Any, Final, NamedTuple

from deferred_sessions.exceptions import RecordCorruptError

FORMAT: Final = 2

CHANGED: Final = 1  # PostgreSQL does not have this payload (or this deletion)
TOUCHED: Final = 2  # PostgreSQL has an older expiry
TOMBSTONE: Final = 4  # a remembered deletion; the payload is empty
RECOVERED: Final = 8  # from the journal; nobody has asked yet whether PostgreSQL has a later one
DIRTY: Final = CHANGED | TOUCHED

_HEADER: Final = struct.Struct("<BHBIIQQQdddddddd")
_SIZE: Final = _HEADER.size
_VERSION: Final = struct.Struct("<Q")
_TIME: Final = struct.Struct("<d")
_TIMES: Final = struct.Struct("<ddd")  # due, used, entered: the end of the header
_FLAGS_AT, _VERSION_AT, _EXPIRES_AT = 3, 12, 44  # places in the header
_TIMES_AT: Final = _SIZE - _TIMES.size
CHANGED_AT: Final = slice(_TIMES_AT - _TIME.size, _TIMES_AT)
"""Where `changed_at` stands in the bytes of a record, as a little-endian double."""


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
    """CHANGED | TOUCHED | TOMBSTONE."""
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
    return _HEADER.pack(FORMAT, len(user), *record[3:]) + user + record.payload


def decode_head(data: memoryview | bytes) -> Head:
    """Return the fixed part of the record in `data`.

    Raises:
        RecordCorruptError: Too short, or of a layout this version does not know.
    """
    return tuple.__new__(Head, _fields(data))  # not _make: this is the hot path


def decode(key: str, data: memoryview | bytes) -> SessionRecord:
    """Return the record in `data`; nothing in it refers to `data` any more.

    Raises:
        RecordCorruptError: Too short, or of a layout this version does not know.
    """
    fields = _fields(data)
    start = _SIZE + fields[1]
    if start > len(data):
        raise RecordCorruptError(f"A record of {len(data)} bytes is cut short.")
    user_id = str(data[_SIZE:start], "utf-8") if fields[1] else ""
    return tuple.__new__(SessionRecord, (key, bytes(data[start:]), user_id, *fields[2:]))


def _fields(data: memoryview | bytes) -> tuple[Any, ...]:
    try:
        fields = _HEADER.unpack_from(data)
    except struct.error as error:
        raise RecordCorruptError(f"A record of {len(data)} bytes is cut short.") from error
    if fields[0] != FORMAT:
        raise RecordCorruptError(
            f"Record layout {fields[0]} is unknown; this version reads layout {FORMAT}."
        )
    return fields


def split_rests(records: Iterable[tuple[Head, bytes]]) -> tuple[list[str], list[bytes]]:
    """Return the user ids and the payloads that stand behind the heads of `records`."""
    user_ids: list[str] = []
    payloads: list[bytes] = []
    for head, data in records:
        start = _SIZE + head[1]
        user_ids.append(data[_SIZE:start].decode() if head[1] else "")
        payloads.append(data[start:])
    return user_ids, payloads


def encode_written(data: bytes, head: Head, now: float) -> bytes:
    """Return the bytes of a record after all that is in `data` was written at `now`.

    The same as decoding, `lifecycle.written` and encoding, at a third of the cost: the
    flusher does it for each row.
    """
    (
        layout, user_length, _, _, _, version, _, fence,
        created_at, expires_at, _, _, _, _, used_at, entered_at,
    ) = head  # fmt: skip
    written = _HEADER.pack(
        layout, user_length, 0, 0, 0, version, version, fence,
        created_at, expires_at, expires_at, now, 0.0, 0.0, used_at, entered_at,
    )  # fmt: skip
    return written + data[_SIZE:]


def version_of(data: memoryview, start: int, stop: int) -> int:
    """Return the version of the record between two places, at a fifth of the cost of its head.

    Raises:
        RecordCorruptError: Too short, or of a layout this version does not know.
    """
    if stop - start < _SIZE or data[start] != FORMAT:
        _fields(data[start:stop])
    version: int = _VERSION.unpack_from(data, start + _VERSION_AT)[0]
    return version


def is_tombstone(data: bytes) -> bool:
    """Tell whether the record in `data` is a remembered deletion."""
    return bool(data[_FLAGS_AT] & TOMBSTONE)


def encode_recovered(data: memoryview, now: float) -> bytes | None:
    """Return the bytes of a record of the journal for a store that lost it; None if expired.

    The same as decoding, `lifecycle.recovered` and encoding, at a fifth of the cost: a
    recovery does it for each session.
    """
    flags = data[_FLAGS_AT]
    if flags & TOMBSTONE:
        flags |= CHANGED
    elif _TIME.unpack_from(data, _EXPIRES_AT)[0] > now:
        flags |= CHANGED | RECOVERED
    else:
        return None
    found = bytearray(data)
    found[_FLAGS_AT] = flags
    if not any(found[CHANGED_AT]):
        found[CHANGED_AT] = _TIME.pack(now)
    _TIMES.pack_into(found, _TIMES_AT, now - 1.0, now, now)
    return bytes(found)
