"""The agent: what a node does in the background, one thread of one process at a time.

Started by the first request that a web process serves, or as `manage.py sessionagent`.
Every process has a candidate; a file lock elects one, and when its process dies another
takes over within a second. Each duty is a plain `..._once(now)`. Invariant: no error of a
duty ends the agent or keeps it from the next duty.

The heart has a thread of its own, because nothing must keep it from beating; so has the sync of
the journal, because no more than its interval may be lost; and so has what takes long, such as
to flush, because other nodes wait for what they have asked for.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Collection, Iterable
from functools import partial
from typing import Final

from django.db import connections

from deferred_sessions.exceptions import DeferredSessionsError
from deferred_sessions.figures import FiguresReader
from deferred_sessions.flusher import Flusher
from deferred_sessions.handover import Handover
from deferred_sessions.memory import forks
from deferred_sessions.memory.locks import ProcessLock
from deferred_sessions.memory.pulse import Pulse, moment
from deferred_sessions.memory.store import HostStore
from deferred_sessions.policy import Policy
from deferred_sessions.report import AGENT
from deferred_sessions.servers.listener import GRANTED, REQUESTED, REVOKED, Listeners
from deferred_sessions.session_servers import SessionServers
from deferred_sessions.succession import Succession

logger = logging.getLogger(__name__)

LOCK: Final = "agent.lock"  # held by the agent of the node
ROUND: Final = 1.0  # seconds between rounds, and between attempts at being elected
SOON: Final = 0.003  # seconds until a session that is in use is looked at again
ASK_AGAIN: Final = 0.25  # seconds until PostgreSQL is asked whether it is still waited for
LOG_INTERVAL: Final = 60.0  # seconds between messages about the same duty
HURRY: Final = 4  # times as often the heart beats while session servers change places


class Agent:
    """Does a node's duties while it is elected."""

    def __init__(
        self,
        *,
        store: HostStore,
        servers: SessionServers,
        succession: Succession,
        resync: Callable[[float], object],
        flusher: Flusher,
        handover: Handover,
        pulse: Pulse,
        figures: FiguresReader,
        policy: Policy,
        heartbeat: float,
    ) -> None:
        self._figures = figures
        self._store = store
        self._servers = servers
        self._flusher = flusher
        self._revocations = servers.revocations
        self._succession = succession
        self._resync = resync
        self._handover = handover
        self._pulse = pulse
        self._policy = policy
        self._heartbeat = heartbeat
        self._beats_began: dict[str, float] = {}
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

    def beat_once(self, now: float, alias: str) -> list[str]:
        """Tell the others that this node lives, and find out who does not, on one server."""
        self._beats_began[alias] = moment()
        try:
            return self._succession.beat_once(now, alias)
        finally:
            self._beats_began.pop(alias, None)

    def release_once(self, now: float) -> bool:
        """Give up the sessions that other nodes wait for; return whether some are in use."""
        ask = not 0 <= now - self._asked_at < ASK_AGAIN or not self._is_asked
        if ask:
            self._asked_at = now
        self._is_asked = self._handover.release_once(now, ask=ask)
        return self._is_asked

    def move_once(self, now: float) -> bool:
        """See which session servers are there, and move to those that take over."""
        return self._succession.move_once(now)

    def resync_once(self, now: float) -> object:
        """Fill a session server that was away, if that is for this node to do."""
        return self._resync(now)

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
        return self._thread is not None

    def start(self) -> None:
        """Start a candidate in this process, unless there is one."""
        with self._starting:
            if not self.is_started:
                forks.watch(self)
                self._stop.clear()
                self._thread = threading.Thread(
                    target=self.run, name="deferred_sessions_agent", daemon=True
                )
                try:
                    self._thread.start()
                except RuntimeError:  # there can be no more threads
                    self._thread = None
                    raise

    def stop(self) -> None:
        """End the candidate of this process, and wait for it."""
        self._stop.set()
        thread = self._thread
        if thread is not None and thread is not threading.current_thread():
            thread.join()
        self._thread = None

    def run(self) -> None:
        """Be a candidate, and the agent when elected, until `stop` is called."""
        try:
            while not self._stop.is_set():
                self._stand()
                self._stop.wait(ROUND)
        finally:
            if self._thread is threading.current_thread():
                self._thread = None  # whatever has ended it: the next request starts another

    def _stand(self) -> None:
        """Try once to be elected, and serve."""
        try:
            self._store.open()
            with self._lock.held(wait=False) as is_elected:
                if is_elected:
                    self._serve()
        except DeferredSessionsError as error:
            self._warn("candidate", time.time(), "The agent cannot start: %s", error)
        except Exception:  # noqa: BLE001 - the directory may be gone for a moment
            self._warn("candidate", time.time(), "The agent cannot start.", exc_info=True)

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
        helpers = [_begun(self._serve_slowly, "slow"), _begun(self._sync_on, "sync")]
        fleet, hearts = self._servers.fleet, set[str]()
        self._start_hearts(hearts)
        for work in (
            *(() if fleet.only else (self._move_on, self._resync_on)),
            self._wait_for_beat,
        ):
            _begun(work, "beat")
        fleet.leave_pools()
        with Listeners(self._servers.listen, self._live) as listener:
            next_round = 0.0
            try:
                while not self._stop.is_set():
                    now = time.time()
                    if not next_round - ROUND <= now < next_round:
                        next_round = now + ROUND
                        self._do(partial(self._go_round, hearts), now, name="round")
                    self._do(partial(self._listen, listener), now, name="listen")
            finally:
                connections.close_all()
                for helper in helpers:
                    helper.join()

    def _go_round(self, hearts: set[str], now: float) -> None:
        """Do what is to be done each second."""
        self._pulse.granted()  # a word may have been lost
        self._start_hearts(hearts)
        self._round(now, (self.release_once, self.read_revocations_once))

    def _listen(self, listener: Listeners, now: float) -> None:  # noqa: ARG002
        """Wait for a word, and do what it asks for."""
        try:
            words = listener.wait(SOON if self._is_asked else ROUND, self._stop)
        except Exception:
            self._stop.wait(ROUND)
            raise
        self._hear(words, time.time())

    def _start_hearts(self, hearts: set[str]) -> None:
        """Have a heart beat for each server; later ones are in use, and not in SERVERS."""
        for server in self._servers.fleet.servers:
            if server.alias not in hearts:
                hearts.add(server.alias)
                _begun(partial(self._beat_on, server.alias), "beat")

    def _serve_slowly(self) -> None:
        """Do what may take long, in a thread of its own."""
        self._servers.fleet.leave_pools()
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

    def _live(self) -> list[str]:
        return [server.alias for server in self._servers.fleet.live()]

    def _beat_on(self, alias: str) -> None:
        """Beat on one server, whatever else the agent waits for."""
        self._servers.fleet.leave_pools()
        beat = partial(self.beat_once, alias=alias)
        try:
            while not self._stop.is_set():
                self._do(beat, time.time(), name="beat_once")
                self._stop.wait(self._heartbeat / (HURRY if self._succession.is_moving else 1))
        finally:
            connections.close_all()

    def _move_on(self) -> None:
        """Follow the session servers as they come and go."""
        self._repeat(self.move_once, self._heartbeat / HURRY)

    def _sync_on(self) -> None:
        """Have on disk what was saved, again and again; nothing else may keep it waiting."""
        journal = self._flusher.journal
        if journal.interval is not None:
            self._repeat(journal.sync_once, journal.interval)

    def _resync_on(self) -> None:
        """Fill the session servers that were away; page after page, as long as there are any."""
        self._servers.fleet.leave_pools()
        try:
            while not self._stop.is_set():
                if not self._do(self.resync_once, time.time()):
                    self._stop.wait(self._heartbeat)
        finally:
            connections.close_all()

    def _repeat(self, duty: Callable[[float], object], pause: float) -> None:
        self._servers.fleet.leave_pools()
        try:
            while not self._stop.is_set():
                self._do(duty, time.time())
                self._stop.wait(pause)
        finally:
            connections.close_all()

    def _wait_for_beat(self) -> None:
        """Keep the pulse while PostgreSQL hangs: as in any outage, memory goes on to be trusted."""
        patience = self._pulse.patience / 4
        while not self._stop.wait(patience):
            began = min(list(self._beats_began.values()), default=None)
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

    def _do(self, duty: Callable[[float], object], now: float, name: str = "") -> object:
        """Return what `duty` does; None if it fails."""
        name = name or duty.__name__
        try:
            return duty(now)
        except DeferredSessionsError as error:
            self._warn(name, now, "%s failed: %s", name, error)
        except Exception:  # noqa: BLE001 - a duty that fails must not end the agent
            self._warn(name, now, "%s failed.", name, exc_info=True)
        return None

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


def _begun(work: Callable[[], object], name: str) -> threading.Thread:
    """Return a thread of the agent, at work."""
    thread = threading.Thread(target=work, name=f"deferred_sessions_agent_{name}", daemon=True)
    thread.start()
    return thread
