"""`manage.py recoversessions`: from the journal to memory, and to PostgreSQL."""

from __future__ import annotations

import time
from argparse import ArgumentParser
from typing import Any

from django.core.management.base import BaseCommand, CommandError

from deferred_sessions.exceptions import DeferredSessionsError
from deferred_sessions.memory import recovery
from deferred_sessions.memory.journal import Journal
from deferred_sessions.runtime import get_runtime


class Command(BaseCommand):
    """Recovers this host's sessions after a crash of the host, before the site starts."""

    help = (
        "Rebuild this host's memory from the journal after a crash of the host, and write it to "
        "PostgreSQL. The first process of the site does the first part by itself; this does it "
        "before, and tells. Run it on the host, and as the user, of the web processes."
    )

    def add_arguments(self, parser: ArgumentParser) -> None:
        """Define the options."""
        parser.add_argument(
            "--check", action="store_true", help="only say what the logs hold; change nothing"
        )

    def handle(self, **options: Any) -> None:
        """Recover, or look."""
        journal = get_runtime().store.journal
        if journal is None:
            raise CommandError("There is no journal: see DEFERRED_SESSIONS['JOURNAL_DIRECTORY'].")
        try:
            if options["check"]:
                self._check(journal)
            else:
                self._recover(journal)
        except (DeferredSessionsError, OSError) as error:
            raise CommandError(str(error)) from error

    def _check(self, journal: Journal) -> None:
        with get_runtime().flusher.journal.at_rest():
            found = recovery.read(journal)
        self.stdout.write(
            f"{journal.directory}: {found.frames:,} records of {len(found.newest):,} sessions; "
            f"{found.unreadable:,} of a layout that this version does not read, "
            f"{found.past_memory:,} that only say that PostgreSQL has a session."
        )
        for _, why in found.rejected:
            self.stdout.write(why)
        if get_runtime().store.exists():
            self.stdout.write("Memory is intact: there is nothing to recover.")

    def _recover(self, journal: Journal) -> None:
        runtime = get_runtime()
        if runtime.store.exists():
            self.stdout.write("Memory is intact: there is nothing to recover.")
        else:
            count = len(recovery.read(journal).newest)
            runtime.store.open()
            self.stdout.write(f"{count:,} sessions were in the journal; memory has them again.")
        report = runtime.flusher.flush_once(time.time(), everything=True)
        if report.failure:
            raise CommandError(f"{report.remaining} sessions stay dirty: {report.failure}")
        self.stdout.write(f"{report.rows:,} rows were written, {report.remaining:,} are left.")
