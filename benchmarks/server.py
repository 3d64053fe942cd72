"""A real web server with one of the engines, and wrk to ask it."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

WORKERS = 2
CONNECTIONS = 16
LUA = Path(__file__).with_name("cookies.lua")
PATIENCE = 30.0  # seconds


class Answer(NamedTuple):
    """What wrk measured."""

    rate: float
    """Requests per second."""
    p99: float
    """Seconds."""


class Server:
    """gunicorn with two workers; `asynchronous` ones are uvicorn's."""

    def __init__(
        self, engine: str, keys: Sequence[str], place: Path, *, asynchronous: bool
    ) -> None:
        self._keys = place / f"{re.sub(r'[^a-z]+', '-', engine.lower())}-{asynchronous}.keys"
        self._keys.write_text("\n".join(keys))
        environment = {**os.environ, "ENGINE": engine}
        command = [sys.executable, "-m", "gunicorn", "--log-level=error", f"--workers={WORKERS}"]
        if asynchronous:
            environment["ASYNC"] = "1"
            command += ["--worker-class=uvicorn_worker.UvicornWorker", "testproject.asgi"]
        else:
            command += ["testproject.wsgi"]
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            if hasattr(socket, "TCP_DEFER_ACCEPT"):  # on Linux
                # As behind nginx, a request is there when a worker accepts its connection.
                listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_DEFER_ACCEPT, int(PATIENCE))
            listener.listen(1024)
            self.url = f"http://127.0.0.1:{listener.getsockname()[1]}"
            self._process = subprocess.Popen(
                [*command, "--no-control-socket", f"--bind=fd://{listener.fileno()}"],
                env=environment,
                pass_fds=[listener.fileno()],
                start_new_session=True,
            )
        self._wait()

    def ask(self, path: str, seconds: float, *, rate: float | None = None) -> Answer:
        """Let visitors ask for `path`: as fast as they can, or at random, `rate` per second."""
        connections = CONNECTIONS if rate is None else 4 * CONNECTIONS
        pause = 0.0 if rate is None else 1000 * connections / rate
        done = subprocess.run(
            [
                *("wrk", "--threads=1", f"--connections={connections}", "--timeout=10s"),
                *(f"--duration={seconds:g}s", f"--script={LUA}", self.url + path),
            ],
            env={**os.environ, "KEYS": str(self._keys), "DELAY": f"{pause:.0f}"},
            check=True,
            capture_output=True,
            text=True,
        )
        requests, duration, p99, failed = map(int, done.stdout.rpartition("RESULT ")[2].split())
        if failed:
            raise RuntimeError(f"{failed} of {requests} requests to {self.url}{path} failed.")
        return Answer(requests / (duration / 1e6), p99 / 1e6)

    def stop(self) -> None:
        """Stop it."""
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(10)
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def _wait(self) -> None:
        deadline = time.monotonic() + PATIENCE
        while True:
            try:
                with urllib.request.urlopen(f"{self.url}/probe/nothing/", timeout=5):
                    return
            except OSError:
                if time.monotonic() > deadline or self._process.poll() is not None:
                    raise
                time.sleep(0.1)
