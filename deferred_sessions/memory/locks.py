"""Locks between the processes of one host, freed by the kernel when the holder dies.

Called by `flusher` so that a node flushes once at a time, and by `journal` so that one syncs
for all. Invariant: a lock belongs to a living process; no timer breaks it and no file is ever
removed.
"""

from __future__ import annotations

import fcntl
import os
import struct
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from io import FileIO
from pathlib import Path
from typing import Final

from deferred_sessions.memory import forks

_FLOCK: Final = struct.Struct("hhqqi4x")  # type, whence, start, length, process (always 0)
_TURNS: Final = 1 << 40  # bytes that stand for turns, before they begin anew
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


class Relay:
    """Work that one does for all who wait, turn by turn, among threads and processes.

    Who does the work of a turn holds a byte of the file, the others wait to share it: so all
    of them wake at once when it is let go, also by the death of who held it. The next turn
    has the next byte, where nobody lingers.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._own = threading.local()  # the kernel ties locks to open files, so: one each

    def lead(self, turn: int) -> bool:
        """Take on the work of this turn; False if somebody else has."""
        try:
            self._lock(fcntl.F_OFD_SETLK, fcntl.F_WRLCK, turn)
        except BlockingIOError:
            return False
        return True

    def done(self, turn: int) -> None:
        """Wake all who wait for this turn."""
        self._lock(fcntl.F_OFD_SETLK, fcntl.F_UNLCK, turn)

    def follow(self, turn: int) -> None:
        """Return when nobody is at work on this turn any more."""
        self._lock(fcntl.F_OFD_SETLKW, fcntl.F_RDLCK, turn)
        self._lock(fcntl.F_OFD_SETLK, fcntl.F_UNLCK, turn)

    def _lock(self, command: int, kind: int, turn: int) -> None:
        file: _ThreadsFile | None = getattr(self._own, "file", None)
        if file is None or file.process != os.getpid():  # a fork shares its parent's locks
            file = self._own.file = _ThreadsFile(self._path)
        byte = _FLOCK.pack(kind, os.SEEK_SET, turn % _TURNS, 1, 0)
        fcntl.fcntl(file.descriptor, command, byte)


class _ThreadsFile:
    """An open file that is closed with the thread that it belongs to."""

    def __init__(self, path: Path) -> None:
        self.process = os.getpid()
        self.descriptor = _opener(os.fspath(path), os.O_RDWR | os.O_CLOEXEC)
        weakref.finalize(self, os.close, self.descriptor)


def _opener(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_CREAT | os.O_NOFOLLOW, 0o600)


def _lock(file: FileIO, *, wait: bool) -> bool:
    try:
        fcntl.fcntl(file, fcntl.F_OFD_SETLKW if wait else fcntl.F_OFD_SETLK, _WHOLE)
    except BlockingIOError:
        return False
    return True
