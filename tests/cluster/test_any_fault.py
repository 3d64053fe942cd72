"""Anything that can happen to processes and nodes, at random, while visitors come and go.

Each visitor counts on keys of its own and remembers what it was told. No node is gone for
longer than NODE_TIMEOUT, so nothing that was acknowledged may be missing in the end.
"""

from __future__ import annotations

import random
import signal
import threading
import time
from collections.abc import Callable

import pytest

from deferred_sessions.models import RefusedWrite, Session
from tests.cluster.conftest import Host, NodeError, Process
from tests.processes.conftest import wait_until

SECONDS = 15.0
SESSIONS, VISITORS = 4, 6


class Visitor(threading.Thread):
    """Comes to any process of any node, and adds 1 to a key of its own in any session."""

    def __init__(self, number: int, seed: int, hosts: list[Host], keys: list[str]) -> None:
        super().__init__()
        self.name = f"v{number}"
        self.random = random.Random(f"{seed} {number}")
        self.host = hosts[number % len(hosts)]
        self.process = self.host.process()
        self.keys = keys
        self.told = dict.fromkeys(keys, 0)
        self.unsure = dict.fromkeys(keys, 0)  # killed before it could answer
        self.errors: list[str] = []
        self.stop = threading.Event()

    def run(self) -> None:
        while not self.stop.is_set():
            key = self.random.choice(self.keys)
            how = self.random.choice(["merge", "lock"])
            try:
                self.process("add", key, self.name, 1, how)
                self.told[key] += 1
            except NodeError as error:
                self.errors.append(str(error))
            except (AssertionError, BrokenPipeError):  # it was killed
                self.unsure[key] += 1
                self.process = self.host.process()


def disturb(visitor: Visitor, chance: random.Random) -> str:
    """Kill the process that serves a visitor, or stop it for a moment."""
    process = visitor.process
    if chance.random() < 0.5:
        process.signal(signal.SIGKILL)
        return "killed"
    process.signal(signal.SIGSTOP)
    time.sleep(chance.uniform(0.05, 0.5))
    process.signal(signal.SIGCONT)
    return "stopped"


@pytest.mark.parametrize("seed", [1, 2])
def test_nothing_acknowledged_is_lost(make_host: Callable[..., Host], seed: int) -> None:
    chance = random.Random(seed)
    hosts = [make_host(name, NODE_TIMEOUT=60.0) for name in ("a", "b", "c")]
    keepers: list[Process] = [host.process() for host in hosts]  # so that no node is gone
    keys = [keepers[n % 3]("create") for n in range(SESSIONS)]
    visitors = [Visitor(n, seed, hosts, keys) for n in range(VISITORS)]
    for visitor in visitors:
        visitor.start()
    until, faults = time.monotonic() + SECONDS, 0
    while time.monotonic() < until:
        time.sleep(chance.uniform(0.1, 1.0))
        disturb(chance.choice(visitors), chance)
        faults += 1
    for visitor in visitors:
        visitor.stop.set()
    for visitor in visitors:
        visitor.join(60)
        assert not visitor.is_alive()
    for keeper in keepers:
        wait_until(lambda keeper=keeper: not keeper("flush"), what="a flush")

    rows = {row.session_key: row.get_decoded() for row in Session.objects.all()}
    done = sum(sum(visitor.told.values()) for visitor in visitors)
    print(f"seed {seed}: {faults} faults, {done} increments, fences {[*fences()]}")
    for visitor in visitors:
        assert not visitor.errors
        for key in keys:
            found, told = rows[key].get(visitor.name, 0), visitor.told[key]
            assert told <= found <= told + visitor.unsure[key], (visitor.name, rows[key])
    assert not RefusedWrite.objects.exists()
    assert done > 100


def fences() -> list[int]:
    return list(Session.objects.values_list("fence", flat=True))
