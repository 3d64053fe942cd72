"""The live figures, served beside Django: looking at them does not change them."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterable
from typing import Any

from deferred_sessions.memory.counters import Counter
from deferred_sessions.runtime import get_runtime

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
    runtime = get_runtime()
    statistics = runtime.statistics.read(now)
    counters = statistics.counters
    flush = statistics.last_flush
    return {
        "requests": counters[Counter.REQUESTS],
        "updates": counters[Counter.UPDATES] + counters[Counter.CREATIONS],
        "statements": counters[Counter.STATEMENTS],
        "rows": counters[Counter.ROWS_WRITTEN],
        "sessions": statistics.store.records,
        "dirty": statistics.store.dirty,
        "oldest": round(statistics.oldest_change_age, 1),
        "interval": runtime.settings.flush_interval,
        "used": statistics.store.used,
        "size": statistics.store.size,
        "flush": flush and {"age": round(now - flush.at, 1), "rows": flush.rows},
        "worker": os.getpid(),
    }
