"""What a request does in the place of an agent, on a node where none does.

Called by `intake`, which asks before memory is trusted that nobody has vouched for lately.
Invariant: one request at a time stands in, and the others wait for it; only if PostgreSQL
does not answer for so long that this is an outage do they go on with what the node knows.
"""

from __future__ import annotations

import time
from contextlib import suppress
from typing import Final

from deferred_sessions.exceptions import DeferredSessionsError
from deferred_sessions.fleet_membership import FleetMembership
from deferred_sessions.handover import Handover
from deferred_sessions.memory.locks import ProcessLock
from deferred_sessions.memory.pulse import Pulse, moment
from deferred_sessions.servers.fleet import Fleet

PAUSE: Final = 0.001  # seconds between looks at what another request finds out


class StandIn:
    """Beats for the node, and gives up what others wait for, if there is no agent."""

    def __init__(
        self,
        *,
        servers: Fleet,
        membership: FleetMembership,
        handover: Handover,
        pulse: Pulse,
        lock: ProcessLock,
        agent: ProcessLock,
    ) -> None:
        self._servers = servers
        self._membership = membership
        self._handover = handover
        self._pulse = pulse
        self._lock = lock
        self._agent = agent
        """Held by the agent while there is one."""

    def check_in(self, now: float) -> None:
        """Learn whether this node is still taken to be alive, if nobody has asked for long.

        A node that was found dead keeps nothing for certain when this returns. If PostgreSQL
        is away, the node goes on with what it knows, as in any outage.
        """
        until = 0.0
        while self._pulse.is_late(at := moment()):
            with self._lock.held(wait=False) as is_first:
                if is_first:
                    return self._ask(now)
            until = until or at + self._pulse.patience / 4
            if at > until:
                return self._pulse.beat(at)  # as the agent does when PostgreSQL hangs
            time.sleep(PAUSE)
        return None

    def _ask(self, now: float) -> None:
        with suppress(DeferredSessionsError), self._servers.outside():
            self._membership.check_in(now)
            with self._agent.held(wait=False) as is_alone:
                if is_alone:
                    self._handover.release_once(now, reserve=False)
