"""The agent: what a node does in the background, one thread of one process at a time.

Started by the first request that a web process serves, or as `manage.py sessionagent`.
Every process has a candidate; a file lock elects one, and when its process dies another
takes over within a second. Each duty is a plain `..._once(now)`. Invariant: no error of a
duty ends the agent or keeps it from the next duty.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import Final

from django.db import connections

from deferred_sessions.exceptions import DeferredSessionsError
from deferred_sessions.figures import FiguresReader
from deferred_sessions.flusher import Flusher
from deferred_sessions.memory import forks
from deferred_sessions.memory.locks import ProcessLock
from deferred_sessions.memory.store import HostStore
from deferred_sessions.policy import Policy
from deferred_sessions.report import AGENT
from deferred_sessions.revocations import Revocations
from deferred_sessions.servers.listener import Listener
from deferred_sessions.servers.server import SessionServer

logger = logging.getLogger(__name__)

BEAT: Final = 1.0  # seconds between rounds, and between attempts at being elected
LISTEN_AGAIN: Final = 10.0  # seconds after the connection was lost, or refused
LOG_INTERVAL: Final = 60.0  # seconds between messages about the same duty


class Agent:
    """Does a node's duties while it is elected."""

    def __init__(
        self,
        *,
        store: HostStore,
        server: SessionServer,
        flusher: Flusher,
        revocations: Revocations,
        figures: FiguresReader,
        policy: Policy,
    ) -> None:
        self._figures = figures
        self._store = store
        self._server = server
        self._flusher = flusher
        self._revocations = revocations
        self._policy = policy
        self._lock = ProcessLock(store.directory / "agent.lock")
        self._stop = threading.Event()
        self._starting = threading.Lock()
        self._thread: threading.Thread | None = None
        self._logged_at: dict[str, float] = {}

    # Duties

    def flush_if_forgotten_once(self, now: float) -> bool:
        """Flush if no poller has for two intervals; return whether it had to."""
        last = self._flusher.last_report()
        if last is None:
            oldest = self._store.oldest_change()
            is_forgotten = oldest is not None and now - oldest > 2 * self._policy.interval
        else:
            is_forgotten = not 0 <= now - last.at <= 2 * self._policy.interval
        if not is_forgotten:
            return False
        report = self._flusher.flush_once(now, by=AGENT)
        if report.rows and not report.skipped:
            self._warn(
                "no_poller",
                now,
                "No poller has flushed for %.0f s, so the agent did. Is Celery running on this "
                "host, with beat?",
                2 * self._policy.interval,
                extra={"action": "no_poller"},
            )
        return True

    def clear_dead_readers_once(self, now: float) -> int:  # noqa: ARG002 - a duty like the others
        """Free what killed processes held on to; return how many there were."""
        return self._store.clear_dead_readers()

    def read_revocations_once(self, now: float) -> int:
        """Act on what others deleted or changed in PostgreSQL."""
        return self._revocations.read_once(now)

    def keep_journal_once(self, now: float) -> None:
        """Sync, swap and reset the logs of the journal, as far as it is time to."""
        self._flusher.journal.keep_once(now)

    def sample_figures_once(self, now: float) -> bool:
        """Keep the figures of this moment for charts, every ten seconds."""
        return self._figures.sample_once(now)

    # The thread

    @property
    def is_started(self) -> bool:
        """There is a candidate in this process."""
        return self._thread is not None and self._thread.is_alive()

    def start(self) -> None:
        """Start a candidate in this process, unless there is one."""
        with self._starting:
            if not self.is_started:
                forks.watch(self)
                self._stop.clear()
                self._thread = threading.Thread(
                    target=self.run, name="deferred_sessions_agent", daemon=True
                )
                self._thread.start()

    def stop(self) -> None:
        """End the candidate of this process, and wait for it."""
        self._stop.set()
        thread = self._thread
        if thread is not None and thread is not threading.current_thread():
            thread.join()
        self._thread = None

    def run(self) -> None:
        """Be a candidate, and the agent when elected, until `stop` is called."""
        while not self._stop.is_set():
            try:
                self._store.open()
                with self._lock.held(wait=False) as is_elected:
                    if is_elected:
                        self._serve()
            except DeferredSessionsError as error:
                self._warn("candidate", time.time(), "The agent cannot start: %s", error)
            except Exception:  # noqa: BLE001 - the directory may be gone for a moment
                self._warn("candidate", time.time(), "The agent cannot start.", exc_info=True)
            self._stop.wait(BEAT)

    def before_fork(self) -> None:
        """Leave the thread to the parent."""

    def after_fork(self, *, in_child: bool) -> None:
        """Have a child start a candidate of its own when it serves its first request."""
        if in_child:
            self._thread = None
            self._starting = threading.Lock()
            self._stop = threading.Event()

    def _serve(self) -> None:
        """Go round the duties until `stop` is called."""
        with Listener(self._server.alias, retry_after=LISTEN_AGAIN) as listener:
            pause = min(BEAT, self._flusher.journal.interval or BEAT)
            next_round = 0.0
            try:
                while not self._stop.is_set():
                    now = time.time()
                    if not next_round - BEAT <= now < next_round:
                        self._round(now)
                        next_round = now + BEAT
                    else:
                        self._do(self._flusher.journal.sync_once, now)
                    if listener.wait(pause, self._stop):
                        next_round = 0.0
            finally:
                connections.close_all()

    def _round(self, now: float) -> None:
        for duty in (
            self.read_revocations_once,
            self.flush_if_forgotten_once,
            self.clear_dead_readers_once,
            self.keep_journal_once,
            self.sample_figures_once,
        ):
            if not self._stop.is_set():
                self._do(duty, now)

    def _do(self, duty: Callable[[float], object], now: float) -> None:
        try:
            duty(now)
        except DeferredSessionsError as error:
            self._warn(duty.__name__, now, "%s failed: %s", duty.__name__, error)
        except Exception:  # noqa: BLE001 - a duty that fails must not end the agent
            self._warn(duty.__name__, now, "%s failed.", duty.__name__, exc_info=True)

    def _warn(
        self,
        what: str,
        now: float,
        message: str,
        *arguments: object,
        exc_info: bool = False,
        extra: dict[str, str] | None = None,
    ) -> None:
        if now - self._logged_at.get(what, -LOG_INTERVAL) < LOG_INTERVAL:
            return
        self._logged_at[what] = now
        extra = extra or {"action": "agent_in_trouble", "duty": what}
        logger.warning(message, *arguments, exc_info=exc_info, extra=extra)
