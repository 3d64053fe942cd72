"""What `manage.py check --deploy` finds: host, settings and database, looked at together.

Called by `checks`, and only if deployment is what is checked: this opens the host's store if
there is one, and connects to PostgreSQL. Invariant: it makes no store and changes nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from deferred_sessions.conf import MIDDLEWARE, Problem, has_djangos_middleware, names_asgi
from deferred_sessions.exceptions import ServerUnavailableError, StoreError
from deferred_sessions.memory.directory import room_beside
from deferred_sessions.report import AGENT
from deferred_sessions.runtime import Runtime
from deferred_sessions.servers.survey import is_pooled, namesakes

ASGI: Final = "asgi"  # the note that a process of this node has served ASGI


def findings(runtime: Runtime, now: float) -> Iterator[Problem]:
    """Yield what an operator should know before, or while, the site is used."""
    if runtime.settings.journal_directory is None:
        yield Problem(
            "W032",
            "There is no journal: if this host loses power, changes of up to FLUSH_INTERVAL "
            f"({runtime.settings.flush_interval:g} s) and a tick are lost.",
            "Set JOURNAL_DIRECTORY to a directory on a disk, or silence this warning.",
        )
    try:
        yield from _of_host(runtime, now)
    except StoreError as error:
        yield Problem("W033", f"The store cannot be used: {error}", "See DIRECTORY, STORE_SIZE.")
    try:
        yield from _of_database(runtime)
    except ServerUnavailableError as error:
        yield Problem(
            "W037",
            f"Nodes and pooler were not looked at: {error}",
            "Run the check where the database can be reached, after `manage.py migrate`.",
        )


def _of_host(runtime: Runtime, now: float) -> Iterator[Problem]:
    store, wanted = runtime.store, runtime.settings.store_size
    if store.exists():
        yield from _poller(runtime, now)
    size = store.status().size if store.exists() else room_beside(store.directory, wanted)
    if size < wanted:
        yield Problem(
            "W033",
            f"{store.directory.parent} has room for a store of {size >> 20} MiB, not for the "
            f"{wanted >> 20} MiB of STORE_SIZE. Sessions will be evicted sooner.",
            "Make it larger (Docker: --shm-size; Kubernetes: an emptyDir of medium Memory), name "
            "another DIRECTORY, or lower STORE_SIZE.",
        )
    is_asgi = names_asgi() or (store.exists() and store.note(ASGI) is not None)
    if is_asgi and has_djangos_middleware():
        yield Problem(
            "W035",
            "The site is served by ASGI with Django's own SessionMiddleware, which takes a thread "
            "for each session that is saved.",
            f"Put {MIDDLEWARE!r} in its place.",
        )


def _poller(runtime: Runtime, now: float) -> Iterator[Problem]:
    """Yield a problem if nobody flushes, or if the agent has to."""
    interval = runtime.settings.flush_interval
    last = runtime.flusher.last_report()
    is_late = last is None or now - last.polled_at > 2 * interval
    is_replaced = last is not None and last.by == AGENT
    if is_late:
        yield Problem(
            "W031",
            f"No poller has flushed on this host for two intervals ({2 * interval:g} s)"
            + ("; the agent does it instead." if is_replaced else "."),
            "Start a Celery worker with beat on this host, as the user of the web processes, or "
            "`manage.py flushsessions --loop 10`.",
        )


def _of_database(runtime: Runtime) -> Iterator[Problem]:
    live = runtime.fleet.live()
    if names := sorted({name for server in live for name in namesakes(server)}):
        yield Problem(
            "W034",
            f"Several hosts have the same name: {', '.join(names)}. They take each other's "
            "sessions away.",
            "Give each a NODE of its own.",
        )
    listen = runtime.settings.listen if runtime.fleet.only else None
    for alias in [listen] if listen else [server.alias for server in live]:
        if is_pooled(alias):
            yield Problem(
                "W036",
                f"The database {alias!r} is behind a pooler of transactions, which passes no "
                "notifications on: hosts hear of each other's requests and of deletions late.",
                "Have LISTEN name an entry of DATABASES that leads past the pooler; of several "
                "SERVERS, name those themselves past their poolers.",
            )
