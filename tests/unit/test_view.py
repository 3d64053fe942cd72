"""Which servers are homes of a key, whatever stands of which; and that nodes agree on it."""

from __future__ import annotations

from itertools import permutations

import pytest

from deferred_sessions.servers.placement import Placement, placement_of
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
    completed,
    founded,
    merged,
)
from deferred_sessions.servers.view import View, decode, encode

NOW = 1_800_000_000.0
NAMES = ("a", "b", "c")
WEIGHTS = tuple((name, 1.0) for name in NAMES)
WISH = Order((("other", 1.0),), 5)  # settings, while something is known: they do not count


def view(
    a: str = IN, b: str = IN, c: str = IN, *, copies: int = 1, is_kept: bool = True, **others: str
) -> View:
    phases = {"a": a, "b": b, "c": c, **others}
    standings = {name: Standing(name, 2, phase, NOW) for name, phase in phases.items()}
    order = Order(WEIGHTS, copies, is_kept)
    standings[ORDER] = Standing(ORDER, 2, order.encoded(), NOW)
    return View(wish=WISH, standings=standings)


def key_of(*ranked: str) -> str:
    """Return a key that these servers are to hold in this order."""
    placement = placement_of(WEIGHTS)
    return next(key for n in range(1000) if placement.ranked(key := str(n)) == ranked)


@pytest.mark.parametrize(
    ("phases", "copies", "homes"),
    [
        ({}, 1, "a"),
        ({}, 2, "ab"),
        ({"a": OUT}, 1, "b"),
        ({"a": OUT}, 2, "bc"),
        ({"a": OUT, "b": OUT}, 2, "c"),
        ({"a": FILLING}, 1, "ba"),  # the authority first; what is being filled gets a copy
        ({"a": FILLING}, 2, "bca"),
        ({"b": FILLING}, 1, "a"),  # not its key
        ({"b": FILLING}, 2, "acb"),
        ({"c": FILLING}, 2, "ab"),
        ({"a": FILLING, "b": FILLING}, 1, "cab"),  # either may be in before the other is
        ({"a": OUT, "b": OUT, "c": OUT}, 1, "a"),  # nobody is left: an outage like any other
        ({"a": OUT, "b": FILLING, "c": OUT}, 1, "b"),
    ],
)
def test_homes(phases: dict[str, str], copies: int, homes: str) -> None:
    seen = view(**phases, copies=copies)
    assert seen.homes(NAMES) == tuple(homes)
    assert seen.authority(NAMES) == homes[0]


def test_a_filling_server_has_each_key_that_it_will_be_a_home_of() -> None:
    """Or it would lack some in the moment when it is trusted."""
    placement = Placement(dict(WEIGHTS))
    for copies in (1, 2):
        for phases in ({"a": FILLING}, {"a": FILLING, "b": FILLING}, {"a": FILLING, "b": OUT}):
            before, after = (
                view(**phases, copies=copies),
                view(**{**phases, "a": IN}, copies=copies),
            )
            for number in range(300):
                ranked = placement.ranked(f"key{number}")
                assert set(after.homes(ranked)) <= set(before.homes(ranked))


def test_only_the_keys_of_a_server_move_when_it_goes() -> None:
    before, after = view(), view(a=OUT)
    for ranked in permutations(NAMES):
        has_moved = before.authority(ranked) != after.authority(ranked)
        assert has_moved == (ranked[0] == "a")


def test_registers_are_merged_in_any_order() -> None:
    """The later one counts; of two with one number that which trusts less."""
    one = [Standing("a", 3, IN, 1.0), Standing("b", 1, OUT, 1.0)]
    other = [Standing("a", 2, OUT, 2.0), Standing("b", 1, IN, 2.0), Standing("c", 1, IN, 2.0)]
    for registers in ((one, other), (other, one), (one, other, one)):
        found = merged(*registers)
        assert {name: (s.number, s.phase) for name, s in found.items()} == {
            "a": (3, IN),
            "b": (1, OUT),
            "c": (1, IN),
        }


def test_a_new_site() -> None:
    """Who has no sessions where others have was added, and comes in later."""
    wish = Order(WEIGHTS, 2)
    for has in (False, True):
        found = founded(dict.fromkeys(NAMES, has), wish, NOW)
        order = Order.decoded(found.pop(ORDER).phase)
        assert {s.phase for s in found.values()} == {IN}
        assert order.places_as(wish)
        assert order.is_kept is not has  # nobody knows by which weights they are there
    found = founded({"a": True, "b": False, "c": False}, wish, NOW)
    assert [found[name][2:] for name in NAMES] == [(IN, NOW), (GONE, EPOCH), (GONE, EPOCH)]
    assert Order.decoded(found[ORDER].phase) == Order((("a", 1.0),), 1, is_kept=True)


def test_an_added_server_is_filled() -> None:
    assert completed({}, NAMES) == {}
    known = {name: Standing(name, 5, IN, NOW) for name in "ab"}
    assert completed(known, NAMES) == {**known, "c": Standing("c", 1, GONE, EPOCH)}
    left = Standing("d", 1, LEAVING, EPOCH)
    assert completed(known, "ab", "d") == {**known, "d": left}
    assert completed(known, "a", "b") == known


def test_orders() -> None:
    order = Order((("a", 1.0), ("b", 2.0)), 2).kept()
    assert Order.decoded(order.encoded()) == order
    assert (order.surely, order.is_kept) == (2, True)
    more = Order((("a", 1.0),), 3).after(order)
    assert (more.surely, more.is_kept) == (2, False)  # until all have been copied
    assert more.kept().surely == 3
    less = Order((("a", 1.0),), 1).after(more)
    assert (less.surely, Order.of({"a": 1.0}, 3).after(less).surely) == (1, 1)
    assert more.encoded() < more.kept().encoded()  # of two with one number it counts


def test_a_server_that_leaves_is_no_home() -> None:
    seen = view(d=LEAVING)
    assert seen.leaving == ("d",)
    assert not seen.is_whole
    assert view().is_whole


def test_keys_move_until_all_nodes_have() -> None:
    """Also there and back: some node may be in between."""
    whole, out = view(), view(a=OUT)
    assert not whole.is_moving(key_of("a", "b", "c"))
    gone = whole.with_standings(out.standings)
    assert gone.is_moving(key_of("a", "b", "c"))
    assert not gone.is_moving(key_of("b", "a", "c"))
    back = gone.with_standings(whole.standings)
    assert back.is_moving(key_of("a", "b", "c"))
    assert not back.agreed().is_moving(key_of("a", "b", "c"))
    assert back.agreed().is_agreed


def test_nothing_moves_when_a_server_begins_to_be_filled() -> None:
    gone = view(a=OUT)
    assert gone.with_standings(view(a=FILLING).standings).past == ()


def test_what_a_node_has_to_write_again() -> None:
    whole = view(copies=2).settled_here()
    assert whole.is_settled
    assert not whole.has_moved(key_of(*NAMES))
    gone = whole.with_standings(view(c=OUT, copies=2).standings)
    assert not gone.is_settled
    assert not gone.has_moved(key_of("a", "b", "c"))
    assert gone.has_moved(key_of("a", "c", "b"))  # it has a copy less
    assert gone.has_moved(key_of("c", "a", "b"))


def test_it_is_kept_as_it_was() -> None:
    seen = view(a=OUT).settled_here().with_standings(view().standings)
    assert decode(encode(seen), WISH) == seen


def test_another_order_than_before() -> None:
    """Only what belongs elsewhere moves, until all nodes have."""
    before = view().settled_here().agreed()
    order = Order((("a", 1.0), ("b", 1.0), ("c", 9.0)), 1).after(before.order)
    known = before.standings[ORDER].changed(order.encoded(), NOW)
    after = before.with_standings({**before.standings, ORDER: known})
    keys = [str(n) for n in range(100)]
    moved = [key for key in keys if before.layout.homes(key) != after.layout.homes(key)]
    assert 30 < len(moved) < 70
    assert [key for key in keys if after.is_moving(key)] == moved
    assert [key for key in keys if after.has_moved(key)] == moved
    assert [key for key in keys if after.has_changed_hands(key)] == moved
    assert not after.is_whole
    assert not after.agreed().is_moving(moved[0])
    assert before.begun_late().is_moving(moved[0])


def test_settings_count_while_nothing_is_known() -> None:
    seen = View(wish=Order(WEIGHTS, 2), standings={})
    assert (seen.names, seen.copies, seen.is_in_order) == (NAMES, 2, False)


def test_when_homes_changed_last() -> None:
    """What was written before counts less; but not because all have been put in order since."""
    whole = view(d=GONE)
    later = {
        **whole.standings,
        "d": whole.standings["d"].changed(GONE, NOW + 9),
        "a": whole.standings["a"].changed(OUT, NOW + 5),
    }
    assert whole.with_standings(later).changed_at() == NOW + 5


def test_since_when_deletions_are_owed() -> None:
    assert view().oldest_gap() is None
    assert view(a=OUT).oldest_gap() == NOW
    assert view(is_kept=False).oldest_gap() is view(d=LEAVING).oldest_gap() is None
    assert view().disorder_since() is None
    assert view(is_kept=False).disorder_since() == view(d=LEAVING).disorder_since() == NOW


def test_digests_tell_views_apart() -> None:
    views = [view(), view(copies=2), view(a=OUT), view(d=LEAVING), view(a=FILLING)]
    views.append(view(is_kept=False))
    assert len({seen.digest for seen in views}) == len(views)
    moved = view(a=OUT).with_standings(view().standings)
    assert moved.settled_here().agreed().digest == view().digest
