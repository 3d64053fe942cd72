"""A process of a node whose visitors write down what they were told.

    python -m tests.fleet.driver

Does all that `tests.cluster.driver` does. Each visitor adds 1 to an item of its own in any of
the sessions, and reads; each line of its diary is one request, written when it was answered. So
what a process was told before it was killed can be read afterwards.
"""

from __future__ import annotations

import json
import os
import random
import threading
import time
from typing import Any

from tests.cluster import driver

from deferred_sessions.backend import SessionStore  # isort: skip - after Django is set up
from deferred_sessions.runtime import get_runtime  # isort: skip
from deferred_sessions.servers import shelf  # isort: skip

_visitors: list[Visitor] = []


class Visitor(threading.Thread):
    """Comes again and again until told to leave."""

    def __init__(self, name: str, keys: list[str], diary: str, pause: float) -> None:
        super().__init__(daemon=True)
        self.name = name
        self.keys = keys
        self.pause = pause
        self.random = random.Random(name)
        self.leave = threading.Event()
        self._diary = os.open(diary, os.O_CREAT | os.O_APPEND | os.O_WRONLY)

    def run(self) -> None:
        while not self.leave.wait(self.pause):
            self.come()

    def come(self) -> None:
        """Make one request."""
        key, page = self.random.choice(self.keys), {"who": self.name, "began": time.monotonic()}
        page["key"] = key
        try:
            session = SessionStore(key)
            items = dict(session.load())
            page["read"] = None if session.session_key is None else items
            if session.session_key is not None and self.random.random() < 0.7:
                session[self.name] = count = items.get(self.name, 0) + 1
                session.save()
                page["wrote"] = count
        except Exception as error:  # noqa: BLE001 - the oracle judges it
            page["error"] = f"{type(error).__name__}: {error}"
        page["ended"] = time.monotonic()
        os.write(self._diary, json.dumps(page).encode() + b"\n")


def visit(names: list[str], keys: list[str], diary: str, pause: float = 0.01) -> None:
    """Have visitors with these names use these sessions until they `leave`."""
    for name in names:
        _visitors.append(Visitor(name, keys, diary, pause))
        _visitors[-1].start()


def leave() -> None:
    """Have all visitors finish their requests and go."""
    for visitor in _visitors:
        visitor.leave.set()
    for visitor in _visitors:
        visitor.join()
    _visitors.clear()


def create_in_memory(count: int) -> list[str]:
    """Create that many sessions without a word to PostgreSQL, and flush; return their keys."""
    keys = driver.create_many(count)
    assert driver.flush() == ""
    return keys


def decode(text: str) -> dict[str, Any]:
    """Return what is in a row."""
    return SessionStore().decode(text)


def evict(keys: list[str]) -> None:
    """Have memory forget these sessions, and give up their leases."""
    for key in keys:
        driver.forget(key)


def phases() -> dict[str, str]:
    """Return how this node takes the session servers to stand."""
    view = get_runtime().fleet.view()
    return {name: view.phase(name) for name in (*view.names, *view.leaving)}


if __name__ == "__main__":
    shelf.PART = int(os.environ.get("TEST_PAGE", shelf.PART))  # type: ignore[misc]
    driver.serve({**vars(driver), **globals()})
