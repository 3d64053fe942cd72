"""What `resyncsessions` and `rebalancesessions` have in common: to repair, and to look.

Used by these two. Invariant: whatever they are interrupted at, the agents go on with; and
what an agent is at already, they only watch.
"""

from __future__ import annotations

import time
from argparse import ArgumentParser
from typing import Any, Final

from django.core.management.base import BaseCommand, CommandError

from deferred_sessions.exceptions import DeferredSessionsError
from deferred_sessions.management.progress import ProgressBar
from deferred_sessions.runtime import Runtime, get_runtime
from deferred_sessions.servers.mender import Tally
from deferred_sessions.servers.resync import Resync
from deferred_sessions.servers.standing import OUT

PAUSE: Final = 0.25  # seconds between looks at what another node does
LINE: Final = "{:24} {:8} {:>12} {:>18} {:>12}"


class RepairCommand(BaseCommand):
    """A command that puts the sessions of several servers in order."""

    empties_leaving: bool
    """It also moves away what is on servers that SERVERS does not name any more."""

    def add_arguments(self, parser: ArgumentParser) -> None:
        """Define the options."""
        parser.add_argument(
            "--check", action="store_true", help="only say what there is to do; change nothing"
        )

    def handle(self, **options: Any) -> None:
        """Repair, or look."""
        runtime = runtime_of_several()
        if options["check"]:
            self._compare(runtime)
        else:
            runtime.resync.begin()
            self._repair_all(runtime)

    def _repair_all(self, runtime: Runtime) -> None:
        """Repair until nothing is left to do, and say what that came to."""
        resync, began = runtime.resync, time.monotonic()
        try:
            self._refuse_servers_that_are_not_there(runtime)
            done = self._repair(resync, leaving=self.empties_leaving)
        except DeferredSessionsError as error:
            raise CommandError(f"Run it again, or leave the rest to the agents: {error}") from error
        seconds = time.monotonic() - began
        self.stdout.write(
            f"{done.looked_at:,} rows looked at in {seconds:.1f} s; {done.copied:,} copied to "
            f"where they were missing or older, {done.removed:,} removed from where they do not "
            "belong"
        )

    def _compare(self, runtime: Runtime) -> None:
        """Print what there would be to do."""
        found: dict[str, Tally] = {}
        resync, view = runtime.resync, runtime.fleet.view()
        try:
            with ProgressBar(self.stderr, resync.size()) as progress:
                for server, tally in resync.check(time.time()):
                    found[server] = found.get(server, Tally()) + tally
                    progress.show(sum(each.looked_at for each in found.values()))
        except DeferredSessionsError as error:
            raise CommandError(str(error)) from error
        self.stdout.write(LINE.format("server", "is", "sessions", "missing elsewhere", "strays"))
        for server in (*view.names, *resync.leaving()):
            figures = [f"{number:,}" for number in found.get(server, ())] or ["?"] * 3
            self.stdout.write(LINE.format(server, view.phase(server), *figures))

    def _repair(self, resync: Resync, *, leaving: bool) -> Tally:
        """Return what was done, here or by an agent meanwhile."""
        total, current, server = Tally(), Tally(), ""
        with ProgressBar(self.stderr, None) as bar:
            while True:
                progress = resync.resync_once(time.time(), leaving=leaving)
                if progress is None:
                    at_work = resync.progress(leaving=leaving)
                    if not at_work:
                        return total + current
                    progress = at_work[0]
                    time.sleep(PAUSE)
                if progress.server != server or progress.tally < current:
                    total, current, server = total + current, Tally(), progress.server
                current = progress.tally
                bar.show(total.looked_at + current.looked_at)

    def _refuse_servers_that_are_not_there(self, runtime: Runtime) -> None:
        view = runtime.fleet.view()
        away = [name for name in view.names if view.phase(name) == OUT]
        if away:
            raise CommandError(
                f"{', '.join(away)} cannot be reached. What the others have is served; when it "
                "answers, the agents bring it up to date, and this command can."
            )
        if not runtime.fleet.wish.places_as(view.order):
            raise CommandError(
                "DEFERRED_SESSIONS['SERVERS'] and ['COPIES'] are not in force yet: all hosts must "
                "have the same, and new servers answer. Sessions are on "
                f"{', '.join(view.names)}, {view.copies} times each."
            )


def runtime_of_several() -> Runtime:
    """Return the runtime, if there is something to put in order at all.

    Raises:
        CommandError: There is only one server, or no agent that knows how they stand.
    """
    runtime = get_runtime()
    if runtime.fleet.only is not None:
        raise CommandError(
            "DEFERRED_SESSIONS['SERVERS'] names one server: all is there. If it named another "
            "before, that may still have sessions: name it with weight 0 until it is empty."
        )
    if not runtime.fleet.view().settled_on:
        raise CommandError(
            "The agent of this host is not at work. Run this on a host of the site, and as the "
            "user, of the web processes."
        )
    return runtime
