"""Who has which session, when all is well, and when a server is added or taken away."""

from __future__ import annotations

from collections import Counter

import pytest

from tests.fleet.conftest import Fleet
from tests.processes.conftest import wait_until

SESSIONS = 10_000
LATER = {"WRITE_ON_CREATE": False}  # so that ten thousand take a second


@pytest.mark.parametrize("copies", [1, 2])
def test_e03_e04_each_session_on_so_many_servers(fleet: Fleet, copies: int) -> None:
    """E03: the subsets do not overlap. E04: each session is on two servers."""
    fleet.settings["COPIES"] = copies
    process = fleet.host("n", STORE_SIZE=64 << 20, **LATER).process()
    keys = process("create_in_memory", SESSIONS)
    places = fleet.where()
    assert places.keys() == set(keys)
    assert {len(aliases) for aliases in places.values()} == {copies}
    shares = Counter(alias for aliases in places.values() for alias in aliases)
    even = SESSIONS * copies / 3
    print(f"COPIES {copies}: {dict(shares)}, {process.seconds:.1f} s")
    assert all(abs(share / even - 1) < 0.05 for share in shares.values())


def test_e02_the_servers_have_what_all_nodes_have(fleet: Fleet) -> None:
    """E02: whatever node a session is on, the servers have all of it."""
    nodes = [fleet.host(name).process() for name in "nm"]
    keys = [key for node in nodes for key in node("create_many", 20)]
    for node in nodes:
        for number, key in enumerate(keys):
            node("change", key, "n", number)
    for node in nodes:
        assert node("flush") == ""
    assert fleet.sessions(nodes[0]) == {key: {"n": number} for number, key in enumerate(keys)}


def test_a_server_is_added(fleet: Fleet) -> None:
    """Online: at most its share moves, and visitors notice nothing."""
    fleet.settings["SERVERS"] = ["a", "b"]
    first = fleet.host("n", STORE_SIZE=64 << 20, **LATER)
    second = fleet.host("m")
    keys = first.process()("create_in_memory", SESSIONS)
    before = fleet.where()
    visited = second.visited(keys[:50], visitors=2)
    for host in (first, second):  # a rolling deploy
        host.settings["SERVERS"] = ["a", "b", "c"]
    first.kill()
    process = first.process()
    second.kill()
    visited = second.visited(keys[:50], visitors=2)
    wait_until(lambda: fleet["c"].phases().get("c") == "in", what="the new server")
    fleet.wait_until_whole()
    visited("leave")
    assert visited("flush") == process("flush") == ""

    after = fleet.where()
    moved = sum(before[key] != after[key] for key in keys)
    print(f"added a third server: {moved} of {SESSIONS} sessions moved")
    assert {len(aliases) for aliases in after.values()} == {1}
    assert 0.30 < moved / SESSIONS < 1 / 3 + 0.03
    assert all(after[key] in (before[key], ["c"]) for key in keys)
    verdict = fleet.verdict()
    print(verdict)
    assert not verdict.errors
    assert verdict.wrong(fleet.sessions(visited)) == []


def test_a_server_is_taken_away(fleet: Fleet) -> None:
    """Its sessions are found at once, and leave it with `rebalancesessions`."""
    host = fleet.host("n", STORE_SIZE=64 << 20, **LATER)
    process = host.process()
    keys = process("create_in_memory", 2000)
    before = fleet.where()
    process("evict", keys)
    host.kill()
    host.settings["SERVERS"] = ["a", "b"]
    process = host.process()
    wait_until(lambda: process("phases").get("c") == "leaving", what="the server to leave")
    late = next(key for key in keys if before[key] == ["c"])
    assert process("load", late) == {"n": keys.index(late)}

    print(host.run("manage.py", "rebalancesessions", "--check"))
    assert fleet["c"].sessions()
    print(host.run("manage.py", "rebalancesessions"))
    assert not fleet["c"].sessions()
    after = fleet.where()
    assert {len(aliases) for aliases in after.values()} == {1}
    assert after.keys() == set(keys)
    assert all(after[key] == before[key] for key in keys if before[key] != ["c"])


def test_weights_are_changed(fleet: Fleet) -> None:
    """Online, host by host, without a command: the agents bring each session to its place."""
    fleet.settings["SERVERS"] = {"a": 1, "b": 1, "c": 1}
    hosts = [fleet.host(name, STORE_SIZE=64 << 20, **LATER) for name in "nm"]
    process = hosts[0].process()
    hosts[1].process()
    keys = process("create_in_memory", 2000)
    before = fleet.where()
    process("evict", keys)
    for host in hosts:
        host.kill()
        host.settings["SERVERS"] = {"a": 1, "b": 1, "c": 4}
        host.process()
    visited = [host.visited(keys, visitors=2) for host in hosts]
    found = [visited[0]("load", key)["n"] for key in keys[::10]]
    fleet.wait_until_whole()
    for each in visited:
        each("leave")
        assert each("flush") == ""

    after = fleet.where()
    shares = Counter(alias for aliases in after.values() for alias in aliases)
    moved = sum(before[key] != after[key] for key in keys)
    print(f"c with weight 4: {dict(shares)}, {moved} of {len(keys)} moved; {fleet.verdict()}")
    assert found == [*range(0, len(keys), 10)]
    assert {len(aliases) for aliases in after.values()} == {1}
    assert after.keys() == set(keys)
    assert abs(shares["c"] / len(keys) - 4 / 6) < 0.05
    assert all(after[key] in (before[key], ["c"]) for key in keys)
    verdict = fleet.verdict()
    assert verdict.wrong(fleet.sessions(visited[0])) == []
    assert not verdict.errors


def test_a_server_is_named_again(fleet: Fleet) -> None:
    """Before it was empty: it has old rows, and sessions that were deleted meanwhile."""
    host = fleet.host("n", STORE_SIZE=64 << 20, **LATER)
    process = host.process()
    keys = process("create_in_memory", 600)
    before = fleet.where()
    process("evict", keys)
    host.kill()
    host.settings["SERVERS"] = ["a", "b"]
    visited = host.visited(keys[:300], visitors=3, pause=0.002)
    wait_until(lambda: visited("phases").get("c") == "leaving", what="the server to leave")
    ended = [key for key in keys[300:400] if before[key] == ["c"]]
    for key in ended:
        visited("delete", key)
    wait_until(lambda: fleet.verdict().updates > 300, what="visitors to come", seconds=60)
    visited("leave")
    assert visited("flush") == ""
    visited("evict", keys)
    host.kill()

    host.settings["SERVERS"] = ["a", "b", "c"]
    visited = host.visited(keys[:300], visitors=3)
    fleet.wait_until_whole()
    visited("leave")
    assert visited("flush") == ""
    verdict = fleet.verdict()
    print(f"{len(ended)} deleted; {verdict}")
    after = fleet.where()
    assert {len(aliases) for aliases in after.values()} == {1}
    assert after.keys() == set(keys) - set(ended)
    assert all(after[key] == before[key] for key in after)
    assert verdict.wrong(fleet.sessions(visited)) == []
    assert not verdict.errors


def test_a_deploy_that_is_rolled_back(fleet: Fleet) -> None:
    """For a while two hosts differ in a server; visitors of both use the same sessions."""
    first, second = fleet.host("n"), fleet.host("m")
    stays = second.process()
    keys = stays("create_many", 60)
    stays("visit", ["m-0", "m-1"], keys, str(second.diary))
    for names in (["a", "b"], {"a": 1, "b": 1, "c": 9}, ["a", "b", "c"]):
        first.settings["SERVERS"] = names
        visited = first.visited(keys, visitors=2)
        least = fleet.verdict().updates + 200
        wait_until(lambda least=least: fleet.verdict().updates > least, what="visitors to come")
        visited("leave")
        assert visited("flush") == ""
        assert set(stays("phases").values()) == {"in"}  # not before both want something else
        first.kill()
    stays("leave")
    fleet.wait_until_whole()
    assert stays("flush") == ""
    verdict = fleet.verdict()
    print(verdict)
    assert verdict.wrong(fleet.sessions(stays)) == []
    assert not verdict.errors


def test_a_single_server_is_left(fleet: Fleet) -> None:
    """The other one has weight 0 until it is empty; nobody is logged out, nothing is lost."""
    fleet.settings["SERVERS"] = ["a", "b"]
    host = fleet.host("n", STORE_SIZE=64 << 20, **LATER)
    process = host.process()
    keys = process("create_in_memory", 2000)
    before = fleet.where()
    process("evict", keys[::2])
    for key in keys[1::4]:
        process("change", key, "late", 1)  # memory has it, and nothing else
    host.kill()
    host.settings["SERVERS"] = {"a": 1, "b": 0}
    process = host.process()
    wait_until(lambda: process("phases").get("b") == "leaving", what="the server to leave")
    assert process("phases")["a"] == "in"
    visited = host.visited(keys, visitors=2)
    key = next(key for key in keys[::2] if before[key] == ["b"])
    assert process("load", key)["n"] == keys.index(key)

    print(host.run("manage.py", "rebalancesessions"))
    assert not fleet["b"].sessions()
    visited("leave")
    assert process("flush") == ""
    assert not fleet["b"].sessions()
    host.kill()
    host.settings["SERVERS"] = ["a"]
    fleet.settings["SERVERS"] = ["a"]
    process = host.process()
    found = [process("load", key) for key in keys]
    assert [session["n"] for session in found] == [*range(len(keys))]
    assert all(session["late"] == 1 for session in found[1::4])
    verdict = fleet.verdict()
    print(verdict)
    assert verdict.wrong(dict(zip(keys, found, strict=True))) == []
    assert not verdict.errors
