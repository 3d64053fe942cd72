"""`manage.py flushsessions`: the flusher without Celery."""

from __future__ import annotations

import os
import pprint
import signal
import threading
import time
from argparse import ArgumentParser
from typing import Any

from django.core.management.base import BaseCommand, CommandError
from django.db import close_old_connections

from deferred_sessions.exceptions import DeferredSessionsError
from deferred_sessions.report import FlushReport
from deferred_sessions.runtime import get_runtime
from deferred_sessions.schedule import beat_schedule


class Command(BaseCommand):
    """Writes this host's dirty sessions to PostgreSQL."""

    help = (
        "Write this host's dirty sessions to PostgreSQL: those that are due, or all. "
        "Run it on the host, and as the user, of the web processes."
    )

    def add_arguments(self, parser: ArgumentParser) -> None:
        """Define the options."""
        parser.add_argument(
            "--all", action="store_true", help="write every dirty session, due or not"
        )
        parser.add_argument(
            "--loop",
            type=float,
            metavar="SECONDS",
            help="go on, every SECONDS, until interrupted or terminated; then write all",
        )
        parser.add_argument(
            "--beat",
            action="store_true",
            help="print the entries for CELERY_BEAT_SCHEDULE and do nothing else",
        )

    def handle(self, **options: Any) -> None:
        """Flush once, or until told to stop."""
        if options["beat"]:
            self.stdout.write(f"CELERY_BEAT_SCHEDULE = {pprint.pformat(beat_schedule())}")
        elif options["loop"] is None:
            report = self._flush(everything=options["all"])
            if report.failure:
                raise CommandError(f"{report.remaining} sessions stay dirty: {report.failure}")
        elif options["loop"] <= 0:
            raise CommandError("--loop needs a positive number of seconds.")
        else:
            self._loop(options["loop"], everything=options["all"])

    def _loop(self, seconds: float, *, everything: bool) -> None:
        stop = threading.Event()
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: stop.set())
        while not stop.wait(seconds):
            close_old_connections()
            try:
                self._flush(everything=everything)
            except CommandError as error:  # it may be better the next time
                self.stderr.write(str(error))
        self._flush(everything=True)

    def _flush(self, *, everything: bool) -> FlushReport:
        store = get_runtime().store
        if not store.exists() and (users := store.owners_elsewhere()):
            raise CommandError(
                f"The sessions of this project are in the memory of user {users[0]}, and this is "
                f"user {os.geteuid()}, who has none. Run it as the user of the web processes."
            )
        try:
            report = get_runtime().flusher.flush_once(time.time(), everything=everything)
        except DeferredSessionsError as error:
            raise CommandError(str(error)) from error
        self.stdout.write(_sentence(report))
        return report


def _sentence(report: FlushReport) -> str:
    if report.skipped:
        return "Another flusher of this node is at work; nothing done."
    parts = [
        f"{count} {name}"
        for name, count in (
            ("inserted", report.inserted),
            ("updated", report.updated),
            ("touched", report.touched),
            ("deleted", report.deleted),
            ("vanished", report.vanished),
            ("superseded", report.superseded),
            ("fenced", report.fenced),
            ("locked", report.locked),
            ("set aside", report.set_aside),
        )
        if count
    ]
    done = ", ".join(parts) or "nothing to write"
    sentence = f"{done}; {report.remaining} dirty left; {report.seconds * 1000:.0f} ms"
    return f"{sentence}; FAILED: {report.failure}" if report.failure else sentence
