"""What happens while a session server is put in order: deletions, deaths, two at once."""

from __future__ import annotations

import os
import signal
import time

from tests.fleet.conftest import Fleet
from tests.processes.conftest import wait_until

PAGES = {"TEST_PAGE": "10"}  # rows: so that a repair takes long enough to be killed
EMPTY = "TRUNCATE deferred_sessions_session"
DELETE = "DELETE FROM deferred_sessions_session WHERE session_key = %s"


def test_what_was_deleted_meanwhile_stays_deleted(fleet: Fleet) -> None:
    """By a visitor, by SQL, and with nobody who remembers it but the servers."""
    fleet.settings["COPIES"] = 2
    host = fleet.host("n")
    process = host.process()
    keys = process("create_many", 30)
    places = fleet.where()
    fleet["a"].kill()
    fleet.wait_until_out("a")
    for key in keys[:10]:
        process("delete", key)
    wait_until(lambda: process("flush") == "", what="the sessions at those that stand in")
    for key in keys[10:20]:
        for alias in "bc":
            fleet[alias].ask(DELETE, key)
    wait_until(lambda: process("load", keys[19]) == {}, what="the end of a session")
    process("evict", keys)
    host.kill()
    host.process()
    fleet["a"].start()
    fleet.wait_until_whole()
    assert fleet.where().keys() == set(keys[20:])
    assert all(len(aliases) == 2 for aliases in fleet.where().values())
    assert places.keys() == set(keys)


def test_a_table_is_emptied_while_another_server_is_away(fleet: Fleet) -> None:
    """Whose sessions were there until then; what came later stays."""
    fleet.settings["COPIES"] = 2
    process = fleet.host("n").process()
    keys = process("create_many", 20)
    fleet["a"].kill()
    fleet.wait_until_out("a")
    for alias in "bc":
        fleet[alias].ask(EMPTY)
    wait_until(lambda: all(process("load", key) == {} for key in keys), what="the end of all")
    fresh = process("create_many", 20)
    fleet["a"].start()
    fleet.wait_until_whole()
    assert fleet.where().keys() == set(fresh)


def test_the_one_who_repairs_is_killed(fleet: Fleet) -> None:
    """Another one takes over where it was: at once if it is of the same node."""
    hosts = [fleet.host(name, WRITE_ON_CREATE=False) for name in "nm"]
    nodes = [host.process(env=PAGES) for host in hosts]
    keys = [key for node in nodes for key in node("create_in_memory", 1500)]
    fleet["c"].kill()
    fleet.wait_until_out("c")
    for node in nodes:
        wait_until(lambda node=node: node("flush") == "", what="a flush")
    fleet["c"].start()

    def at_work() -> tuple[str, str] | None:
        rows = fleet["c"].ask(
            "SELECT repairer, position FROM deferred_sessions_server"
            " WHERE server = 'c' AND phase = 'filling' AND position LIKE '%, 3, %'"
        )
        return rows[0] if rows else None

    repairer, position = wait_until(at_work, what="a repair")
    pid = int(repairer.partition("/")[2])
    os.kill(pid, signal.SIGKILL)
    killed = next(host for host in hosts if host.name == repairer.partition("#")[0])
    killed.kill()
    began = time.monotonic()
    killed.process(env=PAGES)
    fleet.wait_until_whole(60)
    print(f"killed at {position}; whole {time.monotonic() - began:.1f} s later")
    places = fleet.where()
    assert places.keys() == set(keys)
    assert {len(aliases) for aliases in places.values()} == {1}


def test_repair_by_hand(fleet: Fleet) -> None:
    """`resyncsessions` finds what is missing, older, or in the wrong place; twice at once."""
    fleet.settings["COPIES"] = 2
    host = fleet.host("n")
    process = host.process()
    keys = process("create_many", 60)
    right, places = fleet.sessions(process), fleet.where()
    for key in keys[:20]:
        fleet[places[key][1]].ask(f"SET deferred_sessions.node = '-'; {DELETE % repr(key)}")
    stray = next(alias for alias in "abc" if alias not in places[keys[20]])
    fleet[stray].ask(
        "INSERT INTO deferred_sessions_session (session_key, session_data, expire_date, version)"
        " VALUES (%s, 'old', now() + interval '1 day', 0)",
        keys[20],
    )
    checked = host.run("manage.py", "resyncsessions", "--check")
    print(checked)
    assert [line.split()[-2:] for line in checked.splitlines()[1:]] != [["0", "0"]] * 3
    two = [host.start("manage.py", "resyncsessions") for _ in range(2)]
    assert [each.wait(60) for each in two] == [0, 0]
    assert fleet.where() == places
    assert fleet.sessions(process) == right
    checked = host.run("manage.py", "resyncsessions", "--check")
    assert [line.split()[-2:] for line in checked.splitlines()[1:]] == [["0", "0"]] * 3
