"""The journal: two logs on disk, from which the host store is rebuilt after a host crash.

Called by `tables` for each record that is put (inside the write transaction, so the order in
the log is that of the commits), by `recovery`, and by `journal_keeper` for sync, swap and
reset. Invariant: whatever the active log was told up to its synced position is on disk;
and a log is reset only when PostgreSQL, or the other log, has all that is in it.

One log is active, the other rests: it is retired (what is in it is not all written yet) or
reset to nothing. Where things stand is kept in a small file in the store's directory, shared
by all processes; each word is written by itself, in an order that is right at any instant.
"""

from __future__ import annotations

import mmap
import os
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Final

from deferred_sessions.exceptions import JournalError, StoreFullError
from deferred_sessions.memory import log_file
from deferred_sessions.memory.directory import make_private
from deferred_sessions.memory.locks import Relay
from deferred_sessions.memory.log_file import HEADER_SIZE, Header

STATE_FILE: Final = "journal"
STATE_SIZE: Final = 4096
LOGS: Final = ("log.0", "log.1")
SLOW: Final = 1000  # microseconds of a sync from which on it pays to wait for company
COMPANY: Final = 0.3  # of the time of a sync: how long
ZEROS: Final = bytes(1 << 20)
GROWTH: Final = 4  # times its size that a log may have while nothing can be flushed
SMALL, RESERVE = 128, 1 << 20  # bytes of a record, and room for many such ones
FULL: Final = (
    "The journal is full of changes that PostgreSQL does not have. Is it away? Otherwise raise "
    "DEFERRED_SESSIONS['JOURNAL_SIZE']."
)
# Words of the state: generation; positions and synced positions of both logs; times in µs;
# how many syncs that savers wait for were begun, which was done last, its µs, and its bytes.
_GENERATION, _POSITION, _SYNCED, _SYNCED_AT, _SWAPPED_AT = 0, 1, 3, 5, 6
_TURN, _DONE, _TOOK, _GROUP = 7, 8, 9, 10


class Journal:
    """Both logs; each process opens them with its first use."""

    def __init__(
        self, directory: Path, *, store: Path, size: int, sync_interval: float, identity: str
    ) -> None:
        self.directory = directory
        self.identity = identity
        self.sync_interval = sync_interval
        """Seconds that may be lost; 0: a save returns when it is on disk."""
        self._size = size
        self._state = store / STATE_FILE
        self._words: memoryview | None = None
        self._opened = -1  # the generation whose files are open
        self._seed = 0
        self._descriptors = [-1, -1]
        self._relay = Relay(store / "journal-sync.lock")

    # Within a write transaction of the host store

    def append(self, name: bytes, data: bytes) -> None:
        """Write a record to the active log; on disk with the next sync.

        If the transaction fails, the next record is written over it, or follows it: it is
        a change that nobody was told of.

        Raises:
            StoreFullError: The log is full, or its disk. Nothing may be committed.
        """
        words = self._words or self._map()
        generation = words[_GENERATION]
        if generation != self._opened:
            self._open(generation)
        active = generation & 1
        position = words[_POSITION + active]
        frame = log_file.encode(name, data, position, self._seed)
        # A deletion is small, and must not fail.
        reserve = 0 if len(data) > SMALL else RESERVE
        if position + len(frame) > GROWTH * self._size + reserve:
            raise StoreFullError(FULL)
        try:
            written = os.pwrite(self._descriptors[active], frame, position)
        except OSError as error:
            raise StoreFullError(f"The journal cannot be written: {error.strerror}.") from error
        if written < len(frame):
            raise StoreFullError("The disk of the journal is full.")
        words[_POSITION + active] = position + len(frame)

    def swap(self, now: float) -> None:
        """Retire the active log and go on in the other, which `prepare` has made ready."""
        words = self._map_words()
        generation = words[_GENERATION]
        self._open(generation)
        active, other = generation & 1, (generation + 1) & 1
        synced, position = words[_SYNCED + active], words[_POSITION + active]
        self._sync_file(self._descriptors[active], synced, position)
        words[_SYNCED + other] = HEADER_SIZE
        words[_POSITION + other] = HEADER_SIZE
        words[_SWAPPED_AT] = int(now * 1e6)
        words[_GENERATION] = generation + 1

    # At any time

    def generation(self) -> int:
        """Return the number of the active log; it grows by one with each swap."""
        return (self._words or self._map())[_GENERATION]

    def position(self) -> tuple[int, int]:
        """Return where the next record goes: the log's generation, and its offset."""
        generation = self.generation()
        return generation, self._map_words()[_POSITION + (generation & 1)]

    def sync(self, now: float) -> None:
        """Have on disk what the active log was told until now.

        Raises:
            JournalError: The disk failed. Nothing counts as synced; the next sync tries again.
        """
        words = self._words or self._map()
        generation = words[_GENERATION]
        active = generation & 1
        position = words[_POSITION + active]
        if position > words[_SYNCED + active]:
            if generation != self._opened:
                self._open(generation)
            self._sync_file(self._descriptors[active], words[_SYNCED + active], position)
            if words[_GENERATION] == generation:  # a swap has synced by itself
                words[_SYNCED + active] = max(position, words[_SYNCED + active])
        words[_SYNCED_AT] = int(now * 1e6)

    def wait(self, now: float) -> None:
        """Return when all that this process was told is on disk; savers share the syncs.

        The first who comes while a sync is under way leads the next turn, which covers all
        who come before it begins; they sleep until it ends.
        """
        words, relay = self._words or self._map(), self._relay
        generation, position = self.position()
        while words[_GENERATION] == generation and words[_SYNCED + (generation & 1)] < position:
            turn = words[_TURN]
            if not relay.lead(turn):
                relay.follow(turn)
                continue
            try:
                if words[_DONE] != turn:
                    relay.follow(turn - 1)
                if words[_TURN] == turn:
                    self._await_company(words)
                    words[_TURN] = turn + 1  # who comes from here on may not be covered
                    started, words[_GROUP] = time.perf_counter(), self.unsynced()
                    self.sync(now)
                    words[_TOOK] = int((time.perf_counter() - started) * 1e6)
                    words[_DONE] = turn + 1
            finally:
                relay.done(turn)

    def _await_company(self, words: memoryview) -> None:
        """Give those whom the last sync covered time to come back, where syncs take long.

        Otherwise savers fall apart into two groups, each of which waits for the other's sync.
        """
        if words[_TOOK] > SLOW and self.unsynced() < words[_GROUP] / 2:
            time.sleep(words[_TOOK] / 1e6 * COMPANY)

    def is_behind(self, now: float) -> bool:
        """Tell whether nobody has synced for so long that the saver has to."""
        words = self._map_words()
        return now - words[_SYNCED_AT] / 1e6 > 2 * self.sync_interval + 1.0

    def size(self) -> int:
        """Return the bytes in the active log."""
        return self.position()[1]

    def is_empty(self) -> bool:
        """Tell whether nothing was written since the last swap."""
        return self.size() <= HEADER_SIZE

    def is_large(self) -> bool:
        """Tell whether it is time to swap for its size."""
        return self.size() >= self._size

    def swapped_at(self) -> float:
        """Return when the active log was begun."""
        return self._map_words()[_SWAPPED_AT] / 1e6

    def retired(self) -> int:
        """Return the bytes in the log that rests; 0 if it was reset."""
        words = self._map_words()
        return words[_POSITION + ((words[_GENERATION] + 1) & 1)]

    def unsynced(self) -> int:
        """Return the bytes that a power loss would take now."""
        words = self._map_words()
        generation, position = self.position()
        return max(0, position - words[_SYNCED + (generation & 1)])

    # Housekeeping, by one process at a time

    def prepare(self) -> None:
        """Make the resting log ready for `swap`: its space, and its header, on disk."""
        generation = self.position()[0] + 1
        self._open(generation - 1)
        self._begin(self._descriptors[generation & 1], generation)

    def reset(self) -> None:
        """Give the space of the retired log back."""
        words = self._map_words()
        generation = words[_GENERATION]
        self._open(generation)
        resting = (generation + 1) & 1
        os.ftruncate(self._descriptors[resting], 0)
        words[_SYNCED + resting] = 0
        words[_POSITION + resting] = 0

    def restart(self, generation: int, records: Iterable[tuple[bytes, bytes]], now: float) -> None:
        """Begin anew with a log of these records alone, durable on return.

        For recovery: the old logs are good until the new one is in place.
        """
        make_private(self.directory)
        path, other = (self.directory / LOGS[(generation + n) & 1] for n in (0, 1))
        seed = self.directory / "log.new"
        seed.unlink(missing_ok=True)
        descriptor = self._descriptor(seed)
        try:
            position = self._begin(descriptor, generation, records)
        finally:
            os.close(descriptor)
        seed.rename(path)
        other.unlink(missing_ok=True)
        self._sync_directory()
        self.close()
        words = self._map()
        active = generation & 1
        words[_POSITION + active] = words[_SYNCED + active] = position
        words[_POSITION + 1 - active] = words[_SYNCED + 1 - active] = 0
        words[_SWAPPED_AT] = words[_SYNCED_AT] = int(now * 1e6)
        words[_GENERATION] = generation

    def close(self) -> None:
        """Close what is open; the next use opens it again."""
        if self._words is not None:
            self._words.release()
            self._words = None
        for index, descriptor in enumerate(self._descriptors):
            if descriptor >= 0:
                os.close(descriptor)
                self._descriptors[index] = -1
        self._opened = -1

    # Inside

    def _sync_file(self, descriptor: int, synced: int, position: int) -> None:
        try:
            os.fdatasync(descriptor)
        except OSError as error:
            # The kernel reports pages that it could not write once, and then takes them for
            # written: they are written anew, so that the next sync means them.
            os.pwrite(descriptor, os.pread(descriptor, position - synced, synced), synced)
            raise JournalError(
                f"The journal in {self.directory} cannot be synced: {error.strerror}. What was "
                "saved is in memory; it is not safe from a crash of the host."
            ) from error

    def _begin(
        self, descriptor: int, generation: int, records: Iterable[tuple[bytes, bytes]] = ()
    ) -> int:
        """Give a log its header, its first records and its space, on disk; return their end."""
        header = Header.new(generation, self.identity)
        try:
            position = self._fill(descriptor, header.seed, records)
            # Zeros, not `fallocate`: the first write to blocks that were only reserved makes
            # each `fdatasync` one of the file's metadata, too, at several times its cost.
            for offset in range(position, self._size, len(ZEROS)):
                os.pwrite(descriptor, ZEROS[: self._size - offset], offset)
            os.pwrite(descriptor, header.encode(), 0)
            os.fsync(descriptor)
        except OSError as error:
            raise JournalError(
                f"A log of {self._size >> 20} MiB cannot be made in {self.directory}: "
                f"{error.strerror}. Make room, or see DEFERRED_SESSIONS['JOURNAL_DIRECTORY']."
            ) from error
        return position

    @staticmethod
    def _fill(descriptor: int, seed: int, records: Iterable[tuple[bytes, bytes]]) -> int:
        """Write records from the beginning, many at once; return where they end."""
        position, start, frames = HEADER_SIZE, HEADER_SIZE, []
        for name, data in records:
            frames.append(log_file.encode(name, data, position, seed))
            position += len(frames[-1])
            if position - start >= len(ZEROS):
                _write(descriptor, b"".join(frames), start)
                start, frames = position, []
        _write(descriptor, b"".join(frames), start)
        return position

    def _open(self, generation: int) -> None:
        """Open both logs, unless they are open since that generation."""
        if generation == self._opened:
            return
        for index, name in enumerate(LOGS):
            if self._descriptors[index] >= 0:
                os.close(self._descriptors[index])
            self._descriptors[index] = self._descriptor(self.directory / name)
        path = self.directory / LOGS[generation & 1]
        header = Header.decode(os.pread(self._descriptors[generation & 1], HEADER_SIZE, 0), path)
        if header is None or header.generation != generation:
            raise JournalError(f"{path} was exchanged while it was in use.")
        self._seed, self._opened = header.seed, generation

    def _descriptor(self, path: Path) -> int:
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        try:
            return os.open(path, flags, 0o600)
        except OSError as error:
            raise JournalError(f"{path} cannot be opened: {error.strerror}.") from error

    def _map_words(self) -> memoryview:
        return self._words or self._map()

    def _map(self) -> memoryview:
        descriptor = self._descriptor(self._state)
        try:
            os.posix_fallocate(descriptor, 0, STATE_SIZE)
            self._words = memoryview(mmap.mmap(descriptor, STATE_SIZE)).cast("Q")
        finally:
            os.close(descriptor)
        return self._words

    def _sync_directory(self) -> None:
        descriptor = os.open(self.directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _write(descriptor: int, data: bytes, offset: int) -> None:
    while data:
        written = os.pwrite(descriptor, data, offset)
        data, offset = data[written:], offset + written
