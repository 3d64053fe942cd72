"""Builds the parts once per process, on first use.

Called by every face of the package. This is the only module that constructs the
parts; they get plain arguments and never look at settings themselves. Invariant: a
process has at most one runtime, and a changed setting makes a new one.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Final

from django.core.signals import setting_changed

from deferred_sessions.acquisition import Acquisition
from deferred_sessions.adoption import Adoption
from deferred_sessions.agent import LOCK as AGENT_LOCK
from deferred_sessions.agent import Agent
from deferred_sessions.busy import Busy
from deferred_sessions.bypass import Bypass
from deferred_sessions.condition import ConditionReader
from deferred_sessions.conf import (
    NAME,
    Settings,
    Site,
    cookie_attributes,
    get_settings,
    is_in_use,
    is_under_test,
    longest_life,
    saves_every_request,
    session_serializer,
    session_store,
    site,
    traits,
)
from deferred_sessions.encoding import RowEncoder
from deferred_sessions.exporting import Exporter
from deferred_sessions.figures import FiguresReader
from deferred_sessions.fleet_membership import FleetMembership
from deferred_sessions.fleet_revocations import FleetRevocations
from deferred_sessions.flusher import Flusher
from deferred_sessions.handover import Handover
from deferred_sessions.identity import store_identity
from deferred_sessions.intake import Intake
from deferred_sessions.memory.cache import SessionCache
from deferred_sessions.memory.claims import Claims
from deferred_sessions.memory.counters import Counter, Counters
from deferred_sessions.memory.directory import default_directory
from deferred_sessions.memory.history import History
from deferred_sessions.memory.journal import Journal
from deferred_sessions.memory.locks import ProcessLock
from deferred_sessions.memory.pulse import Pulse, moment
from deferred_sessions.memory.store import HostStore
from deferred_sessions.node_cookie import NodeCookie
from deferred_sessions.old_engine import old_engine
from deferred_sessions.overlap import Overlap
from deferred_sessions.payload import Codec, Serializer, Snapshot, codec_for
from deferred_sessions.refusals import Refusals
from deferred_sessions.request_end import RequestEnd
from deferred_sessions.servers.copies import Copies
from deferred_sessions.servers.fleet import Fleet
from deferred_sessions.servers.fleet_leases import FleetLeases
from deferred_sessions.servers.resync import Resync
from deferred_sessions.servers.server import SessionServer
from deferred_sessions.session_servers import build_session_servers
from deferred_sessions.stand_in import StandIn
from deferred_sessions.succession import Succession
from deferred_sessions.tiers import Tiers
from deferred_sessions.write_through import WriteThrough
from deferred_sessions.writer import RecordWriter

QUEUE: Final = "queue.lock"  # who of this node waits for which session
TEST_SIZE: Final = 16 << 20  # bytes; each test database has a store of its own
DAY: Final = 86_400.0  # seconds; a deploy with both engines alive takes less
READ_ONCE: Final = (
    NAME,
    "SECRET_KEY",
    "SESSION_SERIALIZER",
    "SESSION_SAVE_EVERY_REQUEST",
    "DATABASES",
)
_built: list[Runtime] = []  # at most one; appending is atomic, so no lock is needed


@dataclass(frozen=True, slots=True, kw_only=True)
class Runtime:
    """The parts of one process, wired together."""

    settings: Settings
    urgent_keys: frozenset[str]
    """Session keys whose change does not wait for the flusher."""
    saves_every_request: bool
    serializer: type[Serializer]
    claims: Claims
    busy: Busy
    store: HostStore
    fleet: Fleet
    server: SessionServer
    """The first of the fleet."""
    codec: Codec
    overlap: Overlap
    cache: SessionCache[Snapshot]
    counters: Counters
    tiers: Tiers
    flusher: Flusher
    revocations: FleetRevocations
    leases: FleetLeases
    membership: FleetMembership
    succession: Succession
    resync: Resync
    handover: Handover
    pulse: Pulse
    agent: Agent
    request_end: RequestEnd
    statistics: FiguresReader
    condition: ConditionReader
    node_cookie: NodeCookie | None
    """What the middleware names the node with, or None."""
    site: Callable[[], Site]
    """Returns how the site is reached, for the director."""

    def close(self) -> None:
        """End the agent and unmap what is mapped; the next use of a part maps it again."""
        self.agent.stop()
        self.store.close()
        self.counters.close()
        self.pulse.close()


def get_runtime() -> Runtime:
    """Return the runtime of this process; build it if there is none. Does no I/O.

    Raises:
        ImproperlyConfigured: The settings have problems; the message lists them.
    """
    if not _built:  # two threads may both build; the first to append wins
        _built.append(build_runtime(get_settings(), store_identity(), session_serializer()))
    return _built[0]


def get_runtime_in_use() -> Runtime | None:
    """Return the runtime of this process, or None if the project uses another engine."""
    return get_runtime() if is_in_use() else None


def reset_runtime() -> None:
    """Forget the runtime, so that the next use builds one from the settings of then."""
    while _built:
        _built.pop().close()


def build_runtime(settings: Settings, identity: str, serializer: type[Serializer]) -> Runtime:
    """Wire the parts for these settings; does no I/O.

    Raises:
        ImproperlyConfigured: There are fewer servers than copies.
    """
    directory = settings.directory or default_directory(identity)
    policy = settings.policy
    size = settings.store_size
    if settings.directory is None and is_under_test():
        size = min(size, TEST_SIZE)
    journal = None
    if settings.journal_directory is not None:
        journal = Journal(
            settings.journal_directory,
            store=directory,
            size=settings.journal_size,
            sync_interval=settings.sync_interval,
            identity=identity,
        )
    store = HostStore(directory, size=size, identity=identity, journal=journal)
    codec = codec_for(serializer)
    cache: SessionCache[Snapshot] = SessionCache(settings.cache_size)
    counters = Counters(directory)
    store.on_evicted = partial(counters.add, Counter.EVICTIONS)
    pulse = Pulse(directory, patience=settings.node_timeout / 2)
    servers = build_session_servers(
        settings,
        store=store,
        pulse=pulse,
        counters=counters,
        traits=traits(),
    )
    fleet, leases = servers.fleet, servers.leases
    claims = Claims(directory)
    claims.on_waited = counters.add_wait
    encoder = RowEncoder()
    refusals = Refusals(leases, encoder, codec, counters)
    writer = RecordWriter(
        store=store,
        servers=fleet,
        copies=servers.copies,
        encoder=encoder,
        refusals=refusals,
        counters=counters,
        policy=policy,
    )
    handover = Handover(
        store=store,
        servers=fleet,
        leases=leases,
        claims=claims,
        writer=writer,
        counters=counters,
        pulse=pulse,
    )
    claims.is_wanted = handover.is_wanted
    acquisition = Acquisition(
        store=store,
        leases=leases,
        waiting=Claims(directory, file=QUEUE),
        pulse=pulse,
        counters=counters,
        timeout=settings.lock_timeout,
        clock=moment,
    )
    adoption = None
    if settings.import_engine is not None:
        adoption = _adoption(settings.import_engine, fleet, servers.copies, codec, encoder)
    intake = Intake(
        store=store,
        servers=fleet,
        encoder=encoder,
        acquisition=acquisition,
        stand_in=StandIn(
            servers=fleet,
            membership=servers.membership,
            handover=handover,
            pulse=pulse,
            lock=ProcessLock(directory / "stand_in.lock"),
            agent=ProcessLock(directory / AGENT_LOCK),
        ),
        pulse=pulse,
        writer=writer,
        adoption=adoption,
    )
    flusher = Flusher(
        store=store,
        servers=fleet,
        writer=writer,
        counters=counters,
        policy=policy,
        revocations=servers.revocations,
        batch_size=settings.batch_size,
        journal_age=settings.journal_age,
        adopted_for=longest_life() + DAY,
    )
    figures = FiguresReader(
        store=store,
        counters=counters,
        flusher=flusher,
        history=History(directory),
        interval=policy.interval,
        node=os.uname().nodename,
    )
    succession = Succession(
        store=store,
        servers=fleet,
        membership=servers.membership,
        flusher=flusher,
        pulse=pulse,
        policy=policy,
        clock=moment,
    )
    resync = Resync(fleet)
    agent = Agent(
        store=store,
        servers=servers,
        succession=succession,
        resync=resync.resync_once,
        flusher=flusher,
        handover=handover,
        pulse=pulse,
        figures=figures,
        policy=policy,
        heartbeat=settings.heartbeat_interval,
    )
    return Runtime(
        settings=settings,
        urgent_keys=frozenset(settings.write_through_keys),
        saves_every_request=saves_every_request(),
        serializer=serializer,
        claims=claims,
        busy=Busy(
            claims,
            is_exclusive=settings.locking == "exclusive",
            timeout=settings.lock_timeout,
        ),
        store=store,
        fleet=fleet,
        server=fleet.first,
        codec=codec,
        overlap=Overlap(
            codec=codec, counters=counters, is_merging=settings.locking != "last-write-wins"
        ),
        cache=cache,
        counters=counters,
        flusher=flusher,
        revocations=servers.revocations,
        leases=leases,
        membership=servers.membership,
        succession=succession,
        resync=resync,
        handover=handover,
        pulse=pulse,
        agent=agent,
        tiers=Tiers(
            store=store,
            pulse=pulse,
            cache=cache,
            codec=codec,
            servers=fleet,
            intake=intake,
            bypass=Bypass(
                store=store,
                servers=fleet,
                intake=intake,
                writer=writer,
                copies=servers.copies,
                counters=counters,
                policy=policy,
            ),
            write_through=WriteThrough(
                store=store,
                servers=fleet,
                writer=writer,
                copies=servers.copies,
                counters=counters,
                policy=policy,
                create_when_down=settings.create_when_down,
            ),
            counters=counters,
            policy=policy,
            write_on_create=settings.write_on_create,
            adoption=adoption,
        ),
        request_end=RequestEnd(
            store=store,
            flusher=flusher,
            counters=counters,
            policy=policy,
            flush=settings.flush_at_request_end,
        ),
        statistics=figures,
        condition=ConditionReader(store=store, servers=fleet, flusher=flusher, policy=policy),
        node_cookie=_node_cookie(settings),
        site=site,
    )


def build_adoption(engine: str) -> Adoption:
    """Return what takes over the sessions of `engine`, whatever `IMPORT_ENGINE` says.

    Raises:
        ImproperlyConfigured: There is no such engine.
    """
    runtime = get_runtime()
    return _adoption(engine, runtime.fleet, Copies(runtime.fleet), runtime.codec, RowEncoder())


def build_exporter(engine: str) -> Exporter:
    """Return what copies the sessions to the table of `engine`.

    Raises:
        ImproperlyConfigured: There is no such engine.
        NotListableError: It has no table.
    """
    return Exporter(servers=get_runtime().fleet, store=session_store(engine))


def _adoption(
    engine: str, fleet: Fleet, copies: Copies, codec: Codec, encoder: RowEncoder
) -> Adoption:
    store = old_engine(session_store(engine))
    return Adoption(engine=store, servers=fleet, copies=copies, codec=codec, encoder=encoder)


def _node_cookie(settings: Settings) -> NodeCookie | None:
    if settings.node_cookie is None or settings.node is None:
        return None
    return NodeCookie(settings.node_cookie, settings.node, cookie_attributes)


def _on_setting_changed(*, setting: str, **_: object) -> None:
    if setting in READ_ONCE:
        reset_runtime()


setting_changed.connect(_on_setting_changed, dispatch_uid="deferred_sessions.runtime")
