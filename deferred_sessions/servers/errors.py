"""What PostgreSQL's errors mean for sessions: away, refused, or held by somebody.

Used by `server` around every statement. Invariant: only what breaks the connection, or
speaks of the server as a whole, counts as "away"; whatever may be the fault of one row
must not stop the others. Messages come without DETAIL, which quotes the row: a session
key is a secret.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from django.db import DatabaseError, InterfaceError

from deferred_sessions.exceptions import RowLockedError, RowRefusedError, ServerUnavailableError

# SQLSTATE classes, https://www.postgresql.org/docs/current/errcodes-appendix.html:
# connection, transaction state (read-only, for one), prepared statement, login, unknown
# database or schema, no such table, resources, operator intervention, system, configuration.
AWAY: Final = frozenset({"", "08", "25", "26", "28", "3D", "3F", "42", "53", "57", "58", "F0"})
NO_TABLE: Final = "42P01"
NO_PRIVILEGE: Final = "42501"  # what row-level security and triggers may say of one row
LOCK_NOT_AVAILABLE: Final = "55P03"
QUERY_CANCELED: Final = "57014"  # statement_timeout: too many rows at once, or one is held
ROLLBACK: Final = "40"  # deadlock, serialization failure: it may well work the next time


@contextmanager
def translated() -> Iterator[None]:
    """Turn the driver's errors into those that callers tell apart."""
    try:
        yield
    except (DatabaseError, InterfaceError) as error:
        state = getattr(error.__cause__, "sqlstate", None) or ""
        message = str(error).partition("\nDETAIL:")[0]
        if state == NO_TABLE:
            message = f"has `manage.py migrate` been run on this database? {message}"
        if state in (LOCK_NOT_AVAILABLE, QUERY_CANCELED) or state[:2] == ROLLBACK:
            raise RowLockedError(f"Somebody else holds a session: {message}") from None
        if state == NO_PRIVILEGE or state[:2] not in AWAY:
            raise RowRefusedError(f"PostgreSQL refused the rows: {message}") from None
        raise ServerUnavailableError(f"PostgreSQL cannot be asked: {message}") from None
