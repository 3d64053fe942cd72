"""The journal: two logs on disk, from which the host store is rebuilt after a host crash.

Called by `tables` for each record that is put (inside the write transaction, so the order in
the log is that of the commits), by `recovery`, and by `journal_keeper` for sync, swap and
reset. Invariant: whatever the active log was told up to its synced position is on disk;
and a log is reset only when PostgreSQL, or the other log, has all that is in it.

One log is active, the other rests: it is retired (what is in it is not all written yet) or
reset to nothing. Where things stand is kept in a small file in the store's directory, shared
by all processes; each word is written by itself, in an order that is right at any instant. The
logs belong to one store: it alone knows their seeds, and its processes hold a lock beside them.
"""

from __future__ import annotations

import mmap
import os
import threading
import time
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Final

from deferred_sessions.exceptions import JournalError, StoreFullError
from deferred_sessions.memory import logs
from deferred_sessions.memory.directory import make_private
from deferred_sessions.memory.locks import Relay
from deferred_sessions.memory.log_file import HEADER_SIZE, Header, encode
from deferred_sessions.memory.logs import LOGS, Descriptor, Logs
from deferred_sessions.memory.ownership import Ownership

STATE_FILE: Final = "journal"
STATE_SIZE: Final = 4096
SLOW: Final = 1000  # microseconds of a sync from which on it pays to wait for company
COMPANY: Final = 0.3  # of the time of a sync: how long
LONGEST: Final = 0.02  # seconds: at the most
GROWTH: Final = 4  # times its size that a log may have while nothing can be flushed
SMALL, RESERVE = 128, 1 << 20  # bytes of a record, and room for many such ones
FULL: Final = (
    "The journal is full of changes that PostgreSQL does not have. Is it away? Otherwise raise "
    "DEFERRED_SESSIONS['JOURNAL_SIZE']."
)
# Words of the state: generation; positions and synced positions of both logs; times in µs;
# how many syncs that savers wait for were begun, which was done last, its µs, and its bytes;
# the seeds of both logs.
_GENERATION, _POSITION, _SYNCED, _SYNCED_AT, _SWAPPED_AT = 0, 1, 3, 5, 6
_TURN, _DONE, _TOOK, _GROUP, _SEED = 7, 8, 9, 10, 11
_BLOCK: Final = 12  # bits of a place in a block of the disk, or of a page of memory
_OFFSET: Final = 40  # bits of a place in a log; those of its generation are above


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
        self._patience = 2 * sync_interval + 1.0
        self._fine_from = self._fine_until = 0.0
        """Between these times a sync was near enough, as far as this process knows."""
        self._state = store / STATE_FILE
        self._words: memoryview | None = None
        self._logs: Logs | None = None
        self._relay = Relay(store / "journal-sync.lock")
        self._syncing = threading.Lock()
        self.ownership = Ownership(directory)
        """Whose the logs are."""

    # Whose it is

    def is_ours(self) -> bool:
        """Tell whether the logs are those of this store; otherwise it does not know what they say.

        Raises:
            OSError: They cannot be read.
        """
        words, generation, header = self._words or self._map(), -1, None
        while words[_GENERATION] != generation:  # or a swap came in between
            generation = words[_GENERATION]
            path = self.directory / LOGS[generation & 1]
            try:
                with path.open("rb") as file:
                    header = Header.decode(file.read(HEADER_SIZE), path)
            except (FileNotFoundError, JournalError):
                header = None
        known = generation, words[_SEED + (generation & 1)]
        return header is not None and (header.generation, header.seed) == known

    # Within a write transaction of the host store

    def append(self, name: bytes, data: bytes) -> None:
        """Write a record to the active log; on disk with the next sync.

        Without data it says that PostgreSQL has all that the logs have of this session.

        If the transaction fails, the next record is written over it, or follows it: it is
        a change that nobody was told of.

        Raises:
            StoreFullError: The log is full, or its disk, or it cannot be opened. Nothing may be
                committed.
        """
        words = self._words or self._map()
        generation = words[_GENERATION]
        opened = self._logs
        if opened is None or opened[0] != generation:
            try:
                opened = self._open(generation)
            except JournalError as error:
                raise StoreFullError(str(error)) from error
        place = _POSITION + (generation & 1)
        position = words[place]
        frame = encode(name, data, position, opened[1])
        end = position + len(frame)
        if end > GROWTH * self._size:
            # A deletion is small, and must not fail; it does no harm if what says nothing does.
            reserve = 0 if len(data) > SMALL else RESERVE if data else RESERVE // 2
            if end > GROWTH * self._size + reserve:
                raise StoreFullError(FULL)
        if position - 1 >> _BLOCK != end - 1 >> _BLOCK:
            # A block that is begun is written to its end: else the kernel, if it has let go of
            # the page, reads it first, and all savers of the host wait for the disk.
            frame += bytes(-end & (1 << _BLOCK) - 1)
        try:
            written = os.pwrite(opened[3], frame, position)
        except OSError as error:
            raise StoreFullError(f"The journal cannot be written: {error.strerror}.") from error
        if written < end - position:
            raise StoreFullError("The disk of the journal is full.")
        words[place] = end

    def swap(self, header: Header, now: float) -> None:
        """Retire the active log and go on in the other, which `prepare` has made ready.

        Nothing is done if the logs were begun anew meanwhile.
        """
        words = self._words or self._map()
        generation = words[_GENERATION]
        other = (generation + 1) & 1
        if header.generation != generation + 1:
            return
        self._sync_to(words, generation, words[_POSITION + (generation & 1)])
        words[_SYNCED + other] = _stamp(generation + 1, HEADER_SIZE)
        words[_POSITION + other] = HEADER_SIZE
        words[_SEED + other] = header.seed
        words[_SWAPPED_AT] = int(now * 1e6)
        words[_GENERATION] = generation + 1

    def reset(self, generation: int) -> None:
        """Give the space of the log before this generation back, if it is still the active one."""
        words = self._words or self._map()
        if words[_GENERATION] != generation:
            return
        opened = self._open(generation)
        os.ftruncate(opened.resting, 0)
        words[_SYNCED + ((generation + 1) & 1)] = 0
        words[_POSITION + ((generation + 1) & 1)] = 0

    # At any time

    def generation(self) -> int:
        """Return the number of the active log; it grows by one with each swap."""
        return (self._words or self._map())[_GENERATION]

    def position(self) -> tuple[int, int]:
        """Return where the next record goes: the log's generation, and its offset."""
        generation = self.generation()
        return generation, (self._words or self._map())[_POSITION + (generation & 1)]

    def sync(self, now: float) -> None:
        """Have on disk what the active log was told until now.

        Raises:
            JournalError: The disk failed. Nothing counts as synced; the next sync tries again.
        """
        words = self._words or self._map()
        generation = words[_GENERATION]
        self._sync_to(words, generation, words[_POSITION + (generation & 1)])
        words[_SYNCED_AT] = int(now * 1e6)
        self._fine_from = self._fine_until = 0.0

    def wait(self, now: float) -> None:
        """Return when all that this process was told is on disk; savers share the syncs.

        The first who comes while a sync is under way leads the next turn, which covers all
        who come before it begins; they sleep until it ends.
        """
        words, relay = self._words or self._map(), self._relay
        generation, position = self.position()
        while words[_GENERATION] == generation and _synced(words, generation) < position:
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
            time.sleep(min(words[_TOOK] / 1e6 * COMPANY, LONGEST))

    def is_behind(self, now: float) -> bool:
        """Tell whether nobody has synced for so long that the saver has to.

        So it seems, too, if the clock was set back.
        """
        if self._fine_from <= now <= self._fine_until:  # each save asks: a third of the time
            return False
        synced_at = (self._words or self._map())[_SYNCED_AT] / 1e6
        self._fine_from, self._fine_until = synced_at - self._patience, synced_at + self._patience
        return not self._fine_from <= now <= self._fine_until

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
        return (self._words or self._map())[_SWAPPED_AT] / 1e6

    def retired(self) -> int:
        """Return the bytes in the log that rests; 0 if it was reset."""
        words = self._words or self._map()
        return words[_POSITION + ((words[_GENERATION] + 1) & 1)]

    def unsynced(self) -> int:
        """Return the bytes that a power loss would take now."""
        generation, position = self.position()
        return max(0, position - _synced(self._words or self._map(), generation))

    # Housekeeping, by one process at a time

    def prepare(self) -> Header:
        """Make the resting log ready for `swap`, on disk: its space, and its header."""
        generation = self.generation()
        header = Header.new(generation + 1, self.identity)
        opened = self._open(generation)
        self._begin(opened.resting, header)
        return header

    def restart(self, generation: int, records: Iterable[tuple[bytes, bytes]], now: float) -> None:
        """Begin anew with a log of these records alone, durable on return.

        For recovery: the old logs are good until the new one is in place.
        """
        make_private(self.directory)
        words = self._words or self._map()
        generation = max(generation, words[_GENERATION] + 1)
        path, other = (self.directory / LOGS[(generation + n) & 1] for n in (0, 1))
        new = self.directory / "log.new"
        new.unlink(missing_ok=True)
        header = Header.new(generation, self.identity)
        file = Descriptor(new)
        try:
            position = self._begin(file.number, header, records)
        except BaseException:
            new.unlink()
            raise
        new.rename(path)
        logs.sync_directory(self.directory)
        # Whoever is killed here leaves processes of this store that go on in the other log.
        active = generation & 1
        words[_SEED + active] = header.seed
        words[_POSITION + active] = position
        words[_SYNCED + active] = _stamp(generation, position)
        words[_SWAPPED_AT] = words[_SYNCED_AT] = int(now * 1e6)
        words[_GENERATION] = generation
        words[_POSITION + 1 - active] = words[_SYNCED + 1 - active] = 0
        other.unlink(missing_ok=True)

    def let_go(self) -> None:
        """Close what is open, and keep the logs; the next use opens it again."""
        self._words = self._logs = None
        self._syncing = threading.Lock()  # a fork may have inherited one that was held

    def close(self) -> None:
        """Close what is open, and leave the logs to others; the next use opens it again."""
        self._words = self._logs = None
        self.ownership.drop()

    # Inside

    def _sync_to(self, words: memoryview, generation: int, position: int) -> None:
        """Have on disk what the log of this generation was told up to `position`."""
        if position <= _synced(words, generation):
            return
        with self._syncing:  # of two threads, the kernel would tell one that the disk failed
            self._sync_alone(words, generation, position)

    def _sync_alone(self, words: memoryview, generation: int, position: int) -> None:
        try:
            opened = self._open(generation)
        except JournalError:
            if words[_GENERATION] == generation:
                raise
            return  # swapped in this moment, and a swap syncs
        try:
            logs.sync(opened.active, partial(self._at_stake, words, generation))
        except OSError as error:
            raise JournalError(
                f"The journal in {self.directory} cannot be synced: {error.strerror}. What was "
                "saved is in memory; it is not safe from a crash of the host."
            ) from error
        # Should two swaps have come in between, it says nothing of the log that is there now.
        if position > _synced(words, generation):
            words[_SYNCED + (generation & 1)] = _stamp(generation, position)

    def _at_stake(self, words: memoryview, generation: int) -> tuple[int, int]:
        """Return from where to where a log is not on disk; nowhere if it rests by now."""
        start, stop = _synced(words, generation), words[_POSITION + (generation & 1)]
        return (start, stop) if words[_GENERATION] == generation else (0, 0)

    def _begin(
        self, descriptor: int, header: Header, records: Iterable[tuple[bytes, bytes]] = ()
    ) -> int:
        try:
            return logs.begin(descriptor, header, self._size, records)
        except OSError as error:
            raise JournalError(
                f"A log of {self._size >> 20} MiB cannot be made in {self.directory}: "
                f"{error.strerror}. Make room, or see DEFERRED_SESSIONS['JOURNAL_DIRECTORY']."
            ) from error

    def _open(self, generation: int) -> Logs:
        """Return both logs of a generation; opened, unless they were."""
        opened = self._logs
        if opened is not None and opened.generation == generation:
            return opened
        opened = Logs.open(self.directory, generation)
        if opened.seed != (self._words or self._map())[_SEED + (generation & 1)]:
            raise JournalError(
                f"{self.directory / LOGS[generation & 1]} was exchanged while it was in use. "
                "Restart the site: what memory has is written down then."
            )
        self._logs = opened
        return opened

    def _map(self) -> memoryview:
        file = Descriptor(self._state)
        os.posix_fallocate(file.number, 0, STATE_SIZE)
        self._words = words = memoryview(mmap.mmap(file.number, STATE_SIZE)).cast("Q")
        self._fine_from = self._fine_until = 0.0
        return words


def _stamp(generation: int, position: int) -> int:
    """Return a place in the log of a generation as one word."""
    return (generation & 0xFFFFFF) << _OFFSET | position


def _synced(words: memoryview, generation: int) -> int:
    """Return up to where the log of a generation is on disk."""
    stamp: int = words[_SYNCED + (generation & 1)]
    return stamp - _stamp(generation, 0) if stamp >> _OFFSET == generation & 0xFFFFFF else 0
