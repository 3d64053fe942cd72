"""How a server stands, from what an agent sees of all."""

from __future__ import annotations

import pytest

from deferred_sessions.servers.deciding import MARGIN, STEADY, Seen, decide
from deferred_sessions.servers.view import (
    EPOCH,
    FILLING,
    IN,
    LEAVING,
    OUT,
    Standing,
    Standings,
)

NOW = 1_800_000_000.0
NAMES = ("a", "b", "c")
WELL = Seen().heard((), has_sessions=False)
REFUSED = WELL.missed(is_refused=True)
SLOW = WELL.missed(is_refused=False)
HUNG = SLOW.missed(is_refused=False)


def standings(**phases: str) -> dict[str, Standing]:
    return {name: Standing(name, 5, phase, 7.0) for name, phase in phases.items()}


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
    ],
)
def test_transitions(known: str, found: dict[str, Seen], expected: str) -> None:
    before = standings(**dict(zip(NAMES, known.split(), strict=True)))
    after = decide(before, NAMES, seen(**found), NOW)
    assert phases(after) == expected
    for name in NAMES:
        assert after[name].number == before[name].number + (after[name].phase != before[name].phase)


def test_since_when_it_may_lack_something() -> None:
    gone = decide(standings(a=IN, b=IN, c=IN), NAMES, seen(a=REFUSED), NOW)
    assert gone["a"].since == NOW - MARGIN
    back = decide(gone, NAMES, seen(a=WELL._replace(answers=STEADY)), NOW + 60)
    assert back["a"] == Standing("a", 7, FILLING, NOW - MARGIN)
    again = decide(back, NAMES, seen(a=REFUSED), NOW + 70)
    assert again["a"] == Standing("a", 8, OUT, NOW - MARGIN)


def test_what_other_nodes_decided() -> None:
    """It stands in the registers of the servers."""
    register = tuple(standings(a=OUT, b=IN, c=IN).values())
    found = decide({}, NAMES, seen(a=REFUSED, b=WELL.heard(register, has_sessions=True)), NOW)
    assert found == {s.server: s for s in register}


def test_a_new_site_begins_when_all_servers_are_there() -> None:
    assert decide({}, NAMES, {**seen(), "c": Seen()}, NOW) == {}
    assert phases(decide({}, NAMES, seen(), NOW)) == "in in in"
    used = WELL._replace(has_sessions=True)
    assert phases(decide({}, NAMES, seen(b=used), NOW)) == "filling in filling"


def test_servers_added_and_taken_out() -> None:
    found = decide(standings(a=IN, b=IN, d=IN), NAMES, seen(), NOW)
    assert phases(found) == "in in filling"
    assert found["c"].since == EPOCH
    assert found["d"].phase == IN  # whose it is not to say


def test_phases_are_known() -> None:
    assert {IN, OUT, FILLING, LEAVING} == {"in", "out", "filling", "leaving"}
