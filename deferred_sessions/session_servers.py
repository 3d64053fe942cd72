"""Builds what there is of each session server, and what joins them.

Called by `runtime` alone, with plain arguments. Invariant: whatever exists once per server is
made here, by alias; a single server gets the same parts as one of several.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from hashlib import blake2b
from pathlib import Path
from typing import Final

from django.core.exceptions import ImproperlyConfigured

from deferred_sessions.conf import Settings
from deferred_sessions.fleet_membership import FleetMembership
from deferred_sessions.fleet_revocations import FleetRevocations
from deferred_sessions.membership import SERVERS, SETTLED_ON, Membership
from deferred_sessions.memory.counters import Counters
from deferred_sessions.memory.pulse import Pulse, moment
from deferred_sessions.memory.store import HostStore
from deferred_sessions.revocations import Revocations
from deferred_sessions.servers.copies import Copies
from deferred_sessions.servers.fleet import Fleet
from deferred_sessions.servers.fleet_leases import FleetLeases
from deferred_sessions.servers.leases import Leases
from deferred_sessions.servers.listener import Listener
from deferred_sessions.servers.server import SessionServer

VIEW: Final = "servers"  # note: how the session servers stand, see `servers.view`
LISTEN_AGAIN: Final = 10.0  # seconds after a connection was lost, or refused


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionServers:
    """The parts of all session servers."""

    fleet: Fleet
    copies: Copies
    leases: FleetLeases
    membership: FleetMembership
    revocations: FleetRevocations
    listen: Callable[[str], Listener]
    """Makes a listener for a server, not connected yet."""


def build_session_servers(
    settings: Settings,
    *,
    store: HostStore,
    pulse: Pulse,
    counters: Counters,
    traits: Mapping[str, Sequence[str]],
) -> SessionServers:
    """Wire the parts for these settings; does no I/O.

    Raises:
        ImproperlyConfigured: Each copy needs a server of its own.
    """
    if settings.copies > len(settings.weights):
        raise ImproperlyConfigured(
            f"DEFERRED_SESSIONS wants {settings.copies} COPIES of each session, and names "
            f"{len(settings.weights)} SERVERS: add servers, or lower COPIES."
        )
    owner = partial(_owner, settings.node, store)
    timeout = settings.server_deadline
    heart_timeout = timeout and min(timeout, settings.node_timeout / 3)
    fleet = Fleet(
        settings.weights,
        copies=settings.copies,
        emptied=settings.emptied,
        make=partial(SessionServer, owner=owner, timeout=timeout),
        note=partial(_view, store, pulse),
    )

    def membership(server: SessionServer) -> Membership:
        heart = SessionServer(
            server.alias, owner=owner, timeout=heart_timeout, breaker=server.breaker
        )
        return Membership(
            leases=Leases(heart),
            server=heart,
            pulse=pulse,
            timeout=settings.node_timeout,
            traits=traits,
            clock=moment,
            says=dict if fleet.only is not None else partial(_said, fleet),
        )

    def revocations(server: SessionServer) -> Revocations:
        return Revocations(
            store=store,
            servers=fleet,
            server=server,
            counters=counters,
            policy=settings.policy,
        )

    def listen(alias: str) -> Listener:
        past_pooler = settings.listen if fleet.only is not None else None
        return Listener(past_pooler or alias, node=owner, retry_after=LISTEN_AGAIN)

    return SessionServers(
        fleet=fleet,
        copies=Copies(fleet),
        leases=FleetLeases(fleet, Leases),
        membership=FleetMembership(fleet, membership, pulse=pulse, clock=moment),
        revocations=FleetRevocations(fleet, revocations),
        listen=listen,
    )


def _view(store: HostStore, pulse: Pulse) -> bytes | None:
    """Return what the node's agent noted of the servers; None if it is dead, or none ever was."""
    if not store.exists() or pulse.is_late(moment()):
        return None
    return store.note(VIEW) or None


def _default_name(directory: Path) -> str:
    """Return the name of the host, and of its store if there could be others."""
    digest = blake2b(str(directory).encode(), digest_size=3).hexdigest()
    return f"{os.uname().nodename[:40]}:{digest}"


def _owner(name: str | None, store: HostStore) -> str:
    """Return the name of this node and the incarnation of its store."""
    incarnation = store.incarnation()  # opens the store, and its journal
    if name is None:
        name = store.node(_default_name(store.directory))
    return f"{name}#{incarnation}"


def _said(fleet: Fleet) -> dict[str, str]:
    """Return what each heartbeat tells the other nodes."""
    settled_on = fleet.view().settled_on
    return {SERVERS: fleet.wish.encoded()} | ({SETTLED_ON: settled_on} if settled_on else {})
