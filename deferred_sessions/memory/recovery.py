"""Rebuilds the host store from the journal, after the host has lost its memory.

Called when a store is made, under the lock that keeps other processes from opening it, and
by `recoversessions`. Invariant: killed anywhere and repeated, it ends in the same state; a
record of a log never takes the place of a later one.

    lock the node; both logs, in order -> the store and its indexes, all due at once;
    a new log of what is dirty; the old ones away; unlock. The flusher does the rest.
"""

from __future__ import annotations

import logging
import mmap
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Final, NamedTuple

from deferred_sessions import lifecycle
from deferred_sessions.exceptions import JournalError, RecordCorruptError
from deferred_sessions.memory import log_file, tables
from deferred_sessions.memory.environment import Databases
from deferred_sessions.memory.journal import LOGS, Journal
from deferred_sessions.memory.log_file import Header
from deferred_sessions.record import SessionRecord, decode, decode_head

logger = logging.getLogger(__name__)

NOTE: Final = b"journal"  # stands in a store that has all that its journal has
PART: Final = 1000  # records per transaction
PROGRESS: Final = 2.0  # seconds between two messages


class Findings(NamedTuple):
    """What the logs hold."""

    newest: dict[str, bytes]
    """The last state of each session, encoded; deletions, too."""
    frames: int
    unreadable: int
    """Records of a layout that this version does not read."""
    generation: int
    """Of the latest log."""
    rejected: list[tuple[Path, str]]
    """Logs that are not ours, and why."""


def read(journal: Journal) -> Findings:
    """Return what the logs hold, up to the first frame of each that is not whole."""
    newest: dict[str, bytes] = {}
    versions: dict[str, int] = {}
    frames = unreadable = generation = 0
    rejected: list[tuple[Path, str]] = []
    for header, path in sorted(_logs(journal, rejected)):
        generation = max(generation, header.generation)
        for key, data, _ in _frames(path, header):
            frames += 1
            try:
                version = decode_head(data).version
            except RecordCorruptError:
                unreadable += 1
                continue
            if version >= versions.get(key, 0):
                newest[key], versions[key] = data, version
    return Findings(newest, frames, unreadable, generation, rejected)


def recover_if_new(journal: Journal, dbs: Databases, now: float) -> None:
    """Recover unless this store has been; call it while holding `opening`."""
    with dbs.env.begin(dbs.notes) as txn:
        if txn.get(NOTE):
            return
    started = time.monotonic()
    found = read(journal)
    for path, why in found.rejected:
        aside = path.with_name(f"{path.name}.rejected-{int(now)}")
        path.rename(aside)
        logger.error("%s It is left alone, as %s.", why, aside, extra={"action": "log_rejected"})
    put(dbs, found.newest, now)
    dirty = _dirty(dbs)
    journal.restart(found.generation + 1, dirty, now)
    with dbs.env.begin(dbs.notes, write=True) as txn:
        txn.put(NOTE, b"ready")
    if found.frames:
        logger.warning(
            "Recovered %d sessions from %d records of the journal in %.1f s; %d records could "
            "not be read.",
            len(found.newest),
            found.frames,
            time.monotonic() - started,
            found.unreadable,
            extra={"action": "recovered", "count": len(found.newest)},
        )


def put(dbs: Databases, newest: dict[str, bytes], now: float) -> None:
    """Put records into the store, dirty and due, where it has nothing later."""
    keys, said = sorted(newest), time.monotonic()
    for start in range(0, len(keys), PART):
        part = [
            (key, partial(_recovered, key, newest[key], now)) for key in keys[start : start + PART]
        ]
        with dbs.env.begin(dbs.records, write=True) as txn:
            tables.update_many(txn, dbs, part)
        if time.monotonic() - said > PROGRESS:
            said = time.monotonic()
            logger.warning(
                "Recovering sessions: %d of %d.",
                start,
                len(keys),
                extra={"action": "recovering"},
            )


def _recovered(
    key: str, data: bytes, now: float, known: SessionRecord | None
) -> SessionRecord | None:
    record = decode(key, data)
    if known is not None and known.version >= record.version:
        return known
    if record.expires_at <= now and not record.is_tombstone:
        return known
    return lifecycle.recovered(record, now=now)


def _dirty(dbs: Databases) -> list[tuple[bytes, bytes]]:
    """Return the dirty records of the store, as they are."""
    with dbs.env.begin(dbs.records, buffers=False) as txn:
        names = [entry[8:] for entry in txn.cursor(dbs.due).iternext(values=False)]
        return [(name, txn.get(name, b"")) for name in names]


def _logs(journal: Journal, rejected: list[tuple[Path, str]]) -> Iterator[tuple[Header, Path]]:
    """Yield the logs that there are, with their headers."""
    for path in (journal.directory / name for name in LOGS):
        if not path.exists():
            continue
        with path.open("rb") as file:
            start = file.read(log_file.HEADER_SIZE)
        try:
            header = Header.decode(start, path)
        except JournalError as error:
            rejected.append((path, str(error)))
            continue
        if header is not None and header.identity != log_file.digest(journal.identity):
            rejected.append((path, f"{path} belongs to another project or database."))
        elif header is not None:
            yield header, path


def _frames(path: Path, header: Header) -> Iterator[log_file.Frame]:
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as log:
        yield from log_file.frames(log, header.salt)
