"""`manage.py importsessions`: all sessions of the engine that the site used before."""

from __future__ import annotations

import time
from argparse import ArgumentParser
from typing import Any, Final

from django.core.exceptions import ImproperlyConfigured
from django.core.management.base import BaseCommand, CommandError

from deferred_sessions.adoption import Adoption
from deferred_sessions.exceptions import DeferredSessionsError
from deferred_sessions.management.progress import ProgressBar
from deferred_sessions.runtime import build_adoption, get_runtime

BATCH: Final = 1000  # sessions per transaction


class Command(BaseCommand):
    """Takes over all sessions of another engine."""

    help = (
        "Take over all sessions of the engine that the site used before, in batches; those that "
        "are here already are left alone. If it was interrupted, run it again: it goes on where "
        "it was. Visitors may use the site meanwhile."
    )

    def add_arguments(self, parser: ArgumentParser) -> None:
        """Define the options."""
        parser.add_argument(
            "--engine", help="what SESSION_ENGINE was before; IMPORT_ENGINE unless given"
        )
        parser.add_argument(
            "--batch", type=int, default=BATCH, help=f"sessions per transaction ({BATCH})"
        )

    def handle(self, **options: Any) -> None:
        """Import, and say how much."""
        engine = options["engine"] or get_runtime().settings.import_engine
        if not engine:
            raise CommandError(
                "Name the engine that the site used before: --engine "
                "django.contrib.sessions.backends.db, or DEFERRED_SESSIONS['IMPORT_ENGINE']."
            )
        if options["batch"] < 1:
            raise CommandError("--batch needs a positive number of sessions.")
        started = time.monotonic()
        try:
            looked_at, came = self._import(build_adoption(engine), options["batch"])
        except (DeferredSessionsError, ImproperlyConfigured) as error:
            raise CommandError(str(error)) from error
        self.stdout.write(
            f"{came:,} sessions taken over in {time.monotonic() - started:.1f} s; "
            f"{looked_at - came:,} were here before, have expired, or are empty"
        )

    def _import(self, adoption: Adoption, batch: int) -> tuple[int, int]:
        looked_at = came = 0
        with ProgressBar(self.stderr, adoption.count()) as progress:
            for page, new in adoption.take_over_all(time.time(), batch):
                looked_at, came = looked_at + page, came + new
                progress.show(looked_at)
        return looked_at, came
