"""`manage.py resyncsessions`: a session server that missed something catches up, by hand."""

from __future__ import annotations

from argparse import ArgumentParser
from typing import Any

from deferred_sessions.management.repair import RepairCommand, runtime_of_several


class Command(RepairCommand):
    """Compares all session servers, and repairs."""

    help = (
        "Bring session servers up to date that have missed something, compare all copies, and "
        "remove sessions from where they do not belong. The agents do that by themselves when a "
        "server has come back; this does it now, and tells. Visitors may use the site meanwhile. "
        "If it was interrupted, the agents go on where it was."
    )

    def add_arguments(self, parser: ArgumentParser) -> None:
        """Define the options."""
        parser.add_argument(
            "--check", action="store_true", help="only say what differs; change nothing"
        )

    def handle(self, **options: Any) -> None:
        """Repair, or look."""
        runtime = runtime_of_several()
        if options["check"]:
            self.compare(runtime)
        else:
            runtime.resync.begin()
            self.repair(runtime, leaving=False)
