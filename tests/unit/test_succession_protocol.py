"""Every state of two nodes and one session while its server goes away and comes back, searched.

A model of `succession`, `servers.lookup`, `servers.fleet_leases` and the filling of a server, for
one copy. The views: 0, A decides; 1, A is out and B decides; 2, A is being filled; 3, A decides
again; 4, A is out once more. Nodes learn of them at any time, one after the other; A may be
away, or there all the time for those who have not heard. A request that has found nothing in
memory may ask for the lease when another one has put the session there.

Shown: no node ever serves less than what was acknowledged, as no node dies; no write is refused;
and writes of two nodes are never both accepted under one fence.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import pytest

LAST = 4  # view
EPOCH = 10  # by which fences grow with each view
A, B = 0, 1


class Row(NamedTuple):
    owner: int  # -1 for nobody
    fence: int
    value: int
    written: int  # in which view


class Node(NamedTuple):
    view: int = 0
    settled: int = 0
    agreed: int = 0  # the view that it knows all to have moved to
    fence: int = 0  # of its record; 0 for none
    value: int = 0
    dirty: bool = False
    asks: int = -1  # by which view a request has found nothing in memory, and will ask


class State(NamedTuple):
    nodes: tuple[Node, ...]
    rows: tuple[Row | None, ...]
    view: int = 0
    is_away: bool = False  # server A
    is_filled: bool = False
    acknowledged: int = 0
    grants: int = 0
    late: int = 0  # requests that have found nothing in memory
    accepted: frozenset[tuple[int, int]] = frozenset()  # fences, and who wrote under them
    fault: str = ""


def authority(view: int) -> int:
    return A if view in {0, 3} else B


class Model:
    has_barrier = True
    has_copies = True
    is_wary = True  # of what was left over from an earlier outage
    asks_in_order = True  # finds out which view it goes by before it looks into memory
    says_epoch = True  # that it goes by; else servers give fences of what they have heard of

    def __init__(self, changes: int, grants: int, late_requests: int) -> None:
        self.changes = changes
        self.grants = grants  # of the lease of a session that is free
        self.late_requests = late_requests

    def start(self) -> State:
        return State((Node(), Node()), (Row(-1, 1, 0, 0), None))

    def after(self, state: State) -> Iterator[State]:
        """Yield the states that may come next."""
        yield from self._servers(state)
        for i, node in enumerate(state.nodes):
            yield from self._moves(state, i, node)
            yield from self._asks_late(state, i, node)
            if node.fence:
                yield from self._holds(state, i, node)
            elif (after := self._acquire(state, i, node)) is not None:
                yield after

    def _servers(self, state: State) -> Iterator[State]:
        if state.view in {0, 1, 4}:
            yield state._replace(is_away=not state.is_away)
        has_all = all(node.settled == state.view for node in state.nodes)
        if (
            state.view == 0
            or (state.view == 1 and not state.is_away)
            or (state.view == 3 and has_all)
        ):
            yield state._replace(view=state.view + 1)
        if state.view == 2 and all(node.settled >= 2 for node in state.nodes):
            if not state.is_filled:
                rows = state.rows
                if newer(rows[B], rows[A]):
                    rows = (rows[B], rows[B])
                yield state._replace(rows=rows, is_filled=True)
            else:
                yield state._replace(view=3)
        if state.view == 3 and has_all:
            yield state._replace(rows=(state.rows[A], None))  # what was left over

    def _moves(self, state: State, i: int, node: Node) -> Iterator[State]:
        if node.view < state.view:
            yield put(state, i, node._replace(view=node.view + 1))
        if node.settled < node.view:
            if node.fence:
                told = self._write(state, i, self._outbid(state, node))
                if told is not None:
                    yield put(told, i, told.nodes[i]._replace(settled=node.view))
            else:
                yield put(state, i, node._replace(settled=node.view))
        if all(other.settled == node.view for other in state.nodes):
            yield put(state, i, node._replace(agreed=node.view))

    def _outbid(self, state: State, node: Node) -> Node:
        """Return the node with a later fence than what was left over on the new server."""
        if authority(node.view) == authority(node.settled):
            return node
        row = state.rows[authority(node.view)]
        left_over = row.fence if row is not None and row.written < node.view else 0
        return node._replace(fence=max(node.fence, left_over) + 1)

    def _asks_late(self, state: State, i: int, node: Node) -> Iterator[State]:
        """Yield what a request does to which memory seemed empty."""
        may_ask = not (self.has_barrier and self._is_moving(node))
        if not node.fence and node.asks < 0 and may_ask and state.late < self.late_requests:
            yield put(state, i, node._replace(asks=node.view))._replace(late=state.late + 1)
        if node.asks >= 0 and (self.asks_in_order or may_ask):
            view = node.asks if self.asks_in_order else node.view
            if is_gone(state, authority(view)):
                return
            epoch = self._epoch(state, view)
            yield put(given(state, i, view, epoch), i, node._replace(asks=-1))

    def _holds(self, state: State, i: int, node: Node) -> Iterator[State]:
        fault = "" if node.value == state.acknowledged else "less than was acknowledged"
        if state.acknowledged < self.changes:
            after = node._replace(value=node.value + 1, dirty=True)
            count = state.acknowledged + 1
            yield put(state, i, after)._replace(acknowledged=count, fault=fault)
        if node.dirty and (written := self._write(state, i, node)) is not None:
            yield written
        server = authority(node.view)
        row = state.rows[server]
        if not node.dirty and not is_gone(state, server) and node.settled == node.view:
            rows = state.rows
            if row is not None and row.owner == i and row.fence == node.fence:
                rows = with_row(rows, server, row._replace(owner=-1))
            yield put(state, i, node._replace(fence=0, value=0))._replace(rows=rows)

    def _write(self, state: State, i: int, node: Node) -> State | None:
        """Return what follows a write to the server that decides; None if that is away."""
        server = authority(node.view)
        if is_gone(state, server):
            return None
        row, new = state.rows[server], Row(i, node.fence, node.value, node.view)
        rows, fault = state.rows, ""
        if row is None or is_taken(row, new):
            rows = with_row(rows, server, new)
        elif (row.fence, row.value) != (new.fence, new.value):
            fault = "refused, though nobody was found dead"
        if node.view == 2 and self.has_copies and newer(new, rows[A]):
            rows = with_row(rows, A, new)
        if any(fence == node.fence and other != i for fence, other in state.accepted):
            fault = "two writers under one fence"
        after = put(state, i, node._replace(dirty=False))._replace(rows=rows)
        accepted = state.accepted | {(node.fence, i)}
        return after._replace(accepted=in_use(after, accepted), fault=state.fault or fault)

    def _acquire(self, state: State, i: int, node: Node) -> State | None:
        server = authority(node.view)
        if is_gone(state, server) or (self.has_barrier and self._is_moving(node)):
            return None
        row = state.rows[server]
        if node.view in {1, 2, 4}:
            is_silent = node.view != 2 or is_gone(state, A)
            if not is_silent and newer(state.rows[A], row):
                row = state.rows[A]
            outage = 1 if node.view < LAST else LAST
            if is_silent and self.is_wary and row is not None and row.written < outage:
                return None  # it may be left over from an earlier outage
        if row is None or row.owner not in {-1, i}:
            return None
        if row.owner == -1:
            if state.grants >= self.grants:
                return None  # far enough
            row = row._replace(owner=i, fence=max(row.fence + 1, self._epoch(state, node.view)))
            state = state._replace(grants=state.grants + 1)
        fault = "" if row.value == state.acknowledged else "less than was acknowledged"
        row = row._replace(fence=max(row.fence, self._epoch(state, node.view) - 1))
        after = put(state, i, node._replace(fence=row.fence, value=row.value, dirty=False))
        rows = with_row(state.rows, server, row)
        return after._replace(rows=rows, fault=fault)

    def _epoch(self, state: State, view: int) -> int:
        return EPOCH * (view if self.says_epoch else max(node.view for node in state.nodes))

    @staticmethod
    def _is_moving(node: Node) -> bool:
        return any(authority(v) != authority(node.view) for v in range(node.agreed, node.view))


def in_use(state: State, accepted: frozenset[tuple[int, int]]) -> frozenset[tuple[int, int]]:
    """Return those of `accepted` that may be met again: fences only grow."""
    fences = [node.fence for node in state.nodes if node.fence]
    least = min([*fences, *(row.fence for row in state.rows if row is not None)])
    return frozenset(one for one in accepted if one[0] >= least)


def given(state: State, i: int, view: int, epoch: int) -> State:
    """Return the state when a node has asked for a lease, and has not kept what it was given."""
    server = authority(view)
    row = state.rows[server]
    if row is None or row.owner not in {-1, i}:
        return state
    if row.owner == -1:
        row = row._replace(owner=i, fence=max(row.fence + 1, epoch))
    row = row._replace(fence=max(row.fence, epoch - 1))
    return state._replace(rows=with_row(state.rows, server, row))


def is_gone(state: State, server: int) -> bool:
    return server == A and state.is_away


def newer(one: Row | None, other: Row | None) -> bool:
    if one is None or other is None:
        return one is not None
    return (one.fence, one.value) > (other.fence, other.value)


def is_taken(row: Row, new: Row) -> bool:
    is_news = row.value < new.value or (row.value == new.value and row.fence < new.fence)
    return is_news and (
        row.fence < new.fence or (row.fence == new.fence and row.owner in {-1, new.owner})
    )


def with_row(rows: tuple[Row | None, ...], server: int, row: Row | None) -> tuple[Row | None, ...]:
    return (row, rows[B]) if server == A else (rows[A], row)


def put(state: State, i: int, node: Node) -> State:
    return state._replace(nodes=(*state.nodes[:i], node, *state.nodes[i + 1 :]))


def search(model: Model, most: int = 3_000_000) -> int:
    """Return how many states there are; raise at the first fault."""
    known = {model.start()}
    todo = list(known)
    while todo:
        for after in model.after(todo.pop()):
            if after not in known:
                assert not after.fault, (after.fault, after)
                assert len(known) < most
                known.add(after)
                todo.append(after)
    return len(known)


@pytest.mark.parametrize("most", [(2, 2, 0), (1, 1, 1)])
def test_every_state(most: tuple[int, int, int]) -> None:
    """E06: nothing acknowledged is lost, and nobody reads less, when a server goes and returns."""
    assert search(Model(*most)) > 1000


@pytest.mark.parametrize(
    "without", ["has_barrier", "has_copies", "is_wary", "asks_in_order", "says_epoch"]
)
def test_the_search_would_find_a_fault(without: str) -> None:
    """Each of these parts of the protocol is needed."""
    model = Model(changes=1, grants=2, late_requests=1)
    setattr(model, without, False)
    with pytest.raises(AssertionError, match="acknowledged|refused|one fence"):
        search(model)
