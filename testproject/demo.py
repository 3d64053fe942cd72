"""The demonstration: PostgreSQL, web workers and a poller, from one command.

    python -m testproject.demo

PORT, DATABASE_URL and BROKER_URL are respected; without the last two it runs an
embedded PostgreSQL and exchanges Celery's messages through files. Ctrl-C or SIGTERM
stops everything; nothing is left running.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from contextlib import ExitStack, suppress
from pathlib import Path
from types import FrameType

from deferred_sessions.record import FORMAT
from testproject.embedded import postgres

HOST = "127.0.0.1"
WORKERS = "3"
TICK = "5"
ROOT_WARNING = "You're running the worker with superuser privileges"
PATIENCE = 60.0  # seconds until the shop must have opened


class Stop(BaseException):
    """Somebody wants the demonstration to end."""


def main() -> int:
    """Run the demonstration until it is stopped or one of its processes dies."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _stop)
    with ExitStack() as stack:
        try:
            return _run(stack)
        except Stop:
            print("\nStopping …", flush=True)
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                signal.signal(number, signal.SIG_IGN)
            return 0


def _run(stack: ExitStack) -> int:
    listener = stack.enter_context(_listen(int(os.environ.get("PORT", "8000"))))
    port = listener.getsockname()[1]
    place = Path(tempfile.gettempdir()) / f"deferred-sessions-demo-{os.getuid()}"
    place.mkdir(mode=0o700, exist_ok=True)
    environment = _environment(stack, place)

    _say("Preparing the database …")
    for command in (["migrate", "--verbosity=0"], ["openshop"]):
        subprocess.run([sys.executable, "manage.py", *command], env=environment, check=True)

    _say(f"Starting {WORKERS} web workers, and a Celery worker with beat …")
    web = ["-m", "gunicorn", "testproject.wsgi", "--bind", f"fd://{listener.fileno()}"]
    web += ["--workers", os.environ.get("WEB_WORKERS", WORKERS), "--log-level", "warning"]
    web += ["--no-control-socket", "--graceful-timeout", "3"]
    celery = ["-m", "celery", "-A", "testproject", "--quiet", "worker", "--beat"]
    celery += ["--concurrency=1", "--loglevel=ERROR", "--without-mingle"]
    celery += [f"--schedule={place / 'schedule'}"]
    processes = {
        "The web server": _start(stack, web, environment, [listener.fileno()]),
        "Celery": _start(stack, celery, environment, []),
    }

    address = f"http://{HOST}:{port}/"
    _wait_for(address, processes)
    _say(f"The shop is open: {address}")
    _say(f"Send visitors:    {_python()} -m testproject.visitors {address}")
    _say(f"The dashboard:    {address}admin/deferred_sessions/session/dashboard/")
    _say("                  (admin, with the password corner-shop)")
    _say("Ctrl-C stops everything.")
    while True:
        _check(processes)
        time.sleep(0.5)


def _environment(stack: ExitStack, place: Path) -> dict[str, str]:
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    environment.setdefault("PYTHONWARNINGS", f"ignore:{ROOT_WARNING}")
    if "DATABASE_URL" not in environment:
        _say("Starting an embedded PostgreSQL …")
        environment["DATABASE_URL"] = stack.enter_context(postgres(place / "postgres"))
    if "BROKER_URL" not in environment:
        environment["BROKER_DIRECTORY"] = str(place / "broker")
        for folder in ("messages", "control"):
            (place / "broker" / folder).mkdir(parents=True, exist_ok=True)
    # An older version's demonstration may have left a store in the usual place.
    environment.setdefault("SESSION_DIRECTORY", str(place / f"sessions-{FORMAT}"))
    environment.setdefault("FLUSH_TICK", TICK)
    environment.setdefault("DEFERRED_SESSIONS", '{"FLUSH_INTERVAL": 30.0, "RECORD_CLIENT": true}')
    return environment


def _listen(port: int) -> socket.socket:
    """Take the port before anything else is started."""
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((HOST, port))
    except OSError as error:
        sys.exit(f"Port {port} cannot be used: {error.strerror}. Try another: PORT=8001 make demo")
    listener.listen(128)
    return listener


def _start(
    stack: ExitStack, command: list[str], environment: dict[str, str], descriptors: list[int]
) -> subprocess.Popen[bytes]:
    """Start a process in a group of its own, to be ended with all its children."""
    process = subprocess.Popen(
        [sys.executable, *command],
        env=environment,
        pass_fds=descriptors,
        start_new_session=True,
        stdin=subprocess.DEVNULL,
    )
    stack.callback(_end, process)
    return process


def _end(process: subprocess.Popen[bytes]) -> None:
    """Ask a process to end, then end what is left of its group."""
    process.terminate()
    with suppress(subprocess.TimeoutExpired):
        process.wait(8)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _wait_for(address: str, processes: dict[str, subprocess.Popen[bytes]]) -> None:
    deadline = time.monotonic() + PATIENCE
    while True:
        _check(processes)
        try:
            with urllib.request.urlopen(address, timeout=5):
                return
        except OSError as error:
            if time.monotonic() > deadline:
                sys.exit(f"The shop did not open: {error}")
            time.sleep(0.2)


def _check(processes: dict[str, subprocess.Popen[bytes]]) -> None:
    for name, process in processes.items():
        if process.poll() is not None:
            sys.exit(f"{name} ended unexpectedly with status {process.returncode}.")


def _stop(_number: int, _frame: FrameType | None) -> None:
    raise Stop


def _python() -> str:
    """Return this interpreter as somebody in this directory would type it."""
    here = f"{Path.cwd()}{os.sep}"
    return sys.executable.removeprefix(here)


def _say(text: str) -> None:
    print(text, flush=True)


if __name__ == "__main__":
    sys.exit(main())
