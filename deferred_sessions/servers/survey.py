"""What `manage.py check --deploy` asks of a session server.

Used by `deployment`. Invariant: looks, and leaves nothing behind.
"""

from __future__ import annotations

from contextlib import closing
from typing import Final

import psycopg

from deferred_sessions.exceptions import ServerUnavailableError
from deferred_sessions.servers import sql
from deferred_sessions.servers.listener import connect
from deferred_sessions.servers.server import SessionServer

ATTEMPTS: Final = 3  # somebody else may use the pool at the same time
BACKEND: Final = b"SELECT pg_backend_pid()"


def namesakes(server: SessionServer) -> list[str]:
    """Return the names that several nodes had at the same time, within the last hour.

    Raises:
        ServerUnavailableError: It cannot be asked.
    """
    return [name for (name,) in server.run(sql.NAMESAKES, [])]


def is_pooled(alias: str) -> bool:
    """Tell whether connections to this database share backends, as with pgbouncer's transactions.

    Two connections that are open at the same time had the same backend then. A pooler of
    whole sessions does no harm: what listens keeps its backend.

    Raises:
        ServerUnavailableError: It cannot be asked.
    """
    try:
        with closing(connect(alias)) as one, closing(connect(alias)) as other:
            return any(_backend(one) == _backend(other) for _ in range(ATTEMPTS))
    except psycopg.Error as error:
        raise ServerUnavailableError(f"PostgreSQL cannot be asked: {error}") from None


def _backend(connection: psycopg.Connection[tuple[int]]) -> int:
    row = connection.execute(BACKEND).fetchone()
    return 0 if row is None else row[0]
