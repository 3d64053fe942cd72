"""Nodes whose Django keeps its connections in a pool, a small one."""

from __future__ import annotations

import json
from collections.abc import Callable

from deferred_sessions.models import Node, Session
from tests.cluster.conftest import Host
from tests.processes.conftest import wait_until

POOL = {"min_size": 1, "max_size": 2, "timeout": 5}


def test_all_connections_come_back(make_host: Callable[..., Host]) -> None:
    """Leases, flushes, hand-overs, locks and the agent, with fewer connections than threads."""
    pooled = {"env": {"DATABASE_POOL": json.dumps(POOL)}}
    nodes = [make_host(name).process(**pooled) for name in ("a", "b")]
    first, second = nodes
    wait_until(lambda: Node.objects.filter(beat__gt=2).count() == 2, what="heartbeats")
    key = first("create")
    for number, node in enumerate(nodes):
        node.ask("add_in_threads", key, [f"{number}.0", "n"], 30, "lock")
    for node in nodes:
        node.answer()
        assert node("flush") == ""
    assert Session.objects.get().get_decoded() == {"n": 60, "0.0": 30, "1.0": 30}
    assert second("load_in_transaction", key) == {"n": 60, "0.0": 30, "1.0": 30}
    assert first("load_in_transaction", key) == {"n": 60, "0.0": 30, "1.0": 30}
    for node in nodes:
        figures = node("pool")
        assert figures["pool_available"] == figures["pool_size"] <= POOL["max_size"]
        assert figures.get("requests_errors", 0) == 0
        assert figures.get("requests_waiting", 0) == 0


def test_a_pool_of_one(make_host: Callable[..., Host]) -> None:
    """Held by the request's transaction, while the lease is taken beside it."""
    pooled = {"env": {"DATABASE_POOL": json.dumps({**POOL, "min_size": 1, "max_size": 1})}}
    first, second = (make_host(name).process(**pooled) for name in ("a", "b"))
    key = first("create", {"n": 1})
    assert second("load_in_transaction", key) == {"n": 1}
    first("add", key, "n", 5)
    assert second("load_in_transaction", key) == {"n": 6}
    for node in (first, second):
        figures = node("pool")
        assert (figures["pool_available"], figures.get("requests_errors", 0)) == (1, 0)
