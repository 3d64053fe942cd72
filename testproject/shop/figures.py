"""The live figures, served beside Django: looking at them does not change them."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterable
from typing import Any

from deferred_sessions import statistics
from deferred_sessions.statistics import Counter

Application = Callable[[dict[str, Any], Callable[..., Any]], Iterable[bytes]]


def with_figures(application: Application) -> Application:
    """Return `application` with `/figures.json` in front of it."""

    def serve(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        if environ["PATH_INFO"] != "/figures.json":
            return application(environ, start_response)
        body = json.dumps(figures()).encode()
        headers = [
            ("Content-Type", "application/json"),
            ("Content-Length", str(len(body))),
            ("Cache-Control", "no-store"),
        ]
        start_response("200 OK", headers)
        return [body]

    return serve


def figures() -> dict[str, Any]:
    """Return the figures of this host, as the page shows them."""
    now = time.time()
    current = statistics.read(now)
    counters = current.counters
    flush = current.last_flush
    return {
        "requests": counters[Counter.REQUESTS],
        "updates": counters[Counter.UPDATES] + counters[Counter.CREATIONS],
        "statements": counters[Counter.STATEMENTS],
        "rows": counters[Counter.ROWS_WRITTEN],
        "sessions": current.store.records,
        "dirty": current.store.dirty,
        "oldest": round(current.oldest_change_age, 1),
        "interval": current.interval,
        "used": current.store.used,
        "size": current.store.size,
        "flush": flush and {"age": round(now - flush.at, 1), "rows": flush.rows},
        "worker": os.getpid(),
    }
