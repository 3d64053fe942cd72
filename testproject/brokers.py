"""Runs a command with Redis and RabbitMQ of its own, on loopback and free ports.

    python -m testproject.brokers python -m pytest tests/processes

The command finds them in REDIS_URL and RABBITMQ_URL. Both come from the system's
packages (redis-server, rabbitmq-server); what was started is stopped, by process id.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

RABBITMQ = "/usr/lib/rabbitmq/bin/rabbitmq-server"
PATIENCE = 90.0  # seconds; Erlang takes its time on a small machine


def main(command: list[str]) -> int:
    """Run `command` with brokers; return its exit code."""
    with ExitStack() as stack:
        directory = Path(tempfile.mkdtemp(prefix="deferred-sessions-brokers-"))
        stack.callback(shutil.rmtree, directory, ignore_errors=True)
        environment = {
            **os.environ,
            "REDIS_URL": stack.enter_context(redis(directory / "redis")),
            "RABBITMQ_URL": stack.enter_context(rabbitmq(directory / "rabbitmq")),
        }
        return subprocess.run(command, env=environment, check=False).returncode


@contextmanager
def redis(directory: Path) -> Iterator[str]:
    """Run a Redis server; yield its URL."""
    directory.mkdir()
    port = free_port()
    command = ["redis-server", "--port", str(port), "--bind", "127.0.0.1", "--save", ""]
    with running([*command, "--dir", str(directory)], directory, port):
        yield f"redis://127.0.0.1:{port}/0"


@contextmanager
def rabbitmq(directory: Path) -> Iterator[str]:
    """Run a RabbitMQ server, with a port mapper of its own; yield its URL."""
    directory.mkdir()
    (directory / "plugins").write_text("[].\n")
    port, mapper, distribution = free_port(), free_port(), free_port()
    environment = {
        "HOME": str(directory),
        "ERL_EPMD_PORT": str(mapper),
        "ERL_EPMD_ADDRESS": "127.0.0.1",
        "RABBITMQ_NODENAME": f"sessions{port}@localhost",
        "RABBITMQ_NODE_IP_ADDRESS": "127.0.0.1",
        "RABBITMQ_NODE_PORT": str(port),
        "RABBITMQ_DIST_PORT": str(distribution),
        "RABBITMQ_MNESIA_BASE": str(directory / "mnesia"),
        "RABBITMQ_LOG_BASE": str(directory / "log"),
        "RABBITMQ_ENABLED_PLUGINS_FILE": str(directory / "plugins"),
    }
    with (
        running(["epmd", "-port", str(mapper), "-address", "127.0.0.1"], directory, mapper),
        running([RABBITMQ], directory, port, environment),
    ):
        yield f"amqp://guest:guest@127.0.0.1:{port}//"


@contextmanager
def running(
    command: list[str], directory: Path, port: int, environment: dict[str, str] | None = None
) -> Iterator[None]:
    """Run a server until the end of the block; wait first until it listens."""
    log = directory / f"{Path(command[0]).name}.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            env={**os.environ, **(environment or {})},
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        deadline = time.monotonic() + PATIENCE
        while not is_listening(port):
            if process.poll() is not None or time.monotonic() > deadline:
                sys.exit(f"{command[0]} did not start:\n{log.read_text()}")
            time.sleep(0.1)
        yield
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGTERM)
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)


def is_listening(port: int) -> bool:
    """Tell whether somebody answers on this port."""
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) == 0


def free_port() -> int:
    """Return a port that nobody uses now."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
