"""A process of a node that does what it is told, line by line, and answers each line.

    python -m tests.cluster.driver [--no-agent]

Each line is JSON: ["name", arguments...]; so is each answer: [seconds, result] or an error.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import django

django.setup()

from django.db import close_old_connections, connection, transaction  # noqa: E402

from deferred_sessions.backend import SessionStore  # noqa: E402
from deferred_sessions.memory.counters import Counter  # noqa: E402
from deferred_sessions.runtime import get_runtime  # noqa: E402
from deferred_sessions.servers.listener import Listener  # noqa: E402

_locks: dict[str, Any] = {}
_logged: list[str] = []


class _Log(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        _logged.append(record.getMessage())


def create(**items: Any) -> str:
    """Create a session with these items; return its key."""
    session = SessionStore()
    session.update(items)
    session.save()
    return str(session.session_key)


def create_many(count: int) -> list[str]:
    """Create that many sessions; return their keys."""
    return [create(n=n) for n in range(count)]


def load(key: str) -> dict[str, Any]:
    """Return the session."""
    return dict(SessionStore(key).load())


def change(key: str, name: str, value: Any) -> None:
    """Set one item of the session, in a request of its own."""
    session = SessionStore(key)
    session[name] = value
    session.save()


def add(key: str, name: str, times: int = 1, how: str = "merge") -> None:
    """Add 1 to an item so many times, under a lock or in exclusive mode."""
    for _ in range(times):
        if how == "exclusive":
            with get_runtime().busy.request():
                _add(SessionStore(key), name).save()
        elif how == "lock":
            session = SessionStore(key)
            with session.lock(name, timeout=60):
                _add(session, name)
        else:
            _add(SessionStore(key), name).save()
        close_old_connections()  # as at the end of a request


def add_for(key: str, name: str, seconds: float) -> int:
    """Do `add` without a pause for so long; return how often."""
    times, until = 0, time.monotonic() + seconds
    while time.monotonic() < until:
        add(key, name)
        times += 1
    return times


def add_in_threads(key: str, names: list[str], times: int, how: str) -> None:
    """Do `add` in a thread for each of `names`, which may be the same."""
    threads = [threading.Thread(target=add, args=(key, name, times, how)) for name in names]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def touch_all(keys: list[str]) -> list[float]:
    """Load these sessions one after the other; return how long each took, in seconds."""
    durations = []
    for key in keys:
        began = time.perf_counter()
        assert SessionStore(key).load()
        durations.append(time.perf_counter() - began)
    return durations


def load_in_transaction(key: str) -> dict[str, Any]:
    """Load the session as a view does with ATOMIC_REQUESTS."""
    with transaction.atomic():
        connection.ensure_connection()
        return load(key)


def pool() -> dict[str, int]:
    """Return the figures of Django's pool of connections."""
    return dict(connection.pool.get_stats())  # type: ignore[attr-defined]


def hold(key: str, name: str) -> None:
    """Lock an item of the session until told to `let_go`."""
    session = SessionStore(key)
    lock = session.lock(name)
    lock.__enter__()
    _locks[key] = lock, session, name


def let_go(key: str, value: Any) -> None:
    """Set the item that is locked, and unlock it."""
    lock, session, name = _locks.pop(key)
    session[name] = value
    lock.__exit__(None, None, None)


def delete(key: str) -> None:
    """Log out."""
    SessionStore(key).delete()


def flush() -> str:
    """Write all that is dirty; return what went wrong."""
    return get_runtime().flusher.flush_once(time.time(), everything=True).failure


def forget(key: str) -> None:
    """Evict the session from memory."""
    get_runtime().store.update(key, lambda _: None)


def knows(key: str) -> bool:
    """Tell whether memory has the session."""
    return get_runtime().store.head(key) is not None


def count(name: str) -> int:
    """Return a counter of the node."""
    return get_runtime().counters.totals()[Counter[name]]


def logged() -> list[str]:
    """Return what was logged, from warnings on."""
    return list(_logged)


def me() -> str:
    """Return the name and incarnation of this node."""
    return get_runtime().server.owner()


def _add(session: SessionStore, name: str) -> SessionStore:
    session[name] = session.get(name, 0) + 1
    return session


def _answer(function: Callable[..., Any], arguments: list[Any]) -> dict[str, Any]:
    began = time.perf_counter()
    try:
        result = function(*arguments)
    except Exception as error:  # noqa: BLE001 - the test will see it
        return {"error": f"{type(error).__name__}: {error}", "seconds": time.perf_counter() - began}
    finally:
        close_old_connections()  # as at the end of a request
    return {"result": result, "seconds": time.perf_counter() - began}


def serve(functions: dict[str, Any]) -> None:
    """Do what is asked for, line by line, with these functions."""
    logging.getLogger("deferred_sessions").addHandler(_Log(logging.WARNING))
    if os.environ.get("TEST_DEAF"):  # nobody can listen, as behind a pooler
        Listener._open = lambda self: None  # type: ignore[method-assign]
    if "--no-agent" not in sys.argv:
        get_runtime().agent.start()
    else:
        get_runtime().pulse.expect()
    print(json.dumps({"result": "ready", "seconds": 0.0}), flush=True)
    for line in sys.stdin:
        name, *arguments = json.loads(line)
        items = arguments.pop() if arguments and isinstance(arguments[-1], dict) else {}
        print(json.dumps(_answer(partial(functions[name], **items), arguments)), flush=True)
    get_runtime().agent.stop()


if __name__ == "__main__":
    serve(globals())
