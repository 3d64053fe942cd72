"""Tells what is mapped or locked when the process is about to fork.

Used by the parts of this wing that hold maps and locks of their process. Invariant:
the hooks are installed by the first part that opens something, never at import.
"""

from __future__ import annotations

import functools
import os
import threading
import weakref
from typing import Protocol


class ForkAware(Protocol):
    """What must not be carried into a child as it is."""

    def before_fork(self) -> None:
        """Called in the forking thread; must not fail."""

    def after_fork(self, *, in_child: bool) -> None:
        """Called in the same thread on both sides, if `before_fork` was."""


_parts: weakref.WeakSet[ForkAware] = weakref.WeakSet()
_prepared: list[ForkAware] = []
_forking = threading.RLock()  # one fork at a time, or each would undo the other's work


def watch(part: ForkAware) -> None:
    """Tell `part` of every fork from now on, for as long as it lives."""
    _parts.add(part)
    _install()


@functools.cache
def _install() -> None:
    os.register_at_fork(
        before=_before,
        after_in_parent=lambda: _after(in_child=False),
        after_in_child=lambda: _after(in_child=True),
    )


def _before() -> None:
    _forking.acquire()
    _prepared[:] = _parts
    for part in _prepared:
        part.before_fork()


def _after(*, in_child: bool) -> None:
    for part in _prepared:
        part.after_fork(in_child=in_child)
    _prepared.clear()
    _forking.release()
