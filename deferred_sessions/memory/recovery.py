"""Rebuilds the host store from the journal, after the host has lost its memory.

Called when a store is opened, under the lock that keeps other processes from opening it, and
by `recoversessions`. Invariant: killed anywhere and repeated, it ends in the same state; a
record of a log never takes the place of a later one.

    lock the node; both logs, in order -> the store and its indexes, all due at once;
    a new log of what is dirty; the old ones away; unlock. The flusher does the rest.

A store that was in use without its journal for a while, or with another one, gets a new log of
what is dirty, too.
"""

from __future__ import annotations

import logging
import mmap
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final, NamedTuple

import lmdb

from deferred_sessions.exceptions import JournalError, RecordCorruptError, StoreUnavailableError
from deferred_sessions.memory import log_file, restoring, tables
from deferred_sessions.memory.environment import Databases
from deferred_sessions.memory.journal import Journal
from deferred_sessions.memory.log_file import Header
from deferred_sessions.memory.logs import LOGS
from deferred_sessions.record import encode_recovered, version_of

logger = logging.getLogger(__name__)

NOTE: Final = b"journal"  # stands in a store that has all that its journal has, and says
READY, BEHIND = b"ready", b"behind"  # whether the journal has all that the store has
PART: Final = 5000  # records per transaction
INTERVAL: Final = 2.0  # seconds between two messages
TOO_SMALL: Final = (
    "The journal has {} sessions, more than the session store has room for. Raise "
    "DEFERRED_SESSIONS['STORE_SIZE'] and start again: nothing of the journal is lost."
)


class Findings(NamedTuple):
    """What the logs hold. The logs stay mapped as long as somebody has this."""

    newest: dict[bytes, int]
    """Where the last state of each session is, deletions too: see `_place`. With this, a
    recovery takes about 160 bytes of memory for each session, whatever its size."""
    logs: list[memoryview]
    frames: int
    unreadable: int
    """Records of a layout that this version does not read."""
    past_memory: int
    """Records that only say that PostgreSQL has all of a session."""
    generation: int
    """Of the latest log."""
    rejected: list[tuple[Path, str]]
    """Logs that are not ours, and why."""

    def data(self, name: bytes) -> memoryview:
        """Return the last state of a session, encoded."""
        place = self.newest[name]
        start = place >> 33
        return self.logs[place & 1][start : start + (place >> 1 & 0xFFFFFFFF)]


def _place(start: int, stop: int, log: int) -> int:
    """Return a place in a log as one number, which takes a sixth of the memory of three."""
    return start << 33 | (stop - start) << 1 | log


class Progress:
    """Says every now and then how far a long recovery is."""

    def __init__(self) -> None:
        self._said = time.monotonic()

    def say(self, text: str, *numbers: int) -> None:
        """Log `text` with `numbers`, unless that was done a moment ago."""
        if time.monotonic() - self._said > INTERVAL:
            self._said = time.monotonic()
            logger.warning(text, *numbers, extra={"action": "recovering"})


def read(journal: Journal) -> Findings:
    """Return what the logs hold, up to the first frame of each that is not whole."""
    rejected: list[tuple[Path, str]] = []
    headers = sorted(_logs(journal, rejected))
    logs = [_mapped(path) for _, path in headers]
    newest: dict[bytes, int] = {}
    frames = unreadable = past_memory = 0
    progress = Progress()
    for which, ((header, _), log) in enumerate(zip(headers, logs, strict=True)):
        for name, start, stop in log_file.frames(log, header.seed):
            frames += 1
            if not frames % PART:
                progress.say("Reading the journal: %d records so far.", frames)
            if start == stop:
                past_memory += 1
                newest.pop(name, None)
                continue
            try:
                version_of(log, start, stop)
            except RecordCorruptError:
                unreadable += 1
                continue
            # The last one, whatever its version: another node may have gone on from an older
            # one, and has given the session back.
            newest[name] = _place(start, stop, which)
    generation = headers[-1][0].generation if headers else 0
    return Findings(newest, logs, frames, unreadable, past_memory, generation, rejected)


def recover_if_needed(journal: Journal, dbs: Databases, now: float) -> None:
    """Recover unless this store has what the journal has; call it while holding `opening`.

    Raises:
        StoreUnavailableError: The journal holds more than the store has room for.
        JournalError: There is no room for a new log, or another store has the journal in use.
    """
    journal.ownership.take()
    with dbs.env.begin(dbs.notes) as txn:
        state = bytes(txn.get(NOTE, b""))
    # Without a note the store is new, though its directory may know the logs from before.
    if state and journal.is_ours():
        if state == BEHIND:  # the store has all that is in the logs, they miss some of what it has
            with dbs.env.begin(dbs.due) as txn:
                number = txn.stat(dbs.due)["entries"]
            with _room_for(number):
                _restart(journal, dbs, 0, now)
        return
    with journal.ownership.alone():
        _recover(journal, dbs, now)


def _recover(journal: Journal, dbs: Databases, now: float) -> None:
    started = time.monotonic()
    found = read(journal)
    _set_aside(journal, found, now)
    with _room_for(len(found.newest)):
        put(dbs, found, now)
        _restart(journal, dbs, found.generation + 1, now)
    if found.frames:
        logger.warning(
            "Recovered %d sessions from %d records of the journal in %.1f s; %d records could "
            "not be read, %d only said that PostgreSQL has a session.",
            len(found.newest),
            found.frames,
            time.monotonic() - started,
            found.unreadable,
            found.past_memory,
            extra={"action": "recovered", "count": len(found.newest)},
        )


@contextmanager
def _room_for(sessions: int) -> Iterator[None]:
    try:
        yield
    except lmdb.MapFullError as error:
        raise StoreUnavailableError(TOO_SMALL.format(sessions)) from error


def _restart(journal: Journal, dbs: Databases, generation: int, now: float) -> None:
    """Begin a new log with what is dirty; processes of this store may save meanwhile."""
    with dbs.env.begin(dbs.records, write=True) as txn:
        txn.put(NOTE, READY, db=dbs.notes)
        journal.restart(generation, _dirty(txn, dbs), now)


def forget(dbs: Databases) -> None:
    """Note that this store is in use without its journal, which misses what happens from now on."""
    with dbs.env.begin(dbs.notes) as txn:
        if txn.get(NOTE) != READY:
            return
    with dbs.env.begin(dbs.notes, write=True) as txn:
        txn.put(NOTE, BEHIND)


def _set_aside(journal: Journal, found: Findings, now: float) -> None:
    """Keep what is not ours, or is of a release that knows more, under other names."""
    for path, why in found.rejected:
        aside = path.with_name(f"{path.name}.rejected-{int(now)}")
        path.rename(aside)
        logger.error("%s It is left alone, as %s.", why, aside, extra={"action": "log_rejected"})
    if not found.unreadable:
        return
    for path in (journal.directory / name for name in LOGS):
        if not path.exists() or not path.stat().st_size:
            continue
        aside = path.with_name(f"{path.name}.unreadable-{path.stat().st_ino}")
        if not aside.exists():
            aside.hardlink_to(path)
            logger.error(
                "%d records of the journal are of another release; they stay in %s.",
                found.unreadable,
                aside,
                extra={"action": "log_unreadable"},
            )


def put(dbs: Databases, found: Findings, now: float) -> None:
    """Put records into the store, dirty and due, where it has nothing later."""
    names, progress = sorted(found.newest), Progress()
    for start in range(0, len(names), PART):
        part = [
            (name, encode_recovered(found.data(name), now)) for name in names[start : start + PART]
        ]
        with dbs.env.begin(dbs.records, write=True) as txn:
            restoring.restore(txn, dbs, part, now)
        progress.say("Recovering sessions: %d of %d.", start, len(names))


def _dirty(txn: lmdb.Transaction, dbs: Databases) -> Iterator[tuple[bytes, bytes]]:
    """Yield the dirty records of the store, as they are."""
    for name in tables.dirty_names(txn, dbs):
        yield name, bytes(txn.get(name, b""))


def _logs(journal: Journal, rejected: list[tuple[Path, str]]) -> Iterator[tuple[Header, Path]]:
    """Yield the logs that there are, with their headers."""
    for path in (journal.directory / name for name in LOGS):
        if not path.exists():
            continue
        with path.open("rb") as file:
            start = file.read(log_file.HEADER_SIZE)
            has_frames = log_file.is_frame(file.read(log_file.HEADER_SIZE))
        try:
            header = Header.decode(start, path)
        except JournalError as error:
            rejected.append((path, str(error)))
            continue
        if header is not None and header.identity != log_file.digest(journal.identity):
            rejected.append((path, f"{path} belongs to another project or database."))
        elif header is not None:
            yield header, path
        elif has_frames:
            rejected.append((path, f"{path} has records, but its header is damaged."))


def _mapped(path: Path) -> memoryview:
    with path.open("rb") as file:
        return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
