"""E06: session servers die, hang and return with their old data, while visitors come."""

from __future__ import annotations

import time

import pytest

from deferred_sessions.exceptions import (
    ServerUnavailableError,
    SessionAwayError,
    SessionBusy,
)
from tests.cluster.conftest import NodeError, Process
from tests.fleet.conftest import Fleet, FleetHost
from tests.fleet.servers import CONNECT_TIMEOUT
from tests.processes.conftest import wait_until

SESSIONS = 30
EXCUSED = {error.__name__ for error in (ServerUnavailableError, SessionAwayError, SessionBusy)}
PATIENCE = CONNECT_TIMEOUT + 1.0 + 2.0 + 5.0
"""Seconds that a request may take: to connect, SERVER_TIMEOUT, the wait for the next view of
the servers, and what a machine with two cores needs for all the rest."""


def settle(fleet: Fleet, processes: list[Process]) -> dict[str, dict[str, int]]:
    """Send the visitors away, have all written; return what the servers have."""
    for process in processes:
        process("leave")
    for process in processes:
        wait_until(lambda process=process: process("flush") == "", what="a flush")
    return fleet.sessions(processes[0])


def still_served(fleet: Fleet, process: Process, seconds: float) -> None:
    """Wait that long; visitors must have got on with it all the time."""
    time.sleep(seconds)
    process("count", "LOADS")
    assert time.monotonic() - fleet.verdict().last < 2.0, "no update was acknowledged lately"


@pytest.mark.parametrize("copies", [1, 2])
def test_e06_a_session_server_dies_and_returns(fleet: Fleet, copies: int) -> None:
    """E06: kill -9 under load, then its return with old data, then the next one at once."""
    fleet.settings["COPIES"] = copies
    hosts = [fleet.host(name) for name in "nm"]
    keys = [key for host in hosts for key in host.process()("create_many", SESSIONS // 2)]
    nodes = [host.visited(keys, visitors=2) for host in hosts]
    still_served(fleet, nodes[0], 0.5)

    began = time.monotonic()
    fleet["a"].kill()
    fleet.wait_until_out("a")
    out = time.monotonic() - began
    still_served(fleet, nodes[0], 1.0)
    began = time.monotonic()
    fleet["a"].start()
    fleet.wait_until_whole()
    repaired = time.monotonic() - began
    fleet["b"].kill()
    fleet.wait_until_out("b")
    still_served(fleet, nodes[0], 1.0)
    fleet["b"].start()
    fleet.wait_until_whole()

    sessions = settle(fleet, nodes)
    verdict = fleet.verdict()
    print(f"COPIES {copies}: {verdict}; out after {out:.1f} s, repaired {repaired:.1f} s after")
    assert verdict.wrong(sessions) == []
    assert verdict.errors.keys() <= (EXCUSED if copies == 1 else {SessionBusy.__name__})
    fleet.wait_until_whole()
    assert {len(aliases) for aliases in fleet.where().values()} == {copies}
    assert verdict.updates > 100


def test_e06_what_nobody_holds(fleet: Fleet) -> None:
    """E06: with one copy an error until its server is back; never "no such session"."""
    host = fleet.host("n")
    process = host.process()
    keys = process("create_many", 20)
    process("evict", keys)
    places = fleet.where()
    fleet["a"].kill()
    fleet.wait_until_out("a")
    for number, key in enumerate(keys):
        if places[key] == ["a"]:
            with pytest.raises(NodeError, match="SessionAwayError"):
                process("load", key)
        else:
            assert process("load", key) == {"n": number}
    fleet["a"].start()
    fleet.wait_until_whole()
    assert [process("load", key)["n"] for key in keys] == [*range(20)]


def test_e06_two_servers_dead_at_once(fleet: Fleet) -> None:
    """E06: what nodes hold is served without an error, and written when it can be."""
    fleet.settings["COPIES"] = 2
    hosts = [fleet.host(name) for name in "nm"]
    nodes = []
    for host in hosts:
        process = host.process()
        nodes.append(host.visited(process("create_many", SESSIONS // 2), visitors=2))
    still_served(fleet, nodes[0], 0.5)
    fleet["a"].kill()
    fleet["b"].kill()
    fleet.wait_until_out("a", "b")
    still_served(fleet, nodes[0], 2.0)
    began = time.monotonic()
    fresh = nodes[0]("create", {"while": "two are dead"})
    print(f"a new session while two of three are dead: {nodes[0].seconds:.3f} s")
    fleet["b"].start()
    fleet["a"].start()
    fleet.wait_until_whole()
    print(f"repaired {time.monotonic() - began:.1f} s later")
    fleet["c"].kill()
    fleet.wait_until_out("c")
    still_served(fleet, nodes[0], 1.0)
    assert nodes[1]("load", fresh) == {"while": "two are dead"}
    fleet["c"].start()
    fleet.wait_until_whole()
    sessions = settle(fleet, nodes)
    verdict = fleet.verdict()
    print(verdict)
    assert verdict.wrong(sessions) == []
    assert not verdict.errors
    assert {len(aliases) for aliases in fleet.where().values()} == {2}


def test_e06_a_server_hangs(fleet: Fleet) -> None:
    """E06: it takes connections and never answers: every request ends within its time."""
    fleet.settings["COPIES"] = 2
    host: FleetHost = fleet.host("n")
    process = host.visited(host.process()("create_many", SESSIONS), visitors=2)
    waiting = host.process()
    keys = waiting("create_many", 12)
    waiting("evict", keys)
    places = fleet.where()
    fleet["a"].stop()
    longest, failed = 0.0, {}
    for number, key in enumerate(keys):
        try:
            assert waiting("load", key) == {"n": number}
        except NodeError as error:
            failed[key] = str(error).partition(":")[0]
        longest = max(longest, waiting.seconds)
        waiting("create", {"n": number})
        longest = max(longest, waiting.seconds)
    fleet.wait_until_out("a")
    waiting("create", {"n": 0})
    after = waiting.seconds
    still_served(fleet, process, 1.0)
    fleet["a"].resume()
    fleet.wait_until_whole()
    sessions = settle(fleet, [process])
    verdict = fleet.verdict()
    print(f"hangs: a request took {longest:.2f} s at most, {after:.3f} s later on")
    print(verdict)
    assert {name for key, name in failed.items()} <= EXCUSED
    assert all("a" in places[key] for key in failed)
    assert longest < PATIENCE
    assert after < 0.5
    assert verdict.wrong(sessions) == []
    assert not verdict.errors
    assert [process("load", key)["n"] for key in keys] == [*range(12)]
