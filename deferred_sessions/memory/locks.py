"""Locks between the processes of one host, freed by the kernel when the holder dies.

Called by `flusher` so that a node flushes once at a time. Invariant: a lock belongs
to a living process; no timer breaks it and no file is ever removed.
"""

from __future__ import annotations

import fcntl
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from deferred_sessions.memory import forks


class ProcessLock:
    """Mutual exclusion among the threads and processes of a host.

    A POSIX record lock does not exclude threads of one process, and closing any
    descriptor of its file drops it; so one descriptor is opened per acquisition and
    a thread lock stands in front.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._threads = threading.Lock()

    def before_fork(self) -> None:
        """Leave the lock as it is: the parent goes on holding it."""

    def after_fork(self, *, in_child: bool) -> None:
        """Forget in a child that a thread of the parent held the lock."""
        if in_child:
            self._threads = threading.Lock()

    @contextmanager
    def held(self, *, wait: bool) -> Iterator[bool]:
        """Hold the lock for the block; yield False if it is taken and `wait` is off."""
        forks.watch(self)
        threads = self._threads
        if not threads.acquire(blocking=wait):
            yield False
            return
        try:
            flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
            descriptor = os.open(self._path, flags, 0o600)
            try:
                yield self._lock(descriptor, wait=wait)
            finally:
                os.close(descriptor)
        finally:
            threads.release()

    def _lock(self, descriptor: int, *, wait: bool) -> bool:
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except (BlockingIOError, PermissionError):  # POSIX allows EAGAIN and EACCES
            return False
        return True
