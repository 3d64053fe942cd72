"""The bytes of a journal's log: a header, then one frame for each record.

Used by `journal`. Invariant: what `frames` yields was written whole by the process that
wrote the log's header; the first byte that does not fit ends it.

    header   magic 8, format u16, generation u64, salt 16, identity 32, checksum u32; 128 bytes
    frame    start magic u32, frame length u32, data length u32, offset in the log u64,
             key length u8, key, record (see `record`), checksum u32, end magic u32;
             without a record: what came before of this key counts no more

The checksum of a frame begins with the salt, which is random for each log: so neither a frame
of an earlier use of the file nor one that a visitor put into a session can pass for one.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from hashlib import blake2b
from pathlib import Path
from typing import Final, NamedTuple
from zlib import crc32

from deferred_sessions.exceptions import JournalError

FORMAT: Final = 1
MAGIC: Final = b"DSESSLOG"
HEADER_SIZE: Final = 128
START: Final = 0x5E551075
END: Final = 0x0FF5E55D
_HEADER: Final = struct.Struct("<8sHQ16s32s")
_HEAD: Final = struct.Struct("<IIIQB")
_TAIL: Final = struct.Struct("<II")
_CHECKSUM: Final = struct.Struct("<I")
OVERHEAD: Final = _HEAD.size + _TAIL.size
_pack_head, _pack_tail = _HEAD.pack, _TAIL.pack  # each save pays for what is looked up


class Header(NamedTuple):
    """What a log says of itself."""

    generation: int
    """Grows with each log that is begun; the higher one is the later one."""
    salt: bytes
    identity: bytes
    """A digest of the project and database that it belongs to."""

    @classmethod
    def new(cls, generation: int, identity: str) -> Header:
        """Return the header of a log that is begun now."""
        return cls(generation, os.urandom(16), digest(identity))

    def encode(self) -> bytes:
        """Return its bytes."""
        data = _HEADER.pack(MAGIC, FORMAT, *self)
        return (data + _CHECKSUM.pack(crc32(data))).ljust(HEADER_SIZE, b"\0")

    @property
    def seed(self) -> int:
        """What the checksums of its frames begin with."""
        return crc32(self.salt)

    @classmethod
    def decode(cls, data: bytes, path: Path) -> Header | None:
        """Return the header in `data`; None if the log was reset, or its making was cut short.

        Raises:
            JournalError: It is something else, or of another format.
        """
        data = bytes(data[:HEADER_SIZE])
        if MAGIC.startswith(data.rstrip(b"\0")):
            return None
        if not data.startswith(MAGIC):
            raise JournalError(f"{path} is not a log of sessions.")
        _, version, *fields = _HEADER.unpack_from(data.ljust(HEADER_SIZE, b"\0"))
        if version != FORMAT:
            raise JournalError(f"{path} has format {version}; this version reads {FORMAT}.")
        if data[: _HEADER.size + 4] != cls(*fields).encode()[: _HEADER.size + 4]:
            return None
        return cls(*fields)


def digest(identity: str) -> bytes:
    """Return what stands for a project and database in a header."""
    return blake2b(identity.encode(), digest_size=32).digest()


def encode(name: bytes, data: bytes, offset: int, seed: int) -> bytes:
    """Return the frame of a record that begins at `offset`."""
    length = len(name) + len(data)
    body = _pack_head(START, OVERHEAD + length, length, offset, len(name)) + name + data
    return body + _pack_tail(crc32(body, seed), END)


def is_frame(data: bytes) -> bool:
    """Tell whether `data` looks like the beginning of a frame."""
    return data[:4] == START.to_bytes(4, "little")


def frames(log: memoryview, seed: int) -> Iterator[tuple[bytes, int, int]]:
    """Yield the records of a log, up to the first frame that is not whole.

    Of each: its name, and where its data begins and ends. Places, not records: a recovery
    looks at a million of them.
    """
    position, limit = HEADER_SIZE, len(log)
    head, tail = _HEAD.unpack_from, _TAIL.unpack_from
    while position + OVERHEAD <= limit:
        start, size, length, offset, name_length = head(log, position)
        end = position + size
        if (
            start != START
            or offset != position
            or size != OVERHEAD + length
            or end > limit
            or name_length > length
        ):
            return
        stop = end - _TAIL.size
        checksum, last = tail(log, stop)
        if last != END or crc32(log[position:stop], seed) != checksum:
            return
        begin = position + _HEAD.size + name_length
        yield bytes(log[position + _HEAD.size : begin]), begin, stop
        position = end
