"""The Celery tasks: thin envelopes around the flusher.

Found by `app.autodiscover_tasks()`. The host store can be reached only on its host, so
a tick must reach a worker on *each* node: the task is published to a fanout exchange
and every worker consumes from a queue of its own on it. Invariant: a tick that comes
twice, late or on a host without sessions does no harm.

Publisher and worker are set up here, because in neither place does Celery do it
right by itself: on Redis a Broadcast message is lost unless the publisher declares the
exchange (https://github.com/celery/celery/issues/2638), and a worker consumes only
from queues in its configuration.
"""

from __future__ import annotations

import logging
import os
import time
from typing import Any, Final

from celery import Task, shared_task
from celery.signals import celeryd_after_setup
from kombu import Exchange, Queue
from kombu.common import Broadcast

from deferred_sessions.runtime import get_runtime
from deferred_sessions.schedule import CLEAR_INTERVAL, CLEAR_TASK, FLUSH_TASK, TICK

logger = logging.getLogger(__name__)

EXCHANGE: Final = "deferred_sessions"


class EachNodeTask(Task):
    """A task that is run by one worker on each node, unless told a queue."""

    def apply_async(self, *args: Any, **options: Any) -> Any:
        """Publish to all nodes, declaring the exchange; an explicit queue wins."""
        if not {"queue", "exchange"} & options.keys():
            exchange = Exchange(EXCHANGE, type="fanout")
            options["queue"] = Queue(EXCHANGE, exchange=exchange)
            options["declare"] = [exchange]
        return super().apply_async(*args, **options)


@shared_task(name=FLUSH_TASK, base=EachNodeTask, ignore_result=True, expires=TICK)
def flush() -> dict[str, Any] | None:
    """Write this node's due sessions to PostgreSQL; nothing if it has no host store."""
    runtime = get_runtime()
    if not runtime.store.exists():
        if users := runtime.store.owners_elsewhere():
            logger.warning(
                "Nothing is flushed: the sessions of this host belong to user %d, and this worker "
                "runs as user %d.",
                users[0],
                os.geteuid(),
                extra={"action": "flush_as_wrong_user"},
            )
        return None
    report = runtime.flusher.flush_once(time.time())
    return {"rows": report.rows, "remaining": report.remaining, "failure": report.failure}


@shared_task(name=CLEAR_TASK, ignore_result=True, expires=CLEAR_INTERVAL)
def clear_expired() -> None:
    """Delete expired sessions, as `manage.py clearsessions` does."""
    get_runtime().flusher.clear_expired(time.time())


@celeryd_after_setup.connect(dispatch_uid="deferred_sessions.tasks")
def _listen_to_ticks(instance: Any, **_: Any) -> None:
    """Let a worker that starts consume ticks as well, whatever its `-Q` says."""
    instance.app.amqp.queues.select_add(Broadcast(EXCHANGE, unique=True))
