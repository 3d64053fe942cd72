"""`manage.py exportsessions`: the sessions back to Django's own table."""

from __future__ import annotations

import os
import time
from argparse import ArgumentParser
from datetime import UTC, datetime
from typing import Any, Final

from django.core.exceptions import ImproperlyConfigured
from django.core.management.base import BaseCommand, CommandError
from django.utils import timezone
from django.utils.dateparse import parse_datetime

from deferred_sessions.exceptions import DeferredSessionsError
from deferred_sessions.exporting import Exporter
from deferred_sessions.management.progress import ProgressBar
from deferred_sessions.runtime import build_exporter, get_runtime

BATCH: Final = 1000  # sessions per transaction
ENGINE: Final = "django.contrib.sessions.backends.db"
OVERLAP: Final = 300.0  # seconds; what a flush began to write before may be committed after


class Command(BaseCommand):
    """Copies all sessions to Django's table."""

    help = (
        "Write what is in this host's memory, then copy all sessions to the table of Django's "
        "own engines, in batches; and delete there what was deleted here. If it was interrupted, "
        "run it again: only what differs is written. Run flushsessions --all on other hosts before."
    )

    def add_arguments(self, parser: ArgumentParser) -> None:
        """Define the options."""
        parser.add_argument(
            "--engine", default=ENGINE, help=f"what SESSION_ENGINE is to be ({ENGINE})"
        )
        parser.add_argument(
            "--batch", type=int, default=BATCH, help=f"sessions per transaction ({BATCH})"
        )
        parser.add_argument(
            "--since",
            metavar="TIME",
            help="copy only what was written since then, to leave alone what the other engine has "
            "changed; the end of an export says which time to give to the next one",
        )

    def handle(self, **options: Any) -> None:
        """Export, and say how much."""
        if options["batch"] < 1:
            raise CommandError("--batch needs a positive number of sessions.")
        since, started = _since(options["since"]), time.time()
        try:
            exporter = build_exporter(options["engine"])
            self._flush(started)
            copied, written = self._copy(exporter, started, since, options["batch"])
            deleted = exporter.delete()
        except (DeferredSessionsError, ImproperlyConfigured) as error:
            raise CommandError(str(error)) from error
        self.stdout.write(
            f"{copied:,} sessions copied in {time.time() - started:.1f} s, {written:,} of them new "
            f"or changed; {deleted:,} deleted\n"
            f"What changes from now on: exportsessions --since {_text(started)}"
        )

    def _flush(self, now: float) -> None:
        store = get_runtime().store
        if store.exists():
            report = get_runtime().flusher.flush_once(now, everything=True)
            if report.failure:
                raise CommandError(f"Memory could not be written: {report.failure}")
        elif users := store.owners_elsewhere():
            raise CommandError(
                f"The sessions of this host are in the memory of user {users[0]}, and this is user "
                f"{os.geteuid()}. Run it as the user of the web processes."
            )

    def _copy(self, exporter: Exporter, now: float, since: float, size: int) -> tuple[int, int]:
        copied = written = 0
        with ProgressBar(self.stderr, exporter.count(now, since)) as progress:
            for batch in exporter.copy(now, since, size):
                copied, written = copied + len(batch.keys), written + batch.written
                progress.show(copied)
        return copied, written


def _since(text: str | None) -> float:
    """Return from which time on rows are to be copied."""
    if text is None:
        return 0.0
    try:
        moment = parse_datetime(text)
    except ValueError:
        moment = None
    if moment is None:
        raise CommandError("--since needs a date and time, such as 2030-01-31T12:00:00+00:00.")
    if timezone.is_naive(moment):
        moment = timezone.make_aware(moment)
    return moment.timestamp() - OVERLAP


def _text(now: float) -> str:
    return datetime.fromtimestamp(now, tz=UTC).isoformat(timespec="seconds")
