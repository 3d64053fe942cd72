"""Who waits for a session: several of one node, behind one who never rests, without agents."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest

from deferred_sessions.models import Session
from tests.cluster.conftest import Host, NodeError
from tests.cluster.test_faults import is_dead, owner, queue, waited
from tests.processes.conftest import wait_until


def test_one_who_gives_up_leaves_the_place_to_the_other(make_host: Callable[..., Host]) -> None:
    """Two processes of a node have one place in the queue; the last one to give up leaves it."""
    first, third = make_host("a").process(), make_host("c").process()
    host = make_host("b", LOCK_TIMEOUT=1.0)
    hasty = host.process()
    host.settings["LOCK_TIMEOUT"] = 30.0
    patient = host.process()
    key = first("create", {"n": 0})
    first("hold", key, "n")
    hasty.ask("load", key)
    wait_until(lambda: queue() == ["b"], what="the hasty one in the queue")
    patient.ask("add", key, "n", 1, "lock")
    third.ask("add", key, "n", 1, "lock")
    wait_until(lambda: queue() == ["b", "c"], what="the other node in the queue")
    with pytest.raises(NodeError, match="SessionBusy"):
        hasty.answer()
    assert queue() == ["b", "c"]
    first("let_go", key, 10)
    patient.answer()
    third.answer()
    assert third("load", key) == {"n": 12}


def test_the_last_one_to_give_up_leaves_the_queue(make_host: Callable[..., Host]) -> None:
    first = make_host("a").process()
    host = make_host("b", LOCK_TIMEOUT=1.0)
    others = [host.process(), host.process()]
    key = first("create", {"n": 0})
    first("hold", key, "n")
    for process in others:
        process.ask("load", key)
    for process in others:
        with pytest.raises(NodeError, match="SessionBusy"):
            process.answer()
    assert queue() == []


def test_one_of_two_who_wait_is_killed(make_host: Callable[..., Host]) -> None:
    """The kernel forgets that it waited: the other one leaves the queue at once."""
    first = make_host("a").process()
    host = make_host("b", LOCK_TIMEOUT=30.0)
    killed = host.process()
    host.settings["LOCK_TIMEOUT"] = 1.0
    other = host.process()
    key = first("create", {"n": 0})
    first("hold", key, "n")
    killed.ask("load", key)
    wait_until(lambda: queue() == ["b"], what="the first in the queue")
    other.ask("load", key)
    killed.signal(9)
    killed.process.wait()
    host.processes.remove(killed)
    with pytest.raises(NodeError, match="SessionBusy"):
        other.answer()
    assert queue() == []


def test_behind_one_who_never_rests(make_host: Callable[..., Host]) -> None:
    """The owner saves the session thousands of times a second; each of these saves counts."""
    first = make_host("a", LOCK_TIMEOUT=30.0).process()
    second = make_host("b", LOCK_TIMEOUT=2.0).process()
    key = first("create", {"n": 0})
    first("add", key, "n", 100)
    first.ask("add_for", key, "n", 5.0)
    for _ in range(10):
        second("add", key, "b")
        waited("behind one who never rests", second)
        wait_until(lambda: owner(key) == "a", what="the one who never rests")
    times = first.answer()
    assert first("load", key) == {"n": 100 + times, "b": 10}
    assert first("flush") == ""
    assert Session.objects.get().get_decoded() == {"n": 100 + times, "b": 10}


def test_a_node_without_an_agent(make_host: Callable[..., Host]) -> None:
    """Found dead when it is idle, and told with its next request; one that is busy lets go."""
    first = make_host("a").process("--no-agent")
    second = make_host("b").process()
    key, wanted, used = (first("create", {"n": n}) for n in (1, 2, 3))
    assert first("load", key) == {"n": 1}
    assert second("load", key) == {"n": 1}
    waited("for an idle node without an agent", second)
    assert is_dead("a")
    second("change", key, "n", 7)
    assert first("load", key) == {"n": 7}
    assert not is_dead("a")

    second.ask("load", wanted)
    until = time.monotonic() + 30
    while owner(wanted) != "b" and time.monotonic() < until:
        first("load", used)
    assert second.answer() == {"n": 2}
    waited("for a busy node without an agent", second)
    assert not is_dead("a")
    assert first("load", wanted) == {"n": 2}
