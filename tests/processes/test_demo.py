"""The demonstration: one command starts everything, one signal stops everything."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.processes.conftest import ROOT, wait_until


class Demo:
    """A running demonstration."""

    def __init__(self, place: Path, **environment: str) -> None:
        clean = {k: v for k, v in os.environ.items() if k not in ("DATABASE_URL", "BROKER_URL")}
        self._place = place
        self.process = subprocess.Popen(
            [sys.executable, "-m", "testproject.demo"],
            cwd=ROOT,
            env={
                **clean,
                "PORT": "0",
                "TMPDIR": str(place),
                "FLUSH_TICK": "0.5",
                "DEFERRED_SESSIONS": json.dumps(
                    {"FLUSH_INTERVAL": 1.0, "DIRECTORY": str(place / "sessions")}
                ),
                **environment,
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def address(self) -> str:
        """Wait until the shop is open; return its address."""
        assert self.process.stdout is not None
        said = []
        for line in self.process.stdout:
            said.append(line)
            if "The shop is open" in line:
                return line.split()[-1]
        raise AssertionError("".join(said))

    def stop(self, number: int) -> tuple[int, str, list[psutil.Process]]:
        """Send a signal; return the status, what was said, and who is still alive."""
        family = psutil.Process(self.process.pid).children(recursive=True)
        family += [p for p in psutil.process_iter() if self._started(p)]
        self.process.send_signal(number)
        said = self.process.communicate(timeout=60)[0]
        alive = psutil.wait_procs(set(family), timeout=5)[1]
        return self.process.returncode, said, alive

    def _started(self, process: psutil.Process) -> bool:
        """Tell whether this is one of ours, such as PostgreSQL, which is nobody's child."""
        with suppress(psutil.Error):
            return any(str(self._place) in argument for argument in process.cmdline())
        return False


@pytest.fixture
def place() -> Iterator[Path]:
    """A directory that PostgreSQL can get into as a user of its own."""
    with tempfile.TemporaryDirectory(prefix="deferred-sessions-test-") as directory:
        Path(directory).chmod(0o755)
        yield Path(directory)


@pytest.fixture
def demo(place: Path) -> Iterator[Demo]:
    demo = Demo(place)
    yield demo
    if demo.process.poll() is None:
        demo.process.terminate()
        demo.process.communicate()


def figures(address: str) -> dict[str, Any]:
    with urllib.request.urlopen(f"{address}figures.json", timeout=10) as answer:
        return dict(json.loads(answer.read()))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_shop_opens_and_closes(demo: Demo, number: int) -> None:
    """Visitors come, the poller writes, and nothing is left running."""
    address = demo.address()
    # A request is counted when it has ended, which is after its answer.
    wait_until(lambda: figures(address)["requests"] > 0, what="the one that found it open")
    waiting = figures(address)["requests"]
    visitors = subprocess.run(
        [
            *(sys.executable, "-m", "testproject.visitors", address),
            *("--requests", "100", "--visitors", "10"),
        ],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    assert "100 requests by 10 visitors" in visitors.stdout
    seen = figures(address)
    served = seen["requests"] - waiting
    assert (served, seen["updates"], seen["sessions"]) == (100, 80, 10)
    wait_until(lambda: figures(address)["dirty"] == 0, what="the poller")
    assert 20 <= figures(address)["rows"] < 80

    status, said, alive = demo.stop(number)

    assert status == 0
    assert "Stopping" in said
    assert "Traceback" not in said
    assert alive == []


def test_a_taken_port_is_a_clear_error(place: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        demo = Demo(place, PORT=str(taken.getsockname()[1]))
        said = demo.process.communicate(timeout=60)[0]

    assert demo.process.returncode == 1
    assert "Try another: PORT=8001 make demo" in said


def test_a_dead_process_ends_the_demonstration(demo: Demo) -> None:
    """Half a demonstration would be misleading: it stops, and says who died."""
    demo.address()
    master = next(
        child
        for child in psutil.Process(demo.process.pid).children()
        if "celery" in " ".join(child.cmdline())
    )
    master.kill()

    said = demo.process.communicate(timeout=60)[0]
    assert demo.process.returncode == 1
    assert "Celery ended unexpectedly" in said


def test_the_shop_is_open_to_this_machine_alone(demo: Demo) -> None:
    address = demo.address()
    port = int(address.rstrip("/").rsplit(":", 1)[1])
    listening = {
        connection.laddr.ip
        for connection in psutil.net_connections("inet")
        if connection.status == psutil.CONN_LISTEN and connection.laddr.port == port
    }

    assert listening == {"127.0.0.1"}
