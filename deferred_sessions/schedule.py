"""The beat entry: when the poller comes, for `CELERY_BEAT_SCHEDULE`.

    from deferred_sessions.schedule import beat_schedule
    CELERY_BEAT_SCHEDULE = {**beat_schedule(seconds=10.0), ...}

Imported by settings modules, therefore invariant: it imports nothing of Django's and
nothing of ours that does. django-celery-beat takes its entries from there, too.
"""

from __future__ import annotations

from typing import Any, Final

FLUSH_TASK: Final = "deferred_sessions.tasks.flush"
CLEAR_TASK: Final = "deferred_sessions.tasks.clear_expired"
TICK: Final = 10.0  # seconds; a flush comes at most this long after it is due
CLEAR_INTERVAL: Final = 3600.0


def beat_schedule(seconds: float = TICK) -> dict[str, dict[str, Any]]:
    """Return the entries that flush every `seconds` and clear up every hour.

    A tick that no worker took within `seconds` expires: after an outage one flush
    does the work of all those that were missed.
    """
    return {
        "deferred-sessions-flush": {
            "task": FLUSH_TASK,
            "schedule": seconds,
            "options": {"expires": seconds},
        },
        "deferred-sessions-clear-expired": {
            "task": CLEAR_TASK,
            "schedule": CLEAR_INTERVAL,
            "options": {"expires": CLEAR_INTERVAL},
        },
    }
