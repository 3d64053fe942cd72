"""`manage.py sessionstats`: what is in this host's memory, without stopping anybody."""

from __future__ import annotations

import json
import sys
import time
from argparse import ArgumentParser
from collections.abc import Iterable, Iterator
from contextlib import suppress
from typing import Any, Final

from django.core.management.base import BaseCommand, CommandError

from deferred_sessions import statistics
from deferred_sessions.census import Census, bins, take_census
from deferred_sessions.exceptions import DeferredSessionsError
from deferred_sessions.management.watch import CLEAR, Watch
from deferred_sessions.memory.tables import StoreStatus
from deferred_sessions.record import SessionRecord
from deferred_sessions.runtime import get_runtime
from deferred_sessions.statistics import JournalFigures

STEP: Final = 20_000  # records between two signs of progress
BAR: Final = 40  # characters


class Command(BaseCommand):
    """Prints figures of the sessions of this host."""

    help = (
        "Scan this host's sessions: how many, whose, how large, how old; what PostgreSQL lacks; "
        "room and journal. Run it on the host, and as the user, of the web processes."
    )

    def add_arguments(self, parser: ArgumentParser) -> None:
        """Define the options."""
        parser.add_argument("--json", action="store_true", help="print one JSON object")
        parser.add_argument(
            "--watch",
            nargs="?",
            const=2.0,
            type=float,
            metavar="SECONDS",
            help="show figures and rates, anew every so many seconds (2), until interrupted",
        )

    def handle(self, **options: Any) -> None:
        """Scan, and print; or watch."""
        store = get_runtime().store
        if not store.exists():
            raise CommandError("This host has no sessions in memory, as far as this user can see.")
        if options["watch"] is not None:
            self._watch(options["watch"])
            return
        try:
            status = store.status()
            census = take_census(self._watched(store.scan(), status.records), time.time())
            figures = statistics.read()
            journal = None if figures.journal is None else _journal(figures.journal)
        except DeferredSessionsError as error:
            raise CommandError(str(error)) from error
        if options["json"]:
            self.stdout.write(json.dumps(_plain(census, status, journal)))
        else:
            self.stdout.write("\n".join(_lines(census, status, journal)))

    def _watch(self, seconds: float) -> None:
        """Show the figures until somebody has seen enough."""
        if seconds <= 0:
            raise CommandError("--watch needs a positive number of seconds.")
        watch, start = Watch(), CLEAR if self.stdout.isatty() else ""
        with suppress(KeyboardInterrupt):
            while True:
                try:
                    frame = watch.frame(statistics.read())
                except DeferredSessionsError as error:
                    raise CommandError(str(error)) from error
                self.stdout.write(f"{start}{frame}\n")
                self.stdout.flush()
                time.sleep(seconds)

    def _watched(self, records: Iterable[SessionRecord], total: int) -> Iterator[SessionRecord]:
        """Yield the records; show how far it is if somebody watches and it takes long."""
        is_shown = sys.stderr.isatty() and total > STEP
        for number, record in enumerate(records):
            if is_shown and not number % STEP:
                done = min(1.0, number / total)
                bar = "#" * int(done * BAR)
                self.stderr.write(f"\r[{bar:<{BAR}}] {done:4.0%}", ending="")
            yield record
        if is_shown:
            self.stderr.write("\r" + " " * (BAR + 10) + "\r", ending="")


def _journal(journal: JournalFigures) -> dict[str, float]:
    return {
        "generation": journal.generation,
        "active_bytes": journal.active,
        "retired_bytes": journal.retired,
        "unsynced_bytes": journal.unsynced,
        "age": round(journal.age, 1),
    }


def _plain(census: Census, status: StoreStatus, journal: Any) -> dict[str, Any]:
    return {
        "sessions": census.sessions,
        "logged_in": census.logged_in,
        "users": len(census.users),
        "sessions_of_users": dict(census.busiest()),
        "expired": census.expired,
        "tombstones": census.tombstones,
        "dirty": census.dirty,
        "oldest_change": census.oldest_change,
        "payload_bytes": census.payload,
        "largest_bytes": census.largest,
        "sizes": {name: census.sizes[name] for name in bins()[0]},
        "ages": {name: census.ages[name] for name in bins()[1]},
        "space": {
            "allocated": status.size,
            "used": status.used,
            "reusable": status.reusable,
            "free": status.size - status.used,
        },
        "journal": journal,
    }


def _lines(census: Census, status: StoreStatus, journal: Any) -> Iterator[str]:
    yield f"{census.sessions:,} sessions, {census.logged_in:,} of {len(census.users):,} users"
    yield f"{census.expired:,} expired, {census.tombstones:,} deletions remembered"
    age = "" if census.oldest_change is None else f", the oldest for {census.oldest_change:.0f} s"
    yield f"{census.dirty:,} not in PostgreSQL as they are{age}"
    mean = census.payload / census.sessions if census.sessions else 0
    yield f"payloads: {census.payload:,} bytes, {mean:,.0f} on average, {census.largest:,} at most"
    free = status.size - status.used
    yield (
        f"space: {status.size:,} bytes allocated, {status.used:,} used, {free:,} free "
        f"({status.reusable:,} of that used before)"
    )
    if journal is not None:
        yield (
            "journal: log {generation}, {active_bytes:,} bytes in {age:.0f} s, {unsynced_bytes:,} "
            "not synced; {retired_bytes:,} bytes retired".format(**journal)
        )
    sizes, ages = bins()
    yield from _histogram("payload", sizes, census.sizes, census.sessions)
    yield from _histogram("age", ages, census.ages, census.sessions)
    if census.users:
        yield "\nuser       sessions"
        yield from (f"{user:<10} {count:>8,}" for user, count in census.busiest())


def _histogram(title: str, names: list[str], counts: Any, total: int) -> Iterator[str]:
    yield f"\n{title:<10} sessions"
    for name in names:
        bar = "#" * round(BAR * counts[name] / max(1, total))
        yield f"{name:<10} {counts[name]:>8,} {bar}".rstrip()
