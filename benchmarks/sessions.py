"""What is in the sessions that are measured."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from typing import Any

from django.contrib.sessions.backends.base import SessionBase

Engine = Callable[..., SessionBase]
VISITOR = 42
HASH = "9f2b7c04d1e8a35610bc4d7fe2938a4c9f2b7c04d1e8a35610bc4d7fe2938a4c"


def content(size: int) -> dict[str, Any]:
    """Return what a logged-in customer's session may hold, of about `size` bytes of JSON."""
    decoded: dict[str, Any] = json.loads(text(size))
    return decoded


@functools.cache
def text(size: int) -> str:
    """Return it as JSON."""
    data: dict[str, Any] = {
        "_auth_user_id": str(VISITOR),
        "_auth_user_backend": "django.contrib.auth.backends.ModelBackend",
        "_auth_user_hash": HASH,
        "count": 0,
        "cart": {"12": 1, "44": 3},
    }
    number = 0
    while len(json.dumps(data, separators=(",", ":"))) < size:
        article = {"sku": f"A-{number}", "quantity": number, "price": 12.5}
        data[f"item{number}"] = article if number % 2 else "v" * 20
        number += 1
    return json.dumps(data)


def stored(engine: Engine, size: int) -> str:
    """Store a session of about `size` bytes of JSON; return its key."""
    session = engine()
    session.update(content(size))
    session.save()
    return str(session.session_key)
