"""A user's sessions on two hosts: what one revokes, the other ends."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from urllib.parse import urlencode

from django.contrib.auth.models import User

from deferred_sessions.models import Session
from deferred_sessions.runtime import get_runtime
from tests.processes.conftest import Site, Visitor, Web, wait_until


def log_in(visitor: Visitor, server: Web) -> str:
    data = urlencode({"username": "ann", "password": "corner-shop"}).encode()
    visitor.get(server.url("/probe/login/"), data)
    visitor.get(server.url("/probe/count/"))  # a change that PostgreSQL does not have
    return visitor.key


def count_of(visitor: Visitor, server: Web) -> int | None:
    """Return how often this visitor has counted; who was revoked begins anew."""
    value: int | None = visitor.get(server.url("/probe/read/"))["value"]
    return value


def test_what_is_revoked_on_one_host_ends_on_the_other(
    make_site: Callable[..., Site], tmp_path: Path
) -> None:
    ann = User.objects.create_user("ann", password="corner-shop")
    there = make_site(tmp_path / "there").web("--workers", "2")
    here = make_site(tmp_path / "here").web("--workers", "2")
    phone, laptop, kept = Visitor(), Visitor(), Visitor()
    log_in(phone, there)
    log_in(laptop, here)
    key = log_in(kept, here)
    wait_until(lambda: get_runtime().store.note("revocations"), what="the agent")
    assert [count_of(phone, there), count_of(laptop, here), count_of(kept, here)] == [1, 1, 1]
    assert Session.objects.for_user(ann).count() == 3

    assert Session.objects.revoke_all(ann, keep=key) == 2
    assert count_of(laptop, here) is None
    wait_until(lambda: count_of(phone, there) is None, what="the other host", seconds=20)
    assert count_of(kept, here) == 1
