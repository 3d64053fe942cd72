"""Figures of the past: two rings of samples in one small file of the node.

Written by the agent, read by whoever draws charts. A sample's place follows from its time,
so the file needs no head, never grows, and outlives every process. Invariant: what is read
back is a sample that was written whole; a torn or foreign one is passed over.
"""

from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from enum import IntEnum
from operator import itemgetter
from pathlib import Path
from typing import Final, NamedTuple

from deferred_sessions.memory.counters import SLOT_WORDS, Counter
from deferred_sessions.memory.directory import make_private

FILE: Final = "history"
STEP: Final = 10.0  # seconds between samples
GAUGES: Final = 16  # there is room for so many
_BODY: Final = struct.Struct(f"<d{SLOT_WORDS}Q{GAUGES}d")  # time, counters, gauges
_SIGN: Final = struct.Struct("<4sI")  # magic, checksum of the body
_MAGIC: Final = b"DSh1"
_SIZE: Final = _SIGN.size + _BODY.size


class Gauge(IntEnum):
    """What goes up and down; the number is its place in a sample and is never reused."""

    SESSIONS = 0
    """Sessions in memory, and deletions remembered."""
    DIRTY = 1
    """Of those, the ones that PostgreSQL does not have as they are."""
    OLDEST_CHANGE_SECONDS = 2
    """Age of the oldest change that PostgreSQL does not have; 0 if none."""
    STORE_BYTES = 3
    """Size of the store."""
    STORE_USED_BYTES = 4
    """How much of it holds something."""
    LAST_POLL_TIMESTAMP_SECONDS = 5
    """When a poller flushed last, Unix time; 0 if none ever has."""
    LAST_FLUSH_TIMESTAMP_SECONDS = 6
    """When anybody flushed last, Unix time; 0 if nobody ever has."""
    LAST_FLUSH_SECONDS = 7
    """How long that took."""
    LAST_FLUSH_ROWS = 8
    """How many rows that wrote."""
    LAST_FLUSH_FAILED = 9
    """1 if PostgreSQL could not take it, else 0."""
    JOURNAL_BYTES = 10
    """Size of the active log of the journal; 0 without a journal."""
    JOURNAL_UNSYNCED_BYTES = 11
    """What of it a crash of the host would take."""


class Sample(NamedTuple):
    """The figures of a node at one moment."""

    at: float
    """Unix seconds."""
    counters: dict[Counter, int]
    """Sums since the store was made."""
    gauges: dict[Gauge, float]


class Ring(NamedTuple):
    """A part of the file."""

    step: float
    """Seconds that each place stands for; it keeps the last sample of them."""
    places: int
    offset: int
    """Of its first place, in places."""

    @property
    def span(self) -> float:
        """How many seconds it reaches back."""
        return self.step * self.places

    def place(self, at: float) -> int:
        """Return where in the file a sample of this time stands, in bytes."""
        return (self.offset + int(at // self.step) % self.places) * _SIZE


HOUR: Final = Ring(STEP, 360, 0)
DAY: Final = Ring(300.0, 288, HOUR.places)
RINGS: Final = (HOUR, DAY)


class History:
    """The samples of this node."""

    def __init__(self, directory: Path) -> None:
        self._path = directory / FILE

    def record(self, sample: Sample) -> None:
        """Keep `sample`, in place of what is too old.

        Raises:
            OSError: There is no room.
            StoreError: The directory is not what it should be.
        """
        make_private(self._path.parent)
        data = _encoded(sample)
        with self._open(os.O_RDWR | os.O_CREAT) as descriptor:
            for ring in RINGS:
                os.pwrite(descriptor, data, ring.place(sample.at))

    def read(self, since: float, until: float) -> list[Sample]:
        """Return the samples between two times, oldest first; coarser ones beyond an hour."""
        ring = HOUR if until - since <= HOUR.span else DAY
        try:
            with self._open(os.O_RDONLY) as descriptor:
                data = os.pread(descriptor, ring.places * _SIZE, ring.offset * _SIZE)
        except FileNotFoundError:
            return []
        places = (data[start : start + _SIZE] for start in range(0, len(data), _SIZE))
        found = [sample for sample in map(_decoded, places) if sample is not None]
        return sorted((s for s in found if since <= s.at <= until), key=itemgetter(0))

    @contextmanager
    def _open(self, flags: int) -> Iterator[int]:
        # Anew each time, every ten seconds: nothing to look after when the process forks.
        descriptor = os.open(self._path, flags | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            yield descriptor
        finally:
            os.close(descriptor)


def _encoded(sample: Sample) -> bytes:
    counters, gauges = [0] * SLOT_WORDS, [0.0] * GAUGES
    for counter, count in sample.counters.items():
        counters[counter] = count
    for gauge, value in sample.gauges.items():
        gauges[gauge] = value
    body = _BODY.pack(sample.at, *counters, *gauges)
    return _SIGN.pack(_MAGIC, zlib.crc32(body)) + body


def _decoded(data: bytes) -> Sample | None:
    if len(data) != _SIZE:
        return None
    magic, checksum = _SIGN.unpack_from(data)
    if magic != _MAGIC or zlib.crc32(data[_SIGN.size :]) != checksum:
        return None
    at, *words = _BODY.unpack_from(data, _SIGN.size)
    counters = {counter: words[counter] for counter in Counter}
    return Sample(at, counters, {gauge: words[SLOT_WORDS + gauge] for gauge in Gauge})
