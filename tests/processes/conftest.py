"""Real subprocesses: web workers, Celery, commands; killed for real."""

from __future__ import annotations

import http.cookiejar
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from deferred_sessions.runtime import reset_runtime
from tests.plugins.postgres import database_url

ROOT = Path(__file__).parents[2]
DEADLINE = 60.0  # seconds; generous, because only a failure waits that long


def wait_until(condition: Callable[[], Any], *, what: str, seconds: float = DEADLINE) -> Any:
    """Wait until `condition` returns something true; return that."""
    deadline = time.monotonic() + seconds
    while True:
        result = condition()
        if result:
            return result
        assert time.monotonic() < deadline, f"Waited {seconds} s in vain for {what}."
        time.sleep(0.02)


class Visitor:
    """A browser with a cookie jar."""

    def __init__(self) -> None:
        self.cookies = http.cookiejar.CookieJar()
        self._opener = urllib.request.build_opener(urllib.request.HTTPCookieProcessor(self.cookies))

    @property
    def key(self) -> str:
        return str(next(c.value for c in self.cookies if c.name == "sessionid"))

    def get(self, url: str, data: bytes | None = None) -> Any:
        with self._opener.open(url, data=data, timeout=30) as response:
            return json.loads(response.read())


class Web:
    """A running web server."""

    def __init__(self, process: subprocess.Popen[bytes], port: int) -> None:
        self.process = process
        self.port = port

    def url(self, path: str) -> str:
        return f"http://localhost:{self.port}{path}"

    def workers(self) -> list[int]:
        """Return the process ids of the workers."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
        return [int(pid) for pid in children.read_text().split()]


class Site:
    """One host of a site: a directory for its sessions, and processes that use it."""

    database: str | None = None
    """The URL of its database, unless it is the one of the tests."""
    more: Mapping[str, str] = {}
    """What else is in the environment of its processes."""

    def __init__(self, directory: Path, **settings: Any) -> None:
        self.directory = directory
        self.settings = settings
        self._processes: list[subprocess.Popen[bytes]] = []
        self._to_kill: list[subprocess.Popen[bytes]] = []

    @property
    def environment(self) -> dict[str, str]:
        return {
            **os.environ,
            "DATABASE_URL": self.database or database_url(),
            "SESSION_DIRECTORY": str(self.directory),
            "DEFERRED_SESSIONS": json.dumps({"STORE_SIZE": 16 << 20, **self.settings}),
            "DJANGO_SETTINGS_MODULE": "testproject.settings",
            "PYTHONUNBUFFERED": "1",
            **self.more,
        }

    def start(self, *command: str, kill: bool = False, **options: Any) -> subprocess.Popen[bytes]:
        """Start a process that is stopped with the test, or killed to save time."""
        environment = {**self.environment, **options.pop("env", {})}
        process = subprocess.Popen(
            [sys.executable, *command],
            cwd=ROOT,
            env=environment,
            start_new_session=True,
            **options,
        )
        (self._to_kill if kill else self._processes).append(process)
        return process

    def run(self, *command: str, **options: Any) -> str:
        """Run a process to its end; return what it printed."""
        environment = {**self.environment, **options.pop("env", {})}
        done = subprocess.run(
            [sys.executable, *command],
            cwd=ROOT,
            env=environment,
            check=False,
            capture_output=True,
            text=True,
            timeout=DEADLINE,
            **options,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def web(self, *options: str, application: str = "testproject.wsgi", port: int = 0) -> Web:
        """Start gunicorn, on a free port or on `port`, and wait until it answers."""
        with socket.socket() as listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(("127.0.0.1", port))
            listener.listen(128)
            descriptor, port = listener.fileno(), listener.getsockname()[1]
            process = self.start(
                *("-m", "gunicorn", application, "--bind", f"fd://{descriptor}"),
                *("--no-control-socket", "--graceful-timeout", "2", *options),
                pass_fds=[descriptor],
            )
        web = Web(process, port)
        Visitor().get(web.url("/probe/read/"))
        return web

    def stop(self) -> None:
        for process in self._to_kill:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        for process in self._processes:
            if process.poll() is None:
                process.terminate()
        for process in self._processes:
            with suppress(subprocess.TimeoutExpired):
                process.wait(10)
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        for process in (*self._to_kill, *self._processes):
            for pipe in (process.stdin, process.stdout, process.stderr):
                if pipe is not None:
                    with suppress(BrokenPipeError):  # what was asked of a process that was killed
                        pipe.close()


@pytest.fixture
def make_site(
    transactional_db: None, directory: Path, settings: Any
) -> Iterator[Callable[..., Site]]:
    """Make a host of the site; its store is also this process's store."""
    sites: list[Site] = []

    def make(directory: Path = directory, **changes: Any) -> Site:
        settings.DEFERRED_SESSIONS = {
            "DIRECTORY": str(directory),
            "STORE_SIZE": 16 << 20,
            **changes,
        }
        sites.append(Site(directory, **changes))
        return sites[-1]

    yield make
    for site in sites:
        site.stop()
    reset_runtime()


@pytest.fixture
def site(make_site: Callable[..., Site]) -> Site:
    """A host of the site with the default settings."""
    return make_site()
