"""`manage.py rebalancesessions`: sessions move to their servers after `SERVERS` has changed."""

from __future__ import annotations

from argparse import ArgumentParser
from typing import Any

from django.core.management.base import CommandError

from deferred_sessions.exceptions import DeferredSessionsError
from deferred_sessions.management.repair import RepairCommand, runtime_of_several


class Command(RepairCommand):
    """Moves what belongs to other servers now."""

    help = (
        "After DEFERRED_SESSIONS['SERVERS'] or ['COPIES'] has changed: empty the servers that are "
        "not named any more (leave them in DATABASES until then), and move the sessions that "
        "belong to other servers now, as the agents do by themselves. Visitors may use the site "
        "meanwhile. If it was interrupted, run it again: it goes on where it was."
    )
    empties_leaving = True

    def add_arguments(self, parser: ArgumentParser) -> None:
        """Define the options."""
        super().add_arguments(parser)
        parser.add_argument(
            "--lost",
            metavar="SERVER",
            help="take a server that SERVERS names no more, and that will never answer again, for "
            "empty; what only that one has is lost",
        )

    def handle(self, **options: Any) -> None:
        """Give a server up, repair, or look."""
        if options["lost"] is None:
            super().handle(**options)
            return
        try:
            is_done = runtime_of_several().resync.give_up(options["lost"])
        except DeferredSessionsError as error:
            raise CommandError(f"Run it again: {error}") from error
        if not is_done:
            raise CommandError(f"{options['lost']} is not one that leaves; nothing was done.")
        self.stdout.write(
            f"Nobody looks for sessions on {options['lost']} any more. Should it come back, empty "
            "its tables before you name it again."
        )
