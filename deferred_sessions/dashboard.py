"""What the dashboard of the admin shows, as one JSON object; see `static/…/dashboard.js`.

Called by `admin`. Invariant: figures of this host and of the site's nodes, nothing of any session.
"""

from __future__ import annotations

from contextlib import suppress
from datetime import timedelta
from typing import Any, Final, NamedTuple

from django.db import DatabaseError
from django.db.models import F
from django.db.models.functions import Now
from django.utils.translation import gettext as _

from deferred_sessions import statistics
from deferred_sessions.memory.history import STEP
from deferred_sessions.models import Node, RefusedWrite
from deferred_sessions.runtime import get_runtime
from deferred_sessions.statistics import Sample, Statistics

SPANS: Final = {"15m": 900.0, "1h": 3600.0, "24h": 86_400.0}
"""What the charts can show, in seconds."""
DEFAULT_SPAN: Final = "15m"
LATEST: Final = STEP / 2  # seconds; the last point stands for at least so many
HEARD: Final = timedelta(days=1)  # since a node that is listed was heard of
ALARMING: Final = 2  # flush intervals that a change may be unsaved


class Notice(NamedTuple):
    """Something that the operator should know."""

    level: str
    """"error", "warning" or "ok"; a class of CSS."""
    title: str
    text: str


def snapshot(span: str, now: float) -> dict[str, Any]:
    """Return all that the page shows.

    Raises:
        StoreError: The store of this host cannot be used.
    """
    figures = statistics.read(now)
    samples = _samples(SPANS.get(span, SPANS[DEFAULT_SPAN]), figures)
    return {
        "at": now,
        "interval": figures.interval,
        "notices": [notice._asdict() for notice in notices(figures)],
        "counters": {counter.name: count for counter, count in figures.counters.items()},
        "now": {**_now(figures), "writes_avoided": figures.writes_avoided},
        "series": statistics.series(samples),
        "nodes": nodes(figures),
        "refused": refused(),
    }


def notices(figures: Statistics) -> list[Notice]:
    """Return what is wrong, worst first; or that nothing is."""
    flush, age = figures.last_flush, figures.poller_age
    found = []
    if figures.is_poller_dead:
        seen = (
            _("None has flushed since this store was made.")
            if age is None
            else _("The last one flushed %d s ago.") % age
        )
        text = _("Is Celery running on this host, with beat? Meanwhile the agent flushes.")
        found.append(Notice("error", _("No poller"), f"{seen} {text}"))
    if flush is not None and flush.failure:
        text = _("Everything stays in memory, dirty and due: %s") % flush.failure
        found.append(Notice("error", _("The last flush failed"), text))
    if figures.oldest_change_age > ALARMING * figures.interval:
        text = _("The oldest change has not been in PostgreSQL for %d s.")
        found.append(
            Notice("warning", _("Changes wait for long"), text % figures.oldest_change_age)
        )
    if age is None and not found:
        found.append(Notice("warning", _("No poller seen yet"), _("It may just have started.")))
    return found or [Notice("ok", _("All is well"), _("The poller flushed %d s ago.") % (age or 0))]


def nodes(figures: Statistics) -> list[dict[str, Any]]:
    """Return this node, and then the others that were heard of today, unless nobody can say."""
    here = {
        "name": figures.node,
        "is_here": True,
        "is_alive": True,
        "sessions": figures.store.records,
        "dirty": figures.store.dirty,
        "seen": 0.0,
    }
    others: dict[str, Node] = {}
    for server in get_runtime().fleet.live():
        known = Node.objects.using(server.alias).exclude(node=server.owner()).alias(now=Now())
        heard = known.filter(beat_at__gt=F("now") - HEARD)
        with suppress(DatabaseError):
            for node in heard.annotate(age=F("now") - F("beat_at")).order_by("beat_at"):
                if node.pk not in others or node.beat_at > others[node.pk].beat_at:
                    others[node.pk] = node
    return [here, *map(_other, sorted(others.values(), key=str))]


def _other(node: Node) -> dict[str, Any]:
    age: timedelta = node.age  # type: ignore[attr-defined]
    return {
        "name": str(node),
        "is_here": False,
        "is_alive": node.died_at is None,
        "sessions": None,
        "dirty": None,
        "seen": age.total_seconds(),
    }


def refused() -> int | None:
    """Return how many writes were refused and kept for inspection; None if nobody can say."""
    try:
        live = get_runtime().fleet.live()
        return sum(RefusedWrite.objects.using(server.alias).count() for server in live)
    except DatabaseError:
        return None


def _now(figures: Statistics) -> dict[str, Any]:
    flush, journal = figures.last_flush, figures.journal
    return {
        "sessions": figures.store.records,
        "dirty": figures.store.dirty,
        "oldest": figures.oldest_change_age,
        "hit_rate": figures.hit_rate,
        "poller_age": figures.poller_age,
        "is_poller_dead": figures.is_poller_dead,
        "used": figures.store.used,
        "size": figures.store.size,
        "flush": flush
        and {
            "age": max(0.0, figures.at - flush.at),
            "seconds": flush.seconds,
            "rows": flush.rows,
            "by": flush.by,
            "remaining": flush.remaining,
        },
        "journal": journal
        and {"active": journal.active, "unsynced": journal.unsynced, "retired": journal.retired},
    }


def _samples(seconds: float, figures: Statistics) -> list[Sample]:
    """Return what was kept of the last so many seconds, and how it is now.

    Where no agent keeps samples, looking at the page does.
    """
    reader = get_runtime().statistics
    kept = reader.history(seconds, figures.at)
    if not kept or figures.at - kept[-1].at > 2 * STEP:
        reader.sample_once(figures.at)
    return [*(sample for sample in kept if figures.at - sample.at >= LATEST), figures.sample()]
