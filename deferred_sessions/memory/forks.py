"""Tells what is mapped or locked when the process is about to fork.

Used by the parts of this wing that hold maps and locks of their process. Invariant:
the hooks are installed by the first part that opens something, never at import.
"""

from __future__ import annotations

import functools
import logging
import os
import threading
import weakref
from typing import Protocol

logger = logging.getLogger(__name__)


class ForkAware(Protocol):
    """What must not be carried into a child as it is."""

    def before_fork(self) -> None:
        """Called in the forking thread."""

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
    for part in list(_parts):
        try:
            part.before_fork()
        except Exception:  # whatever it is, the others must be prepared, and undone
            logger.exception("A part cannot prepare for a fork.", extra={"action": "fork_failed"})
        else:
            _prepared.append(part)


def _after(*, in_child: bool) -> None:
    while _prepared:
        part = _prepared.pop()
        try:
            part.after_fork(in_child=in_child)
        except Exception:
            logger.exception("A part cannot go on after a fork.", extra={"action": "fork_failed"})
    _forking.release()
