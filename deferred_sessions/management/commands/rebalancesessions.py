"""`manage.py rebalancesessions`: sessions move to their servers after `SERVERS` has changed."""

from __future__ import annotations

from argparse import ArgumentParser
from typing import Any

from deferred_sessions.management.repair import RepairCommand, runtime_of_several


class Command(RepairCommand):
    """Moves what belongs to other servers now."""

    help = (
        "After DEFERRED_SESSIONS['SERVERS'] or ['COPIES'] has changed, and all hosts run with the "
        "new settings: move the sessions that belong to other servers now, and empty servers that "
        "are not named any more; leave those in DATABASES until then. Visitors may use the site "
        "meanwhile. If it was interrupted, run it again: it goes on where it was."
    )

    def add_arguments(self, parser: ArgumentParser) -> None:
        """Define the options."""
        parser.add_argument(
            "--check", action="store_true", help="only say what would move; change nothing"
        )

    def handle(self, **options: Any) -> None:
        """Move, or look."""
        runtime = runtime_of_several()
        if options["check"]:
            self.compare(runtime)
        else:
            runtime.resync.begin()
            self.repair(runtime, leaving=True)
