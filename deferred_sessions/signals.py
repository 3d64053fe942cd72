"""Signals of this package; connect to them as to Django's own.

Sent by `flusher`, `overlap`, `revocations` and `refusals`, never inside a transaction or under a
lock.
"""

from __future__ import annotations

from typing import Final

from django.dispatch import Signal

session_flushed: Final = Signal()
"""The flusher wrote to PostgreSQL. Argument: `report`, a `FlushReport`."""

session_revoked: Final = Signal()
"""Somebody deleted or changed rows other than through a session, and memory was brought up
to date. Argument: `session_keys`, the list of the keys concerned."""

session_conflict: Final = Signal()
"""Overlapping requests changed the same keys; the later save stood. Arguments:
`session_key`, and `keys`, the list of those keys."""

session_fenced: Final = Signal()
"""A change was refused, because the session had passed to another node; it is kept in the table
of refused writes. Arguments: `session_key`, `fence`, `version`, `keys` (those in which it differs
from what PostgreSQL has), and `owner`, the node that has the session."""
