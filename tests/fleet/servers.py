"""PostgreSQL servers that can be killed, stopped and started again with their old data."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import psycopg

from testproject.embedded import EmbeddedServer

TABLES = ("session", "node", "waiter", "refused_write", "adopted", "server", "revocation")
CONNECT_TIMEOUT = 2  # seconds; the least that libpq takes


class Server:
    """One session server."""

    def __init__(self, alias: str, directory: Path) -> None:
        self.alias = alias
        self._embedded = EmbeddedServer(directory / alias)
        self._stopped: list[psutil.Process] = []
        self._address = self._embedded.url

    @property
    def url(self) -> str:
        """Where it is, whether it runs or not."""
        return f"{self._address}?connect_timeout={CONNECT_TIMEOUT}"

    def ask(self, query: str, *parameters: Any) -> list[tuple[Any, ...]]:
        """Return the rows of a query."""
        with psycopg.connect(self.url, autocommit=True) as connection:
            cursor = connection.execute(query, parameters or None)
            return cursor.fetchall() if cursor.description else []

    def clear(self) -> None:
        """Empty all tables."""
        for table in TABLES:  # the revocations last: what empties the sessions is one
            self.ask(f"TRUNCATE deferred_sessions_{table} RESTART IDENTITY")

    def sessions(self) -> dict[str, str]:
        """Return what is in all rows, by key."""
        return dict(self.ask("SELECT session_key, session_data FROM deferred_sessions_session"))

    def stamps(self) -> dict[str, tuple[int, int]]:
        """Return fence and version of all rows, by key."""
        rows = self.ask("SELECT session_key, fence, version FROM deferred_sessions_session")
        return {key: (fence, version) for key, fence, version in rows}

    def phases(self) -> dict[str, str]:
        """Return how each server is, as this one has it on record."""
        return dict(self.ask("SELECT server, phase FROM deferred_sessions_server"))

    @property
    def is_up(self) -> bool:
        """It runs, and answers."""
        return not self._stopped and bool(self._processes())

    def kill(self) -> None:
        """Kill -9 all of its processes."""
        processes = self._processes()
        for process in processes:
            process.kill()
        psutil.wait_procs(processes, timeout=10)

    def start(self) -> None:
        """Start it with the data that it had, unless it runs; returns when it answers."""
        self.resume()
        if not self._processes():
            self._embedded.start()

    def stop(self) -> None:
        """Stop all of its processes: it takes connections, and never answers."""
        self._stopped = self._processes()
        for process in self._stopped:
            process.suspend()

    def resume(self) -> None:
        """Let it go on."""
        stopped, self._stopped = self._stopped, []
        for process in reversed(stopped):
            process.resume()

    def close(self) -> None:
        """End it for good."""
        self.start()
        self._embedded.__exit__()

    def _processes(self) -> list[psutil.Process]:
        """Return its processes, first the one that all others come from."""
        main = self._embedded.process
        if main is None or not main.is_running() or main.status() == psutil.STATUS_ZOMBIE:
            return []
        return [main, *main.children(recursive=True)]


@contextmanager
def running(directory: Path, aliases: str) -> Iterator[dict[str, Server]]:
    """Run a server for each letter of `aliases`."""
    servers: dict[str, Server] = {}
    try:
        for alias in aliases:
            servers[alias] = Server(alias, directory)
        yield servers
    finally:
        for server in servers.values():
            server.close()
