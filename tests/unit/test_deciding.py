"""How a server stands, from what an agent sees of all."""

from __future__ import annotations

from typing import Any

import pytest

from deferred_sessions.servers.deciding import MARGIN, STEADY, Seen, decide
from deferred_sessions.servers.standing import (
    EPOCH,
    FILLING,
    GONE,
    IN,
    LEAVING,
    ORDER,
    OUT,
    Order,
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


def standings(order: str = "abc", **phases: str) -> dict[str, Standing]:
    found = {name: Standing(name, 5, phase, 7.0) for name, phase in phases.items()}
    return {**found, ORDER: Standing(ORDER, 5, asked(order).kept().encoded(), 7.0)}


def asked(names: str, **weights: float) -> Order:
    return Order.of({name: weights.get(name, 1.0) for name in names}, 1)


def view(known: Standings, names: str = "abc", **weights: float) -> View:
    return View(wish=asked(names, **weights), standings=known)


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
        ("leaving in in", {}, "filling in in"),  # somebody else said so of one of the order
        ("gone in in", {}, "filling in in"),
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
    found = decided({}, seen(b=used))
    assert phases(found) == "gone in gone"
    assert view(found).is_in_order
    assert phases(decided(found, seen(), alone=False)) == "gone in gone"
    assert phases(decided(found, seen())) == "filling in filling"


def test_several_servers_with_sessions_and_no_register() -> None:
    """Nobody knows by which weights these are where they are."""
    used = WELL._replace(has_sessions=True)
    assert not view(decided({}, seen(a=used, b=used, c=used))).is_in_order


def test_a_server_that_is_to_be_emptied_may_have_all_there_is() -> None:
    before = view({}, names="a")
    found = {"a": WELL, "b": WELL._replace(has_sessions=True)}
    known = decide(before, found, NOW, emptied=["b"], is_unanimous=True)
    assert (known["a"].phase, known["b"].phase) == (GONE, IN)
    after = decide(view(known, names="a"), found, NOW, emptied=["b"], is_unanimous=True)
    assert (after["a"].phase, after["b"].phase) == (FILLING, LEAVING)
    assert decide(before, {"a": WELL}, NOW, emptied=["b"], is_unanimous=True) == {}


def test_servers_added_and_taken_out() -> None:
    """When all nodes want that, and the new one answers."""
    before = standings("abde", a=IN, b=IN, d=IN, e=OUT)
    assert decided(before, seen(), alone=False) == {**before, "c": Standing("c", 1, GONE, EPOCH)}
    assert decided(before, seen(c=Seen()))[ORDER] == before[ORDER]
    found = decided(before, seen())
    assert phases(found) == "in in filling"
    assert found["c"] == Standing("c", 2, FILLING, EPOCH)
    assert found["d"] == Standing("d", 6, LEAVING, NOW - MARGIN)
    assert found["e"] == Standing("e", 6, LEAVING, 7.0)
    order = view(found).order
    assert (order.places_as(asked("abc")), order.is_kept, found[ORDER].number) == (True, False, 6)
    assert decided(found, seen()) == found


def test_a_server_is_named_again() -> None:
    """It may have missed something since it left."""
    gone = decided(standings(a=IN, b=IN, c=IN), seen(), names="ab")
    again = decided(gone, seen(), NOW + 60)
    assert phases(again) == "in in filling"
    assert again["c"].since == NOW - MARGIN


def test_nodes_with_other_settings_have_the_same_homes() -> None:
    """Whatever they ask for, before all ask for the same."""
    whole = standings(a=IN, b=IN, c=IN)
    for more in ({"names": "ab"}, {"names": "abcd"}, {"a": 5.0}):
        found = decided(whole, {**seen(), "d": WELL}, alone=False, **more)
        theirs = view(found, **more)  # type: ignore[arg-type]
        assert [theirs.layout.homes(str(n)) for n in range(50)] == [
            view(whole).layout.homes(str(n)) for n in range(50)
        ]
        assert theirs.is_whole


def test_weights_that_change() -> None:
    """Sessions may be anywhere, until a walk has ended under the new ones."""
    whole = standings(a=IN, b=IN, c=IN)
    found = decided(whole, seen(), a=2.0)
    assert found[ORDER].number == 6
    assert not view(found).is_whole
    back = decided(found, seen())
    assert (back[ORDER].number, view(back).is_whole) == (7, False)


def test_an_outage_is_no_disorder() -> None:
    found = decided(standings(a=IN, b=IN, c=IN), seen(a=REFUSED))
    assert found[ORDER].number == 5
    assert not view(found).is_whole
    assert view(found).is_in_order


def test_all_that_were_in_have_left() -> None:
    """When they are empty, there is nobody who could fill the others."""
    found = decided(standings("a", c=GONE, a=IN), seen(), names="c")
    assert (found["c"].phase, found["a"].phase) == (FILLING, LEAVING)
    assert decided(found, seen(), names="c")["c"].phase == FILLING
    emptied = {**found, "a": found["a"].changed(GONE, NOW)}
    found = decided(emptied, seen(), names="c")
    assert found["c"].phase == IN
    assert not view(found, names="c").is_in_order


def test_all_are_to_be_filled_and_nobody_is_left() -> None:
    """After a replacement that was taken back half-way: each may have some."""
    found = decided(standings("c", a=LEAVING, b=LEAVING, c=FILLING), seen())
    assert phases(found) == "filling filling filling"
    found = decided(found, seen())
    assert phases(found) == "in in in"
    assert not view(found).is_in_order


def test_a_register_of_an_earlier_version() -> None:
    known = standings(a=IN, b=IN, c=IN)
    del known[ORDER]
    found = decided(known, seen(), alone=False)
    assert phases(found) == "in in in"
    assert not view(found).is_in_order
    assert decided(found, seen()) == found


def test_phases_are_known() -> None:
    assert {IN, OUT, FILLING, LEAVING, GONE} == {"in", "out", "filling", "leaving", "gone"}
