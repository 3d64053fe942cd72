"""Sessions as their users and operators see them: brought up to date, and ended.

Called by the manager of the model and by the admin. Invariant: what memory has that
PostgreSQL lacks counts; nobody is told of a session as it was before its last change.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Final

from deferred_sessions.exceptions import ServerUnavailableError
from deferred_sessions.memory.store import HostStore
from deferred_sessions.memory.tables import Dirty
from deferred_sessions.policy import NEVER
from deferred_sessions.report import FlushReport
from deferred_sessions.runtime import get_runtime
from deferred_sessions.servers.rows import as_text

logger = logging.getLogger(__name__)

PAGE: Final = 1000  # records looked at in one transaction


def user_id_of(user: Any) -> str:
    """Return the id of `user`, a user or an id, as sessions have it; "" for nobody."""
    if hasattr(user, "_meta"):
        return as_text(user._meta.pk.value_to_string(user)) if user.pk is not None else ""  # noqa: SLF001
    user_id = getattr(user, "pk", user)
    return "" if user_id is None else as_text(user_id)


def unsaved_sessions() -> Iterator[Dirty]:
    """Yield what this host's memory has that PostgreSQL lacks, longest due first.

    Costs what is dirty, not what is stored; nothing if this host has no store.
    """
    store = get_runtime().store
    if store.exists():
        yield from _dirty(store)


def write_sessions_of(user_id: str, stored: Iterable[str], now: float) -> FlushReport:
    """Have PostgreSQL know which sessions are `user_id`'s.

    `stored` are the keys of those that it takes for the user's.

    Raises:
        ServerUnavailableError: It is away.
    """
    keys = {dirty.key for dirty in unsaved_sessions() if dirty.record.user_id == user_id}
    return write_sessions(sorted(keys.union(stored)), now)


def write_sessions(keys: Sequence[str], now: float) -> FlushReport:
    """Write what PostgreSQL lacks of these sessions, due or not.

    Raises:
        ServerUnavailableError: It is away; they stay in memory.
    """
    runtime = get_runtime()
    if not runtime.store.exists():
        return FlushReport(at=now)
    report = runtime.flusher.flush_sessions(keys, now)
    if report.failure:
        raise ServerUnavailableError(report.failure)
    return report


def end_sessions(keys: Iterable[str], now: float) -> int:
    """Delete sessions here and in PostgreSQL; return how many were named.

    This host's processes refuse them when it returns. Other hosts do when their agents have
    heard of it, well within a second. While PostgreSQL is away they end here, and memory
    makes up for the rest.

    Raises:
        StoreFullError: PostgreSQL is away, and memory has no room to remember it.
    """
    tiers, count = get_runtime().tiers, 0
    for key in keys:
        tiers.delete(key, now)
        count += 1
    if count:
        logger.info(
            "%d sessions were revoked.",
            count,
            extra={"action": "sessions_revoked_here", "count": count},
        )
    return count


def _dirty(store: HostStore) -> Iterator[Dirty]:
    after = b""
    while page := store.due(NEVER, limit=PAGE, after=after):
        after = max(dirty.entry for dirty in page)
        yield from page
