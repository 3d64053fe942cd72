"""Anything that can happen to nodes and session servers, at random, while visitors come.

    FLEET_FAULT_SECONDS=60 FLEET_FAULT_SEED=7 pytest tests/fleet/test_any_fault.py -s

The same seed makes the same plan. One server at least is up and trusted at any time, no node
is gone for longer than NODE_TIMEOUT, and each session has two copies: so nothing that was
acknowledged may be missing in the end, and nobody may ever read less than that.
"""

from __future__ import annotations

import os
import random
import signal
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

from deferred_sessions.exceptions import (
    ServerUnavailableError,
    SessionAwayError,
    SessionBusy,
)
from tests.cluster.conftest import Process
from tests.fleet.conftest import Fleet, FleetHost
from tests.processes.conftest import wait_until

SECONDS = float(os.environ.get("FLEET_FAULT_SECONDS", "12"))
SEED = int(os.environ.get("FLEET_FAULT_SEED", "1"))
SESSIONS, VISITORS = 12, 2
FAULTS = (
    *("server killed", "server killed", "server hangs"),
    *("process killed", "node killed", "process stopped"),
)
EXCUSED = {error.__name__ for error in (ServerUnavailableError, SessionAwayError, SessionBusy)}


class Fault(NamedTuple):
    """What is to happen to whom, when, and for how long. Times in seconds."""

    at: float
    what: str
    whom: str
    lasts: float


def plan(seed: int, seconds: float) -> list[Fault]:
    """Return what is to happen, in order."""
    chance, at, faults = random.Random(seed), 0.0, []
    while (at := at + chance.uniform(0.2, 1.2)) < seconds:
        what = chance.choice(FAULTS)
        whom = chance.choice("abc" if what.startswith("server") else "xyz")
        faults.append(Fault(at, what, whom, chance.uniform(0.2, 4.0)))
    return faults


class Mischief:
    """Makes faults, and mends them when they have lasted long enough."""

    def __init__(self, fleet: Fleet, hosts: dict[str, FleetHost], keys: list[str]) -> None:
        self.fleet = fleet
        self.hosts = hosts
        self.keys = keys
        self.done: Counter[str] = Counter()
        self.visited: dict[str, Process] = {name: self.visit(name) for name in hosts}
        self._mend: list[tuple[float, Callable[[], object]]] = []
        self._returning: dict[str, Future[Process]] = {}
        self._pool = ThreadPoolExecutor()

    def visit(self, name: str) -> Process:
        host = self.hosts[name]
        if not host.processes:
            host.process()  # one without visitors, so that the agent may be another
        return host.visited(self.keys, VISITORS, pause=0.02)

    def make(self, fault: Fault) -> None:
        """Make this fault, unless too much would be broken then."""
        what, whom = fault.what, fault.whom
        if not self.may_fall(whom) if what.startswith("server") else not self.is_there(whom):
            self.done["left out"] += 1
            return
        if what.startswith("server"):
            server = self.fleet[whom]
            (server.kill if what == "server killed" else server.stop)()
            self._mend.append((time.monotonic() + fault.lasts, server.start))
        elif what == "process stopped":
            process = self.visited[whom]
            process.signal(signal.SIGSTOP)
            time.sleep(min(fault.lasts, 1.0))
            process.signal(signal.SIGCONT)
        else:
            host = self.hosts[whom]
            if what == "node killed":
                host.kill()
            else:
                self.visited[whom].signal(signal.SIGKILL)
                host.processes.remove(self.visited[whom])
            self._returning[whom] = self._pool.submit(self.visit, whom)
        self.done[what] += 1

    def is_there(self, name: str, *, wait: bool = False) -> bool:
        """Tell whether a node has its visitors again; or wait until it has."""
        if name in self._returning and (wait or self._returning[name].done()):
            self.visited[name] = self._returning.pop(name).result()
        return name not in self._returning

    def may_fall(self, alias: str) -> bool:
        """Tell whether a server that is up and trusted would be left."""
        live = self.fleet.live()
        others = [server for server in live if server.alias != alias]
        is_up = any(server.alias == alias for server in live)
        records = [server.phases() for server in others]
        return is_up and any(
            all(record.get(server.alias, "in") == "in" for record in records) for server in others
        )

    def mend(self, *, everything: bool = False) -> None:
        """Mend what has lasted long enough; or everything, and wait for that."""
        due = [entry for entry in self._mend if everything or entry[0] <= time.monotonic()]
        self._mend = [entry for entry in self._mend if entry not in due]
        for _, mend in due:
            mend()
        if everything:
            assert all(self.is_there(name, wait=True) for name in self.hosts)


def test_nothing_acknowledged_is_lost(fleet: Fleet) -> None:
    fleet.settings.update(COPIES=2, NODE_TIMEOUT=60.0)
    hosts = {name: fleet.host(name) for name in "xyz"}
    keys = [key for host in hosts.values() for key in host.process()("create_many", SESSIONS // 3)]
    mischief = Mischief(fleet, hosts, keys)
    began = time.monotonic()
    for fault in plan(SEED, SECONDS):
        while time.monotonic() < began + fault.at:
            time.sleep(0.02)
            mischief.mend()
        mischief.make(fault)
    mischief.mend(everything=True)
    fleet.wait_until_whole(60)
    processes = list(mischief.visited.values())
    for process in processes:
        process("leave")
    for process in processes:
        wait_until(lambda process=process: process("flush") == "", what="a flush")
    fleet.wait_until_whole()

    verdict, sessions = fleet.verdict(), fleet.sessions(processes[0])
    print(f"seed {SEED}, {time.monotonic() - began:.0f} s: {dict(mischief.done)}")
    print(f"{verdict}; {len(verdict.lost(sessions))} lost")
    assert verdict.wrong(sessions) == []
    assert verdict.errors.keys() <= EXCUSED
    assert verdict.updates > 100
    assert {len(aliases) for aliases in fleet.where().values()} == {2}
    for server in fleet.servers.values():
        assert server.ask("SELECT count(*) FROM deferred_sessions_refused_write") == [(0,)]
