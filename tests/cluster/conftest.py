"""Nodes for the tests of this directory."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from django.db import connection

from tests.processes.conftest import Site

QUICK = {"HEARTBEAT_INTERVAL": 0.2, "NODE_TIMEOUT": 2.0}  # seconds; tests are short of them


class NodeError(Exception):
    """What a process of a node answered with."""


class Process:
    """A process of a node that does what it is told."""

    def __init__(self, process: subprocess.Popen[Any]) -> None:
        self.process = process
        self.seconds = 0.0
        """How long the last answer took, in the process itself."""
        self.answer()

    def ask(self, name: str, *arguments: Any) -> None:
        """Have the process do something; `answer` waits for it."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps([name, *arguments]).encode() + b"\n")
        self.process.stdin.flush()

    def answer(self) -> Any:
        """Return what the last question came to."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, "the process has died"
        answer = json.loads(line)
        self.seconds = answer["seconds"]
        if "error" in answer:
            raise NodeError(answer["error"])
        return answer["result"]

    def __call__(self, name: str, *arguments: Any) -> Any:
        self.ask(name, *arguments)
        return self.answer()

    def signal(self, number: int) -> None:
        os.kill(self.process.pid, number)


class Host(Site):
    """A node: a directory of its own, and any number of processes."""

    driver = "tests.cluster.driver"

    def __init__(self, directory: Path, name: str, **settings: Any) -> None:
        super().__init__(directory, **{**QUICK, "NODE": name, **settings})
        self.name = name
        self.processes: list[Process] = []

    def process(self, *options: str, **environment: Any) -> Process:
        """Start a process of this node, with a candidate for its agent."""
        process = self.start(
            *("-m", self.driver, *options),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            kill=True,
            **environment,
        )
        self.processes.append(Process(process))
        return self.processes[-1]

    def signal(self, number: int) -> None:
        """Kill, stop or continue all processes of the node at once."""
        for process in self.processes:
            process.signal(number)

    def kill(self) -> None:
        self.signal(signal.SIGKILL)
        for process in self.processes:
            process.process.wait()
        self.processes.clear()


@pytest.fixture
def make_host(transactional_db: None, tmp_path: Path) -> Iterator[Callable[..., Host]]:
    """Make a node with this name."""
    with connection.cursor() as cursor:  # no model, so nobody else empties it
        cursor.execute("DELETE FROM deferred_sessions_waiter")
    hosts: list[Host] = []

    def make(name: str, **settings: Any) -> Host:
        hosts.append(Host(tmp_path / name, name, **settings))
        return hosts[-1]

    yield make
    for host in hosts:
        host.signal(signal.SIGCONT)
        host.stop()


@pytest.fixture
def hosts(make_host: Callable[..., Host]) -> list[Host]:
    """Three nodes."""
    return [make_host(name) for name in ("a", "b", "c")]


@pytest.fixture
def nodes(hosts: list[Host]) -> list[Process]:
    """A process of each of three nodes."""
    return [host.process() for host in hosts]
