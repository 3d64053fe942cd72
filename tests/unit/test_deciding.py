"""How a server stands, from what an agent sees of all."""

from __future__ import annotations

from typing import Any

import pytest

from deferred_sessions.servers.deciding import MARGIN, STEADY, Seen, decide
from deferred_sessions.servers.standing import (
    DISORDER,
    EPOCH,
    FILLING,
    GONE,
    IN,
    LEAVING,
    ORDER,
    OUT,
    Standing,
    Standings,
)
from deferred_sessions.servers.view import View

NOW = 1_800_000_000.0
NAMES = ("a", "b", "c")
WELL = Seen().heard((), has_sessions=False)
REFUSED = WELL.missed(is_refused=True)
SLOW = WELL.missed(is_refused=False)
HUNG = SLOW.missed(is_refused=False)


def standings(order: str | None = None, **phases: str) -> dict[str, Standing]:
    found = {name: Standing(name, 5, phase, 7.0) for name, phase in phases.items()}
    order = view(found).order if order is None else order
    return {**found, ORDER: Standing(ORDER, 5, order, 7.0)}


def view(known: Standings, names: str = "abc", **weights: float) -> View:
    servers = tuple((name, weights.get(name, 1.0)) for name in names)
    return View(servers=servers, copies=1, standings=known)


def decided(
    known: Standings, found: dict[str, Seen], now: float = NOW, *, alone: bool = True, **more: Any
) -> Standings:
    return decide(view(known, **more), found, now, is_unanimous=alone)


def phases(found: Standings) -> str:
    return " ".join(found[name].phase for name in NAMES)


def seen(**found: Seen) -> dict[str, Seen]:
    return {**dict.fromkeys(NAMES, WELL), **found}


@pytest.mark.parametrize(
    ("known", "found", "expected"),
    [
        ("in in in", {}, "in in in"),
        ("in in in", {"a": REFUSED}, "out in in"),
        ("in in in", {"a": SLOW}, "in in in"),
        ("in in in", {"a": HUNG}, "out in in"),
        ("in in in", {"a": REFUSED, "b": REFUSED}, "out out in"),
        ("in in in", dict.fromkeys(NAMES, REFUSED), "in in in"),  # it may be this node
        ("in filling filling", {"a": REFUSED}, "in filling filling"),  # nobody to take over
        ("in filling in", {"b": REFUSED}, "in out in"),
        ("in in filling", {"a": REFUSED, "b": REFUSED}, "in in filling"),
        ("out in in", {"a": WELL}, "out in in"),  # not before it has been there for a while
        ("out in in", {"a": WELL._replace(answers=STEADY)}, "filling in in"),
        ("leaving in in", {}, "filling in in"),  # named again
        ("leaving in in", {"a": Seen()}, "leaving in in"),  # not before it answers
        ("gone in in", {}, "filling in in"),
        ("leaving filling in", {"b": REFUSED}, "filling out in"),
    ],
)
def test_transitions(known: str, found: dict[str, Seen], expected: str) -> None:
    before = standings(**dict(zip(NAMES, known.split(), strict=True)))
    after = decided(before, seen(**found))
    assert phases(after) == expected
    for name in NAMES:
        assert after[name].number == before[name].number + (after[name].phase != before[name].phase)


def test_since_when_it_may_lack_something() -> None:
    gone = decided(standings(a=IN, b=IN, c=IN), seen(a=REFUSED))
    assert gone["a"].since == NOW - MARGIN
    back = decided(gone, seen(a=WELL._replace(answers=STEADY)), NOW + 60)
    assert back["a"] == Standing("a", 7, FILLING, NOW - MARGIN)
    again = decided(back, seen(a=REFUSED), NOW + 70)
    assert again["a"] == Standing("a", 8, OUT, NOW - MARGIN)


def test_what_other_nodes_decided() -> None:
    """It stands in the registers of the servers."""
    register = tuple(standings(a=OUT, b=IN, c=IN).values())
    found = decided({}, seen(a=REFUSED, b=WELL.heard(register, has_sessions=True)))
    assert found == {s.server: s for s in register}


def test_a_new_site_begins_when_all_servers_are_there() -> None:
    assert decided({}, {**seen(), "c": Seen()}) == {}
    found = decided({}, seen())
    assert phases(found) == "in in in"
    assert view(found).is_in_order
    used = WELL._replace(has_sessions=True)
    assert phases(decided({}, seen(b=used), alone=False)) == "gone in gone"
    assert phases(decided({}, seen(b=used))) == "filling in filling"


def test_several_servers_with_sessions_and_no_register() -> None:
    """Nobody knows by which weights these are where they are."""
    used = WELL._replace(has_sessions=True)
    assert not view(decided({}, seen(a=used, b=used, c=used))).is_in_order


def test_servers_added_and_taken_out() -> None:
    before = standings(a=IN, b=IN, d=IN, e=OUT)
    found = decided(before, seen(), alone=False)
    assert phases(found) == "in in gone"
    assert found["d"] == Standing("d", 6, LEAVING, NOW - MARGIN)
    assert found["e"] == Standing("e", 6, LEAVING, 7.0)
    assert decided(found, seen(), alone=False) == found
    found = decided(found, seen())
    assert found["c"] == Standing("c", 2, FILLING, EPOCH)


def test_a_server_is_used_while_all_nodes_name_it() -> None:
    """And nobody goes to and fro while some do not."""
    whole = standings(a=IN, b=IN, c=IN)
    gone = decided(whole, seen(), alone=False, names="ab")
    assert decided(gone, seen(), alone=False) == gone
    again = decided(gone, seen())
    assert phases(again) == "in in filling"
    assert again["c"].since == NOW - MARGIN


def test_nodes_that_differ_only_in_a_server_that_is_not_used_have_the_same_homes() -> None:
    whole = standings(a=IN, b=IN, c=IN)
    gone = decided(whole, seen(), alone=False, names="ab")
    few, many = view(gone, names="ab"), view(gone)
    assert few.digest == many.digest
    assert few.homes(("b", "a")) == many.homes(("c", "b", "a")) == ("b",)
    assert few.leaving == many.leaving == ("c",)
    assert view(gone, names="ab", a=2.0).digest != few.digest


def test_weights_that_change() -> None:
    """Sessions may be anywhere, until a walk has ended under the new ones."""
    whole = standings(a=IN, b=IN, c=IN)
    found = decided(whole, seen(), a=2.0)
    assert found[ORDER] == Standing(ORDER, 6, DISORDER, NOW)
    assert decided(found, seen()) == found  # nor after they are as they were
    assert not view(found).is_whole


def test_an_outage_is_no_disorder() -> None:
    found = decided(standings(a=IN, b=IN, c=IN), seen(a=REFUSED))
    assert found[ORDER].number == 5
    assert not view(found).is_whole
    assert view(found).is_in_order


def test_all_that_were_in_have_left() -> None:
    """When they are empty, there is nobody who could fill the others."""
    found = decided(standings(c=GONE, a=IN), seen(), names="c")
    assert (found["c"].phase, found["a"].phase) == (FILLING, LEAVING)
    assert decided(found, seen(), names="c")["c"].phase == FILLING
    emptied = {**found, "a": found["a"].changed(GONE, NOW)}
    found = decided(emptied, seen(), names="c")
    assert found["c"].phase == IN
    assert not view(found, names="c").is_in_order


def test_a_server_with_weight_0_that_nobody_knows() -> None:
    """It may have all there is."""
    before = view({}, names="a")
    found = decide(before, seen(), NOW, emptied=["b"], is_unanimous=True)
    assert (found["a"].phase, found["b"]) == (IN, Standing("b", 1, LEAVING, EPOCH))


def test_phases_are_known() -> None:
    assert {IN, OUT, FILLING, LEAVING, GONE} == {"in", "out", "filling", "leaving", "gone"}
