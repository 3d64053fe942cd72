"""The agent: what a node does in the background, one thread of one process at a time.

Started by the first request that a web process serves, or as `manage.py sessionagent`.
Every process has a candidate; a file lock elects one, and when its process dies another
takes over within a second. Each duty is a plain `..._once(now)`. Invariant: no error of a
duty ends the agent or keeps it from the next duty.

The heart has a thread of its own, because nothing must keep it from beating; and so has what
takes long, such as to flush, because other nodes wait for what they have asked for.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Collection, Iterable
from typing import Final

from django.db import connections

from deferred_sessions.exceptions import DeferredSessionsError
from deferred_sessions.figures import FiguresReader
from deferred_sessions.flusher import Flusher
from deferred_sessions.handover import Handover
from deferred_sessions.membership import Membership
from deferred_sessions.memory import forks
from deferred_sessions.memory.locks import ProcessLock
from deferred_sessions.memory.pulse import Pulse, moment
from deferred_sessions.memory.store import HostStore
from deferred_sessions.policy import Policy
from deferred_sessions.report import AGENT
from deferred_sessions.revocations import Revocations
from deferred_sessions.servers.listener import GRANTED, REQUESTED, REVOKED, Listener
from deferred_sessions.servers.server import SessionServer

logger = logging.getLogger(__name__)

LOCK: Final = "agent.lock"  # held by the agent of the node
ROUND: Final = 1.0  # seconds between rounds, and between attempts at being elected
SOON: Final = 0.003  # seconds until a session that is in use is looked at again
ASK_AGAIN: Final = 0.25  # seconds until PostgreSQL is asked whether it is still waited for
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
        membership: Membership,
        handover: Handover,
        pulse: Pulse,
        figures: FiguresReader,
        policy: Policy,
        heartbeat: float,
        listen: str,
    ) -> None:
        self._figures = figures
        self._store = store
        self._server = server
        self._flusher = flusher
        self._revocations = revocations
        self._membership = membership
        self._handover = handover
        self._pulse = pulse
        self._policy = policy
        self._heartbeat = heartbeat
        self._listen = listen
        self._beat_began: float | None = None
        self._is_asked = False
        self._asked_at = 0.0
        self._lock = ProcessLock(store.directory / LOCK)
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

    def beat_once(self, now: float) -> list[str]:
        """Tell the others that this node lives, and find out who does not."""
        self._beat_began = moment()
        try:
            return self._membership.beat_once(now)
        finally:
            self._beat_began = None

    def release_once(self, now: float) -> bool:
        """Give up the sessions that other nodes wait for; return whether some are in use."""
        ask = not 0 <= now - self._asked_at < ASK_AGAIN or not self._is_asked
        if ask:
            self._asked_at = now
        self._is_asked = self._handover.release_once(now, ask=ask)
        return self._is_asked

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
            self._stop.wait(ROUND)

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
        slow = threading.Thread(
            target=self._serve_slowly, name="deferred_sessions_agent_slow", daemon=True
        )
        slow.start()
        for work in (self._beat_on, self._wait_for_beat):
            threading.Thread(
                target=work, name=f"deferred_sessions_agent{work.__name__}", daemon=True
            ).start()
        self._server.leave_pool()
        promptly = (self.release_once, self.read_revocations_once)
        owner, pause = self._server.owner, min(ROUND, self._flusher.journal.interval or ROUND)
        with Listener(self._listen, node=owner, retry_after=LISTEN_AGAIN) as listener:
            next_round, every = 0.0, ROUND
            try:
                while not self._stop.is_set():
                    now = time.time()
                    if not next_round - every <= now < next_round:
                        next_round = now + every
                        self._pulse.granted()  # a word may have been lost
                        self._round(now, promptly)
                    else:
                        self._do(self._flusher.journal.sync_once, now)
                    wait = min(pause, every, SOON if self._is_asked else ROUND)
                    self._hear(listener.wait(wait, self._stop), time.time())
            finally:
                connections.close_all()
                slow.join()

    def _serve_slowly(self) -> None:
        """Do what may take long, in a thread of its own."""
        self._server.leave_pool()
        try:
            while not self._stop.is_set():
                self._round(
                    time.time(),
                    (
                        self.flush_if_forgotten_once,
                        self.clear_dead_readers_once,
                        self.keep_journal_once,
                        self.sample_figures_once,
                    ),
                )
                self._stop.wait(ROUND)
        finally:
            connections.close_all()

    def _beat_on(self) -> None:
        """Beat, whatever else the agent waits for."""
        self._server.leave_pool()
        try:
            while not self._stop.is_set():
                self._do(self.beat_once, time.time())
                self._stop.wait(self._heartbeat)
        finally:
            connections.close_all()

    def _wait_for_beat(self) -> None:
        """Keep the pulse while PostgreSQL hangs: as in any outage, memory goes on to be trusted."""
        patience = self._pulse.patience / 4
        while not self._stop.wait(patience):
            began = self._beat_began
            if began is not None and moment() - began > patience:
                self._pulse.beat(moment())

    def _hear(self, words: Collection[str], now: float) -> None:
        """Do at once what somebody waits for."""
        if GRANTED in words:
            self._pulse.granted()
        if REQUESTED in words:
            self._is_asked, self._asked_at = True, 0.0
        if self._is_asked:
            self._do(self.release_once, now)
        if REVOKED in words:
            self._do(self.read_revocations_once, now)

    def _round(self, now: float, duties: Iterable[Callable[[float], object]]) -> None:
        for duty in duties:
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
