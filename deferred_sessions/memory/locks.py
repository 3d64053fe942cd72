"""Locks between the processes of one host, freed by the kernel when the holder dies.

Called by `flusher` so that a node flushes once at a time. Invariant: a lock belongs
to a living process; no timer breaks it and no file is ever removed.
"""

from __future__ import annotations

import fcntl
import os
import struct
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from io import FileIO
from pathlib import Path
from typing import Final

from deferred_sessions.memory import forks

_FLOCK: Final = struct.Struct("hhqqi4x")  # type, whence, start, length, process (always 0)
_WHOLE: Final = _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)


class ProcessLock:
    """Mutual exclusion among the threads and processes of a host.

    The kernel ties it to the open file (an "open file description lock", see fcntl(2)),
    one for each acquisition: so threads exclude each other too, and whatever interrupts
    the holder, the lock goes when the file object does.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._files: weakref.WeakSet[FileIO] = weakref.WeakSet()

    def before_fork(self) -> None:
        """Leave the lock as it is: the parent goes on holding it."""

    def after_fork(self, *, in_child: bool) -> None:
        """Let go of what a child has inherited, or the lock would outlive the parent's hold."""
        if in_child:
            for file in list(self._files):
                file.close()

    @contextmanager
    def held(self, *, wait: bool) -> Iterator[bool]:
        """Hold the lock for the block; yield False if it is taken and `wait` is off."""
        forks.watch(self)
        with FileIO(self._path, "a+", opener=_opener) as file:
            self._files.add(file)
            yield _lock(file, wait=wait)

    def is_taken(self) -> bool:
        """Tell whether anybody holds the lock, without taking it."""
        try:
            with FileIO(self._path, "r+", opener=_opener) as file:
                answer = fcntl.fcntl(file, fcntl.F_OFD_GETLK, _WHOLE)
        except FileNotFoundError:  # the directory
            return False
        return bool(_FLOCK.unpack(answer)[0] != fcntl.F_UNLCK)


def _opener(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_CREAT | os.O_NOFOLLOW, 0o600)


def _lock(file: FileIO, *, wait: bool) -> bool:
    try:
        fcntl.fcntl(file, fcntl.F_OFD_SETLKW if wait else fcntl.F_OFD_SETLK, _WHOLE)
    except BlockingIOError:
        return False
    return True
