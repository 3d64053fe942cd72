"""`manage.py drainsessions`: give up everything before this host goes away."""

from __future__ import annotations

import time
from argparse import ArgumentParser
from typing import Any

from django.core.management.base import BaseCommand, CommandError

from deferred_sessions.exceptions import DeferredSessionsError
from deferred_sessions.runtime import Runtime, get_runtime

PAUSE = 0.05  # seconds between rounds, while requests finish


class Command(BaseCommand):
    """Flushes what this host has, and releases it to the other hosts."""

    help = (
        "Before this host goes away: write its sessions to PostgreSQL and release them, so that "
        "other hosts take them over at once. The health URL says from now on that it is going; "
        "take it out of the load balancer, too. Run it on the host, and as the user, of the web "
        "processes. Safe to repeat; `sessionproxy resume` takes it back."
    )

    def add_arguments(self, parser: ArgumentParser) -> None:
        """Define the options."""
        parser.add_argument(
            "--timeout",
            type=float,
            default=30.0,
            metavar="SECONDS",
            help="wait that long for requests that hold sessions (default: 30)",
        )

    def handle(self, **options: Any) -> None:
        """Release until nothing is left, or the time is over."""
        runtime = get_runtime()
        if not runtime.store.exists():
            self.stdout.write("This host has no sessions in memory.")
            return
        began = time.monotonic()
        runtime.condition.drain(time.time())
        try:
            released, stayed = self._drain(runtime, began + options["timeout"])
        except DeferredSessionsError as error:
            raise CommandError(f"The rest stays here: {error}") from error
        seconds = time.monotonic() - began
        self.stdout.write(f"{released} sessions released in {seconds:.2f} s.")
        if stayed:
            raise CommandError(
                f"{stayed} sessions stay: requests of this host hold them, or PostgreSQL refuses "
                "them. They pass to other hosts when those ask for them."
            )

    def _drain(self, runtime: Runtime, deadline: float) -> tuple[int, int]:
        """Return how many sessions were released, and how many stayed."""
        total = 0

        def count(released: int) -> None:
            nonlocal total
            total += released
            if self.stdout.isatty():
                self.stdout.write(f"\r{total} released …", ending="")
                self.stdout.flush()

        while True:
            report = runtime.flusher.flush_once(time.time(), everything=True)
            if report.failure:
                raise CommandError(f"{report.remaining} sessions stay dirty: {report.failure}")
            stayed = runtime.handover.release_all(time.time(), count)
            if not stayed or time.monotonic() > deadline:
                break
            time.sleep(PAUSE)
        if self.stdout.isatty():
            self.stdout.write("")
        return total, stayed
