"""Sessions that pass from node to node, in real processes on real PostgreSQL."""

from __future__ import annotations

import pytest

from deferred_sessions.models import Session
from tests.cluster.conftest import Host, Process

INCREMENTS = 150


def test_c03_a_session_follows_its_visitor(nodes: list[Process]) -> None:
    """C02, C03, C06: kept after use, released when asked for."""
    first, second, third = nodes
    key = first("create", {"cart": ["hat"]})
    first("change", key, "cart", ["hat", "scarf"])
    assert second("load", key) == {"cart": ["hat", "scarf"]}
    assert not first("knows", key)
    second("change", key, "step", 2)
    assert third("load", key) == {"cart": ["hat", "scarf"], "step": 2}
    assert first("load", key) == {"cart": ["hat", "scarf"], "step": 2}
    assert Session.objects.get().fence == 3


@pytest.mark.parametrize("how", ["merge", "lock", "exclusive"])
def test_a10_no_increment_is_lost(hosts: list[Host], how: str) -> None:
    """A10, C01, C05, C07: three nodes, two processes each, two threads each, one session."""
    for host in hosts:
        if how == "exclusive":
            host.settings |= {"LOCKING": "exclusive", "LOCK_TIMEOUT": 60}
    workers = [host.process() for host in hosts for _ in range(2)]
    key = workers[0]("create")
    for number, worker in enumerate(workers):
        names = ["n", "n"] if how != "merge" else [f"{number}.0", f"{number}.1"]
        worker.ask("add_in_threads", key, names, INCREMENTS, how)
    for worker in workers:
        worker.answer()
    for worker in workers:
        worker("flush")
    total = sum(Session.objects.get().get_decoded().values())
    assert total == len(workers) * 2 * INCREMENTS
    print(how, total, [round(worker.seconds, 2) for worker in workers])
