"""Signals of this package; connect to them as to Django's own.

Sent by `flusher`, never inside a transaction or under a lock.
"""

from __future__ import annotations

from typing import Final

from django.dispatch import Signal

session_flushed: Final = Signal()
"""The flusher wrote to PostgreSQL. Argument: `report`, a `FlushReport`."""
