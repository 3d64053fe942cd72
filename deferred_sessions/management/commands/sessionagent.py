"""`manage.py sessionagent`: the agent as a process of its own."""

from __future__ import annotations

import signal
import threading
from typing import Any

from django.core.management.base import BaseCommand

from deferred_sessions.runtime import get_runtime


class Command(BaseCommand):
    """Does this host's background duties until it is terminated."""

    help = (
        "Do this host's background duties until interrupted or terminated: end sessions that "
        "were deleted in PostgreSQL, give up those that other hosts ask for, tell them that this "
        "one lives, sync the journal, flush if nobody else does. Run it on the host, and as the "
        "user, of the web processes; needed only with DEFERRED_SESSIONS['AGENT'] = False, "
        "else web processes do it."
    )

    def handle(self, **options: Any) -> None:  # noqa: ARG002
        """Be the agent, or the one that takes over from it."""
        agent, over = get_runtime().agent, threading.Event()
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: over.set())
        agent.start()
        self.stdout.write("The agent is at work, or stands by for the one that is.")
        over.wait()
        agent.stop()
