"""What it takes to hand a session from node to node: three nodes on this machine."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from benchmarks.measure import Goal, Scale, Table

NAMES = ("a", "b", "c")
DRAINED = 1_000  # sessions
NODE = """
import json, sys, time
import django; django.setup()
from deferred_sessions.backend import SessionStore
from deferred_sessions.memory.counters import Counter
from deferred_sessions.runtime import get_runtime
get_runtime().agent.start()

def create(count):
    keys = []
    for _ in range(count):
        session = SessionStore()
        session["n"] = 0
        session.save()
        keys.append(session.session_key)
    return keys

def change(keys):
    for key in keys:
        session = SessionStore(key)
        session["n"] += 1
        session.save()

def load(keys):
    times = []
    for key in keys:
        started = time.perf_counter()
        SessionStore(key)["n"]
        times.append(time.perf_counter() - started)
    return times

def handed_over():
    return get_runtime().counters.totals()[Counter.HANDED_OVER]

for line in sys.stdin:
    name, *arguments = json.loads(line)
    print(json.dumps(globals()[name](*arguments)), flush=True)
get_runtime().agent.stop()
"""
DRAIN = """
import django; django.setup()
from django.core.management import call_command
call_command("drainsessions")
"""


def measure(scale: Scale) -> Iterator[Table | Goal]:
    """Yield what is to be reached, and the figures behind it."""
    scale.progress("sessions handed from node to node")
    rounds, count = scale.of(6, 2), scale.of(100, 30)
    with ExitStack() as stack:
        place = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        nodes = [stack.enter_context(Node(place / name)) for name in NAMES]
        clean, dirty = hand_overs(nodes, rounds, count)
        before = sum(node("handed_over") for node in nodes)
        for node in nodes:  # each visitor stays with one node
            keys = node("create", 10)
            for _ in range(100 // len(nodes)):
                node("change", keys)
        sticky = sum(node("handed_over") for node in nodes) - before
        drained = drain(nodes[0], nodes[1])
    yield Table(
        "from asking for a session that another node has, to having it",
        ("session", "p50, ms", "p99, ms", "hand-overs"),
        [row("clean", clean), row("changed and not written yet", dirty)],
    )
    yield Goal("hand-over of a clean session, p50", percentile(clean, 50), 5, unit=" ms")
    yield Goal("hand-over of a clean session, p99", percentile(clean, 99), 30, unit=" ms")
    yield Goal("hand-over of a changed session, p50", percentile(dirty, 50), 8, unit=" ms")
    yield Goal("hand-overs per 1,000 requests with sticky routing", float(sticky), 0)
    yield Goal(f"drainsessions of {DRAINED} sessions", drained, 1, unit=" s")


class Node:
    """A process that is a node with an agent, and does what it is told."""

    def __init__(self, place: Path) -> None:
        self.environment = {
            **os.environ,
            "SESSION_DIRECTORY": str(place),
            "DEFERRED_SESSIONS": json.dumps({"NODE": place.name, "STORE_SIZE": 32 << 20}),
        }

    def __enter__(self) -> Node:
        self._process = subprocess.Popen(
            [sys.executable, "-c", NODE],
            env=self.environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        return self

    def __exit__(self, *_: object) -> None:
        self._process.communicate()

    def __call__(self, *call: Any) -> Any:
        """Have the process call a function; return what that returned."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(json.dumps(call), file=self._process.stdin, flush=True)
        return json.loads(self._process.stdout.readline())


def hand_overs(nodes: list[Node], rounds: int, count: int) -> tuple[list[float], list[float]]:
    """Return how long each hand-over took, in milliseconds: of clean ones, of changed ones."""
    clean: list[float] = []
    dirty: list[float] = []
    keys = nodes[0]("create", count)
    for turn in range(1, rounds + 1):
        for times, changes in ((clean, False), (dirty, True)):
            owner, asker = nodes[(turn - 1) % len(nodes)], nodes[turn % len(nodes)]
            owner("load", keys)
            if changes:
                owner("change", keys)
            times += [each * 1e3 for each in asker("load", keys)]
    return clean, dirty


def drain(node: Node, other: Node) -> float:
    """Return the seconds in which a node gives up its sessions, half of them changed."""
    keys = node("create", DRAINED)
    node("change", keys[::2])
    done = subprocess.run(
        [sys.executable, "-c", DRAIN],
        env=node.environment,
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    )
    other("load", keys[:10])
    return float(done.stdout.rpartition(" in ")[2].partition(" s")[0])


def row(name: str, times: list[float]) -> tuple[str, str, str, str]:
    """Return a row of the table."""
    return name, f"{percentile(times, 50):.2f}", f"{percentile(times, 99):.2f}", str(len(times))


def percentile(times: list[float], part: int) -> float:
    """Return a percentile."""
    return statistics.quantiles(times, n=100)[part - 1]
