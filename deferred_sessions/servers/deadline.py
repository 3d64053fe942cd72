"""Bounds how long a statement waits for a server that does not answer.

Used by `server` around each of its own statements; those of the application on the same
connection are not touched. Invariant: a connection whose answer was not waited for is closed,
because nobody could tell what comes next on it.

A server that is stopped, or a network that swallows packets, says nothing at all: there
is no error to wait for, and `statement_timeout` is the server's own.
"""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from typing import Any

import psycopg
from django.db.backends.base.base import BaseDatabaseWrapper


@contextmanager
def bounded(connection: BaseDatabaseWrapper, seconds: float | None) -> Iterator[None]:
    """Have each wait for an answer in the block fail after so many seconds; None: never."""
    raw = connection.connection
    if seconds is None or raw is None or "wait" in vars(raw):  # which is bounded already
        yield
        return
    wait = raw.wait

    def wait_for_so_long(answer: Generator[Any, Any, Any], *options: Any, **named: Any) -> Any:
        return wait(_bounded(answer, raw, seconds), *options, **named)

    raw.wait = wait_for_so_long
    try:
        yield
    finally:
        vars(raw).pop("wait", None)


def _bounded(
    answer: Generator[Any, Any, Any], raw: psycopg.Connection[Any], seconds: float
) -> Generator[Any, Any, Any]:
    """Do what `answer` does, until it has heard nothing for too long.

    psycopg drives such generators with what the socket is ready for, and with nothing ten
    times a second.
    """
    until = time.monotonic() + seconds
    try:
        wanted = next(answer)
        while True:
            ready = yield wanted
            if not ready and time.monotonic() > until:
                raw.close()
                raise psycopg.OperationalError(f"no answer for {seconds:g} s")
            wanted = answer.send(ready)
    except StopIteration as end:
        return end.value
