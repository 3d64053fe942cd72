"""Nodes that die, stop, are cut off or lose their words; nothing acknowledged is lost."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable

import pytest
from django.db import connection

from deferred_sessions.models import Node, RefusedWrite, Session
from tests.cluster.conftest import QUICK, Host, NodeError, Process
from tests.processes.conftest import wait_until

TIMEOUT = QUICK["NODE_TIMEOUT"]


def owner(key: str) -> str:
    """Return the name of the node that has the lease."""
    return str(Session.objects.get(pk=key).owner).partition("#")[0]


def queue() -> list[str]:
    """Return who waits, in order."""
    with connection.cursor() as cursor:
        cursor.execute("SELECT node FROM deferred_sessions_waiter ORDER BY id")
        return [name.partition("#")[0] for (name,) in cursor.fetchall()]


def is_dead(name: str) -> bool:
    return Node.objects.filter(node__startswith=f"{name}#", died_at__isnull=False).exists()


def waited(what: str, process: Process) -> None:
    """Show how long a visitor has waited."""
    print(f"{what}: waited {process.seconds:.3f} s")


def test_c07_first_come_first_served(hosts: list[Host], nodes: list[Process]) -> None:
    """C07: the queue of waiting nodes is served in order."""
    first, second, third = nodes
    key = first("create", {"n": 0})
    first("hold", key, "n")
    second.ask("add", key, "n", 1, "lock")
    wait_until(lambda: queue() == ["b"], what="the second node in the queue")
    third.ask("add", key, "n", 1, "lock")
    wait_until(lambda: queue() == ["b", "c"], what="the third node in the queue")
    fence = Session.objects.get().fence
    first("let_go", key, 10)
    second.answer()
    third.answer()
    assert second.seconds < third.seconds
    assert third("load", key) == {"n": 12}
    assert Session.objects.get().fence == fence + 2


def test_e05_a_node_dies_with_clean_sessions(hosts: list[Host], nodes: list[Process]) -> None:
    """E05: kill -9; others wait for its death to be certain, and later not at all."""
    first, second, _ = nodes
    keys = first("create_many", 3)
    wait_until(lambda: Node.objects.count() == 3, what="all nodes")
    hosts[0].kill()
    assert second("load", keys[0]) == {"n": 0}
    waited("a clean session of a node killed just now", second)
    assert second.seconds > TIMEOUT / 2
    assert second("load", keys[1]) == {"n": 1}
    waited("one after its death is known", second)
    assert second.seconds < 0.5


def test_a_dead_node_returns_with_unsaved_changes(hosts: list[Host], nodes: list[Process]) -> None:
    """Its late writes are refused and kept; what the others have done stands."""
    first, second, _ = nodes
    key, other = first("create", {"n": 1}), first("create", {"n": 2})
    first("change", key, "lost", "by a")
    first("change", other, "kept", "by a")
    hosts[0].kill()
    assert second("load", key) == {"n": 1}
    second("change", key, "n", 5)
    first = hosts[0].process()
    assert first("load", key) == {"n": 5}
    assert first("load", other) == {"n": 2, "kept": "by a"}
    assert first("flush") == ""

    refused = RefusedWrite.objects.get()
    assert (refused.session_key, refused.changed_keys) == (key, ["lost", "n"])
    assert Session(session_data=refused.session_data).get_decoded() == {"n": 1, "lost": "by a"}
    assert first("count", "FENCED") == 1
    assert Session.objects.get(pk=key).get_decoded() == {"n": 5}
    assert Session.objects.get(pk=other).get_decoded() == {"n": 2, "kept": "by a"}


def test_a_stopped_node_wakes_up(hosts: list[Host], nodes: list[Process]) -> None:
    """SIGSTOP for longer than NODE_TIMEOUT: before it serves again, it finds out."""
    first, second, _ = nodes
    key, own = first("create", {"n": 1}), first("create", {"n": 2})
    first("change", key, "late", True)
    first("change", own, "mine", True)
    hosts[0].signal(signal.SIGSTOP)
    assert second("load", key) == {"n": 1}
    waited("a session of a stopped node", second)
    second("change", key, "n", 7)
    first.ask("load", key)  # it waits in the pipe for the node to wake up
    hosts[0].signal(signal.SIGCONT)
    assert first.answer() == {"n": 7}
    assert first("load", own) == {"n": 2, "mine": True}
    assert first("flush") == ""
    assert RefusedWrite.objects.get().session_key == key
    assert Session.objects.get(pk=own).get_decoded() == {"n": 2, "mine": True}
    assert second("load", key) == {"n": 7}


def test_a_waiter_is_killed_in_the_queue(hosts: list[Host], nodes: list[Process]) -> None:
    """It is passed over; the others get their turn."""
    first, second, third = nodes
    key = first("create", {"n": 0})
    first("hold", key, "n")
    second.ask("add", key, "n", 1, "lock")
    wait_until(lambda: queue() == ["b"], what="the second node in the queue")
    third.ask("add", key, "n", 1, "lock")
    wait_until(lambda: queue() == ["b", "c"], what="the third node in the queue")
    hosts[1].kill()
    time.sleep(3.1)  # seconds that a waiter which does not look again is taken to be alive
    first("let_go", key, 10)
    third.answer()
    assert third("load", key) == {"n": 11}
    waited("behind a waiter that was killed", third)


def test_a_waiter_gives_up(make_host: Callable[..., Host]) -> None:
    """It leaves the queue, with an error that says who has the session."""
    first = make_host("a").process()
    second = make_host("b", LOCK_TIMEOUT=0.5).process()
    key = first("create", {"n": 0})
    first("hold", key, "n")
    with pytest.raises(NodeError, match=r"SessionBusy: Node a has held on to the session for 0.5"):
        second("load", key)
    assert queue() == []
    first("let_go", key, 1)
    assert second("load", key) == {"n": 1}


def test_the_agent_of_the_owner_is_killed(hosts: list[Host]) -> None:
    """Another process of the node takes over, and gives up what is asked for."""
    agent = hosts[0].process()
    wait_until(Node.objects.exists, what="the agent")
    worker = hosts[0].process()
    key = worker("create", {"n": 1})
    agent.signal(signal.SIGKILL)
    second = hosts[1].process()
    assert second("load", key) == {"n": 1}
    waited("for a node whose agent was killed", second)
    assert worker("load", key) == {"n": 1}
    assert not is_dead("a")


@pytest.mark.parametrize("agents", [(), ("--no-agent",)], ids=["polling", "no agent that waits"])
def test_without_listen(make_host: Callable[..., Host], agents: tuple[str, ...]) -> None:
    """NOTIFY is an accelerator: what nobody hears is found by looking."""
    make = {"env": {"TEST_DEAF": "1"}}
    first = make_host("a").process(**make)
    second = make_host("b").process(*agents, **make)
    key = first("create", {"n": 0})
    first("change", key, "n", 1)
    assert second("load", key) == {"n": 1}
    waited("without LISTEN", second)
    second("change", key, "n", 2)
    assert second("flush") == ""
    if not agents:
        assert first("load", key) == {"n": 2}


def test_nodes_that_cannot_read_each_other(make_host: Callable[..., Host]) -> None:
    """Told at start-up, in the log of both."""
    first = make_host("a").process()
    first("create", {"n": 1})
    second = make_host("b").process(env={"SECRET_KEY": "other" * 12})
    wait_until(lambda: Node.objects.count() == 2, what="both nodes")
    for process in (first, second):
        wait_until(
            lambda process=process: any("SECRET_KEY" in line for line in process("logged")),
            what="the message",
        )


def test_two_nodes_of_one_name(make_host: Callable[..., Host], tmp_path: object) -> None:
    first = make_host("a").process()
    wait_until(lambda: Node.objects.count() == 1, what="the first node")
    make_host("b", NODE="a").process()
    wait_until(
        lambda: any("is called a, too" in line for line in first("logged")), what="the message"
    )
