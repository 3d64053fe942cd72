"""The two logs of a journal as files: made, opened, synced.

Used by `journal`. Invariant: whoever has `Logs` may use their descriptors for as long as he has
them, whatever other threads do; the files are closed when the last one lets go.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Final, NamedTuple

from deferred_sessions.exceptions import JournalError
from deferred_sessions.memory import log_file
from deferred_sessions.memory.log_file import HEADER_SIZE, Header

LOGS: Final = ("log.0", "log.1")
BULK: Final = 1 << 20  # bytes of records that are written at once
ZEROS: Final = bytes(1 << 17)
"""What space is made of. The kernel keeps together in memory what was written at once, and ext4
looks at each block of that for each small write into it: with a MiB, a save takes 1 µs more."""


class Descriptor:
    """An open file, closed when nobody has it any more.

    Raises:
        JournalError: It cannot be opened.
    """

    __slots__ = ("number",)

    def __init__(self, path: Path, flags: int = os.O_RDWR | os.O_CREAT) -> None:
        self.number = -1
        try:
            self.number = os.open(path, flags | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        except OSError as error:
            raise JournalError(f"{path} cannot be opened: {error.strerror}.") from error

    @classmethod
    def of_lock(cls, path: Path) -> Descriptor:
        """Open a file that is only there to be locked; on a disk that is read-only, too."""
        return cls(path, os.O_RDONLY) if path.exists() else cls(path)

    def __del__(self, close=os.close) -> None:  # type: ignore[no-untyped-def]
        if self.number >= 0:
            close(self.number)


class Logs(NamedTuple):
    """Both logs as they are while one generation is active."""

    generation: int
    seed: int
    """What the checksums of the active log begin with, and no other log's; 0 if it is none."""
    files: tuple[Descriptor, Descriptor]
    active: int
    """The descriptor of the one that is written to."""
    resting: int
    """The descriptor of the other one."""

    @classmethod
    def open(cls, directory: Path, generation: int) -> Logs:
        """Open the files.

        Raises:
            JournalError: They cannot be opened, or the active one is no log.
        """
        files = (Descriptor(directory / LOGS[0]), Descriptor(directory / LOGS[1]))
        numbers = [file.number for file in files]
        active, resting = numbers[generation & 1], numbers[(generation + 1) & 1]
        path = directory / LOGS[generation & 1]
        header = Header.decode(os.pread(active, HEADER_SIZE, 0), path)
        return cls(generation, 0 if header is None else header.seed, files, active, resting)


def begin(
    descriptor: int, header: Header, size: int, records: Iterable[tuple[bytes, bytes]] = ()
) -> int:
    """Give a log its header, its first records and its space, on disk; return their end.

    Raises:
        OSError: There is no room; what was taken is given back.
    """
    try:
        position = _fill(descriptor, header.seed, records)
        # Zeros, not `fallocate`: the first write to blocks that were only reserved makes
        # each `fdatasync` one of the file's metadata, too, at several times its cost.
        for offset in range(position, size, len(ZEROS)):
            _write(descriptor, ZEROS[: size - offset], offset)
        _write(descriptor, header.encode(), 0)
        os.fsync(descriptor)
    except OSError:
        os.ftruncate(descriptor, 0)
        raise
    return position


def _fill(descriptor: int, seed: int, records: Iterable[tuple[bytes, bytes]]) -> int:
    """Write records from the beginning, many at once; return where they end."""
    position, start, frames = HEADER_SIZE, HEADER_SIZE, []
    for name, data in records:
        frames.append(log_file.encode(name, data, position, seed))
        position += len(frames[-1])
        if position - start >= BULK:
            _write(descriptor, b"".join(frames), start)
            start, frames = position, []
    _write(descriptor, b"".join(frames), start)
    return position


def _write(descriptor: int, data: bytes, offset: int) -> None:
    while data:
        written = os.pwrite(descriptor, data, offset)
        data, offset = data[written:], offset + written


def sync(descriptor: int, at_stake: Callable[[], tuple[int, int]]) -> None:
    """Have on disk what a log was told; `at_stake` says from where to where it may not be.

    Raises:
        OSError: The disk failed. The next sync tries again.
    """
    try:
        os.fdatasync(descriptor)
    except OSError:
        # The kernel reports pages that it could not write once, and then takes them for written,
        # also those that came meanwhile: they are written anew, so that the next sync means them.
        start, stop = at_stake()
        os.pwrite(descriptor, os.pread(descriptor, stop - start, start), start)
        raise


def sync_directory(path: Path) -> None:
    """Have on disk which files are in a directory."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def kept_text(path: Path, default: str) -> str:
    """Return the text of a small file; the first who asks puts `default` there.

    Raises:
        OSError: It can neither be read nor made.
    """
    if path.exists() and (text := path.read_text()):
        return text
    file = Descriptor(path)
    fcntl.flock(file.number, fcntl.LOCK_EX)
    if not os.fstat(file.number).st_size:
        os.pwrite(file.number, default.encode(), 0)
        os.fsync(file.number)
        sync_directory(path.parent)
    return path.read_text()
