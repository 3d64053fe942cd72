"""Fills a session server that has come back, or was added, and puts sessions where they belong.

Called by the agent as a duty, by `manage.py resyncsessions` and `manage.py rebalancesessions`.
One of all nodes does it at a time, page by page; how far it is stands in the register of the
server itself, so whoever takes over goes on from there. Invariant: a server is trusted only
when all nodes have sent it each write since before the first page was read; and what is a
stray is removed only where all nodes know that nobody looks for it there.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Final, NamedTuple

from deferred_sessions.exceptions import ServerUnavailableError
from deferred_sessions.servers import repair_sql as sql
from deferred_sessions.servers.fleet import Fleet
from deferred_sessions.servers.mender import Mender, Page, Tally
from deferred_sessions.servers.registry import Registry
from deferred_sessions.servers.server import SessionServer
from deferred_sessions.servers.shelf import Shelf
from deferred_sessions.servers.standing import GONE, IN, ORDER, Standing
from deferred_sessions.servers.view import View

logger = logging.getLogger(__name__)

PAGES: Final = 4  # to be copied between two looks whether it is still for this node to do
DELETE: Final = "delete"
FILL: Final = "fill"
TIDY: Final = "tidy"
UNTIDY: Final = "{}"
"""The position of a server that is in, and since when nobody has put all in order."""


class Step(NamedTuple):
    """One walk through the rows, or the deletions, of one server."""

    what: str
    source: str

    @property
    def start(self) -> str | int:
        """Where the walk begins."""
        return 0 if self.what == DELETE else ""


class Position(NamedTuple):
    """How far the repair of a server is."""

    view: str = ""
    """The digest of the view that it goes by; under another one it begins anew."""
    step: int = 0
    after: str | int | None = None
    """The last that is done of this step."""
    tally: Tally = Tally()

    def encoded(self) -> str:
        """Return it as it stands in the register."""
        return json.dumps(self)

    @classmethod
    def decoded(cls, text: str) -> Position:
        """Return what stands in the register."""
        if text in ("", UNTIDY):
            return cls()
        view, step, after, tally = json.loads(text)
        return cls(view, step, after, Tally(*tally))


class Progress(NamedTuple):
    """What was done, or is being done by another node."""

    server: str
    tally: Tally


class Resync:
    """The repair of all session servers, a page at a time."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet

    def resync_once(self, now: float, *, leaving: bool = False) -> Progress | None:
        """Do the next pages of what is to be done; None if there is nothing to do now.

        First servers that are to be trusted again, then order among those that are; and with
        `leaving`, servers that are to be emptied. A page that was done twice does no harm.

        Raises:
            ServerUnavailableError, RowLockedError: The page is done the next time.
        """
        view = self._fleet.view()
        if not all(map(self._fleet.can_name, view.live)):
            return None  # another host can
        for server in self._unfinished(view, leaving=leaving):
            progress = self._go_on(server, view, now)
            if progress is not None:
                return progress
        return None

    def progress(self, *, leaving: bool = False) -> list[Progress]:
        """Return how far the repair of each server is that is not finished."""
        found = []
        for server in self._unfinished(self._fleet.view(), leaving=leaving):
            rows = self._fleet.named(server).run(sql.PENDING, [server])
            position = Position.decoded(rows[0][1]) if rows else Position()
            found.append(Progress(server, position.tally))
        return found

    def begin(self) -> None:
        """Have everything compared and put in order, unless that is to be done anyway."""
        view = self._fleet.view()
        if not self._untidy(view):
            server = next((n for n in view.names if view.phase(n) == IN), view.names[0])
            self._fleet.named(server).change(sql.BEGIN, [UNTIDY, server])

    def give_up(self, server: str) -> bool:
        """Have nobody look on a server that is leaving any more; return whether it was.

        What only that one has is lost.

        Raises:
            ServerUnavailableError: Some other server was not told, and says otherwise.
        """
        view = self._fleet.view()
        if server not in view.leaving:
            return False
        known = view.standings[server]
        for each in self._fleet.live():
            Registry(each).write([known.changed(GONE, known.since)])
        return True

    def check(self, now: float) -> Iterator[tuple[str, Tally]]:
        """Yield for each server, page by page, what `begin` would have to do; change nothing."""
        view = self._fleet.view()
        mender = self._mender(view)
        for server in (*sorted(view.trusted), *self.leaving()):
            page = Page("", Tally())
            while not page.is_last:
                page = mender.tidy(server, str(page.after), now, mend=False)
                yield server, page.tally

    def size(self) -> int:
        """Return how many rows there are on all servers that are read."""
        return sum(shelf.size() for shelf in self._shelves(self._fleet.view()).values())

    def leaving(self) -> list[str]:
        """Return the servers that are only read from, and that DATABASES still names."""
        return [server.alias for server in self._fleet.leaving()]

    # Inside

    def _unfinished(self, view: View, *, leaving: bool) -> list[str]:
        """Return the servers that there is something to do for, in order."""
        if view.filling:
            return sorted(view.filling)
        return (self.leaving() if leaving else []) or self._untidy(view)

    def _untidy(self, view: View) -> list[str]:
        """Return which servers, if all are in, came in since all was put in order."""
        if self._fleet.only or any(view.phase(server) != IN for server in view.names):
            return []
        return [name for name in view.names if self._fleet.named(name).run(sql.PENDING, [name])]

    def _go_on(self, server: str, view: View, now: float) -> Progress | None:
        """Do the next pages for this server; None if another node does, or it is too early."""
        mine = self._fleet.named(server)
        number, me = view.standings[server].number, self._me()
        if server in view.leaving:
            Registry(mine).write([view.standings[server]])  # no heart tells it any more
        claimed = mine.run(sql.CLAIM, [me, server, number, me])
        if not claimed:
            self._release_if_dead(mine)
            return None
        position = Position.decoded(claimed[0][0])
        if position.view != view.digest:
            if not view.is_agreed:
                mine.change(sql.LEAVE, [claimed[0][0], server, number, me])
                return None
            position = Position(view.digest)
        position = self._do_page(server, view, position, now)
        if position.step < len(self._steps(server, view)):
            mine.change(sql.NOTE, [position.encoded(), server, number, me])
        else:
            self._finish(server, view, position, now)
        return Progress(server, position.tally)

    def _do_page(self, server: str, view: View, position: Position, now: float) -> Position:
        """Do the next page; return how far it is then."""
        step = self._steps(server, view)[position.step]
        after = step.start if position.after is None else position.after
        mender = self._mender(view)
        if step.what == DELETE:
            since = view.standings[server].since
            page = mender.delete(step.source, server, int(after), since)
        elif step.what == FILL:
            page = mender.fill(step.source, server, str(after), PAGES)
        else:
            page = mender.tidy(step.source, str(after), now)
        tally = position.tally + page.tally
        if page.is_last:
            return Position(view.digest, position.step + 1, None, tally)
        return position._replace(after=page.after, tally=tally)

    def _steps(self, server: str, view: View) -> Sequence[Step]:
        """Return what is to be done for this server, in order."""
        if server in view.leaving:
            return [Step(TIDY, server)]
        trusted = sorted(view.trusted)
        if server in view.filling:
            return [*(Step(DELETE, each) for each in trusted), *(Step(FILL, e) for e in trusted)]
        return [Step(TIDY, each) for each in trusted]

    def _finish(self, server: str, view: View, position: Position, now: float) -> None:
        """Take note that all is done for this server."""
        mine, me, number = self._fleet.named(server), self._me(), view.standings[server].number
        looked_at, copied, removed = position.tally
        if server in view.filling:
            self._tell(view.standings[server].changed(IN, now))
            mine.change(sql.LEAVE, [UNTIDY, server, number + 1, me])
            message, extra = FILLED, {"action": "server_filled"}
        elif server in view.leaving:
            if self._shelves(view)[server].page(""):  # what changed while it was looked at
                mine.change(sql.LEAVE, [UNTIDY, server, number, me])
                return
            self._tell(view.standings[server].changed(GONE, now))
            message, extra = EMPTIED, {"action": "server_emptied"}
        else:
            self._tell_of_order(view)
            is_over = self._fleet.view().digest == view.digest
            mine.change(sql.LEAVE, ["" if is_over else UNTIDY, server, number, me])
            message, extra = TIDIED, {"action": "servers_in_order"}
        extra["server"] = server
        logger.warning(message, server, looked_at, copied, removed, extra=extra)

    def _tell(self, standing: Standing) -> None:
        """Tell all servers how one stands, that one first."""
        Registry(self._fleet.named(standing.server)).write([standing])
        for server in self._fleet.live():
            if server.alias != standing.server:
                with suppress(ServerUnavailableError):  # it hears of it from the others
                    Registry(server).write([standing])

    def _tell_of_order(self, view: View) -> None:
        """Tell all servers that each session is where it belongs, if that is news."""
        if not view.is_in_order and not view.leaving:
            known = view.standings[ORDER]
            order = known.changed(view.order.kept().encoded(), known.since)
            for server in self._fleet.live():
                Registry(server).write([order])

    def _mender(self, view: View) -> Mender:
        return Mender(self._shelves(view), view)

    def _shelves(self, view: View) -> dict[str, Shelf]:
        """Return the rows of all servers that answer."""
        return {name: Shelf(self._fleet.named(name)) for name in (*view.live, *self.leaving())}

    def _release_if_dead(self, server: SessionServer) -> None:
        """Have nobody wait for a process of this node that repairs no more."""
        for number, position, repairer in server.run(sql.PENDING, [server.alias]):
            node, _, pid = repairer.rpartition("/")
            if node == self._fleet.owner() and not Path(f"/proc/{pid}").exists():
                server.change(sql.LEAVE, [position, server.alias, number, repairer])

    def _me(self) -> str:
        """Return who repairs: this process of this node."""
        return f"{self._fleet.owner()}/{os.getpid()}"


FILLED: Final = (
    "Session server %s has what it missed, and is used again: %d rows looked at, %d copied there, "
    "%d removed that were deleted meanwhile."
)
TIDIED: Final = (
    "All sessions are where they belong, as was noted on %s to be seen to: %d rows looked at, %d "
    "copied, %d removed."
)
EMPTIED: Final = "Session server %s is empty and may go: %d rows looked at, %d copied, %d removed."
