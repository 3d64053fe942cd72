"""Whose a journal is: one store's at a time, and of one node for good.

Used by `journal` and `recovery`. Invariant: while a process has a store open, no process of
another store writes to the logs of its journal; the kernel sees to that, also if it is killed.
"""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

from deferred_sessions.exceptions import JournalError
from deferred_sessions.memory import forks, logs
from deferred_sessions.memory.directory import make_private
from deferred_sessions.memory.logs import Descriptor

LOCK_FILE: Final = "in-use.lock"
NODE_FILE: Final = "node"
TAKEN: Final = (
    "The journal in {} is in use by processes with another session store: of another node, of a "
    "container that has not ended yet, or from before the store's directory was removed. Stop "
    "them; each node needs a DEFERRED_SESSIONS['JOURNAL_DIRECTORY'] of its own."
)


class Ownership:
    """A lock beside the logs that all processes of one store share, and the node's name."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._held: Descriptor | None = None
        self._node: str | None = None

    def take(self) -> None:
        """Keep other stores from the logs, until `drop`.

        Raises:
            JournalError: A process of another store has them in use.
        """
        forks.watch(self)
        make_private(self._directory)
        held = Descriptor.of_lock(self._directory / LOCK_FILE)
        self._lock(held, fcntl.LOCK_SH)
        self._held = held  # the one of before, if any, goes only now

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Keep everybody else from the logs for the block, in which they become this store's.

        Raises:
            JournalError: Another process has them in use.
        """
        held = self._held
        if held is None:
            raise JournalError(f"The journal in {self._directory} is nobody's.")
        self._lock(held, fcntl.LOCK_EX)
        yield
        self._lock(held, fcntl.LOCK_SH)

    def drop(self) -> None:
        """Leave the logs to others."""
        self._held = None

    def before_fork(self) -> None:
        """Leave everything as it is: the parent goes on."""

    def after_fork(self, *, in_child: bool) -> None:
        """Let go of what a child has inherited, or it would outlive the parent's hold."""
        if in_child:
            self.drop()

    def node(self, default: str) -> str:
        """Return under which name the node that has this journal is known; first `default`.

        A container that is made anew has another host name. What it finds here it saved under
        its old one, under which it has the leases. If the name cannot be kept, as on a disk
        that fails, it is the default.
        """
        if self._node is None:
            with suppress(OSError):
                self._node = logs.kept_text(self._directory / NODE_FILE, default)
        return self._node or default

    def _lock(self, held: Descriptor, kind: int) -> None:
        try:
            fcntl.flock(held.number, kind | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise JournalError(TAKEN.format(self._directory)) from error
