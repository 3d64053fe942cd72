"""Placement: shares, ranks, and what moves when servers come and go."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deferred_sessions.servers.placement import REMEMBERED, Placement

KEYS = [f"{number:032x}" for number in range(10_000)]
names = st.text(min_size=1, max_size=12)
weights = st.dictionaries(names, st.floats(0.1, 100.0), min_size=1, max_size=8)
keys = st.text("0123456789abcdefghijklmnopqrstuvwxyz", min_size=8, max_size=40)


def equal(*names: str) -> Placement:
    return Placement(dict.fromkeys(names, 1.0))


def shares(placement: Placement, *, rank: int = 0) -> dict[str, float]:
    found = Counter(placement.ranked(key)[rank] for key in KEYS)
    return {name: count / len(KEYS) for name, count in found.items()}


@pytest.mark.parametrize("servers", [("a", "b", "c"), ("sessions_1", "sessions_2", "sessions_3")])
@pytest.mark.parametrize("rank", [0, 1, 2])
def test_e03_shares_are_even(servers: tuple[str, ...], rank: int) -> None:
    """E03: every rank of three servers has a third of the sessions, give or take 5 %."""
    found = shares(equal(*servers), rank=rank)
    assert set(found) == set(servers)
    assert all(share == pytest.approx(1 / 3, rel=0.05) for share in found.values())


def test_e04_pairs_are_even() -> None:
    """E04: of three servers every pair holds as many sessions as any other."""
    placement = equal("a", "b", "c")
    pairs = Counter(frozenset(placement.ranked(key)[:2]) for key in KEYS)
    assert len(pairs) == 3
    assert all(count / len(KEYS) == pytest.approx(1 / 3, rel=0.05) for count in pairs.values())


def test_shares_follow_the_weights() -> None:
    placement = Placement({"small": 1, "middle": 2, "large": 3.0})
    expected = {"small": 1 / 6, "middle": 2 / 6, "large": 3 / 6}
    assert shares(placement) == pytest.approx(expected, rel=0.06)


@given(weights, keys)
def test_e04_copies_are_on_different_servers(weights: dict[str, float], key: str) -> None:
    """E04: a rank names every server once; so two copies are never on one."""
    assert sorted(Placement(weights).ranked(key)) == sorted(weights)


@given(weights, names, st.floats(0.1, 100.0), keys)
def test_only_the_share_of_a_server_moves(
    weights: dict[str, float], name: str, weight: float, key: str
) -> None:
    """Without the one that came or went, all others stand in the order they had."""
    others = {each: weights[each] for each in weights if each != name}
    if others:
        with_it = Placement({**others, name: weight}).ranked(key)
        assert Placement(others).ranked(key) == tuple(each for each in with_it if each != name)


@given(weights, keys, st.data())
def test_more_weight_never_means_a_lower_rank(
    weights: dict[str, float], key: str, data: Any
) -> None:
    name = data.draw(st.sampled_from(sorted(weights)))
    heavier = {**weights, name: weights[name] * 2}
    assert Placement(heavier).ranked(key).index(name) <= Placement(weights).ranked(key).index(name)


@given(weights, keys)
def test_weights_are_relative_and_unordered(weights: dict[str, float], key: str) -> None:
    """Twice as much of everything changes nothing (a power of two: exactly)."""
    backwards = {name: weights[name] * 2 for name in reversed(weights)}
    assert Placement(weights).ranked(key) == Placement(backwards).ranked(key)


@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_e03_a_server_more_moves_one_share(count: int) -> None:
    """E03: at most 1/(n+1) + 3 % of the sessions move, all of them to the new server."""
    old = [f"s{number}" for number in range(count)]
    before, after = equal(*old), equal(*old, "new")
    moved = {key for key in KEYS if before.ranked(key)[0] != after.ranked(key)[0]}

    assert len(moved) / len(KEYS) <= 1 / (count + 1) + 0.03
    assert {after.ranked(key)[0] for key in moved} == {"new"}


def test_the_sessions_of_a_server_that_goes_are_shared_out() -> None:
    placement = equal("a", "b", "c", "d")
    orphans = [key for key in KEYS if placement.ranked(key)[0] == "a"]
    heirs = Counter(placement.ranked(key)[1] for key in orphans)
    assert set(heirs) == {"b", "c", "d"}
    assert all(n / len(orphans) == pytest.approx(1 / 3, rel=0.12) for n in heirs.values())


RANKS = [
    ({"a": 1, "b": 1, "c": 1}, "0" * 32, "bca"),
    ({"a": 1, "b": 1, "c": 1}, "session-key", "acb"),
    ({"a": 1, "b": 2, "c": 3.5}, "0" * 32, "bca"),
    ({"ä": 1, "b": 1, "c": 1}, "session-key", "cäb"),
]


@pytest.mark.parametrize(("weights", "key", "ranks"), RANKS)
def test_every_version_ranks_alike(weights: dict[str, float], key: str, ranks: str) -> None:
    """Written down here: another order would look for sessions where they are not."""
    assert "".join(Placement(weights).ranked(key)) == ranks


def test_every_process_ranks_alike() -> None:
    """Whatever seeds the hashes of a process."""
    program = (
        "from deferred_sessions.servers.placement import Placement; "
        "p = Placement({'a': 1, 'b': 2, 'c': 3}); print([p.ranked(str(n)) for n in range(100)])"
    )
    answers = {
        subprocess.run(
            [sys.executable, "-c", program],
            env={"PYTHONHASHSEED": seed, "PYTHONPATH": ":".join(sys.path)},
            check=True,
            capture_output=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(answers) == 1


def test_draws_at_both_ends_can_be_ranked() -> None:
    """Neither the smallest nor the largest number divides by zero."""

    class Constant:
        def __init__(self, digest: bytes) -> None:
            self.digest = lambda: digest
            self.update = lambda _: None
            self.copy = lambda: self

    placement = Placement({"a": 1, "b": 2, "c": 2})
    ends = (b"\0" * 8, b"\xff" * 8, b"\0" * 8)
    placement._servers = [
        (name, weight, Constant(end))  # type: ignore[misc]
        for (name, weight, _), end in zip(placement._servers, ends, strict=True)
    ]
    assert placement.ranked("key") == ("b", "c", "a")


@pytest.mark.parametrize(
    "weights", [{}, {"a": 0}, {"a": -1}, {"a": float("nan")}, {"a": float("inf")}]
)
def test_weights_that_make_no_sense(weights: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=r"no session server|must be positive"):
        Placement(weights)


def test_ranks_of_many_keys_differ() -> None:
    """Neighbouring keys have nothing to do with each other."""
    placement = equal("a", "b", "c")
    ranks = [placement.ranked(key) for key in KEYS[:1000]]
    same = sum(one == other for one, other in pairwise(ranks))
    assert 100 < same < 240  # a sixth of them, by chance


def test_ranks_are_remembered_and_few() -> None:
    """All keys of one order share its tuple, or each remembered key would keep its own."""
    placement = equal("a", "b", "c")
    found = {key: placement.remembered(key) for key in KEYS[:1000]}
    assert found == {key: placement.ranked(key) for key in found}
    assert len({id(order) for order in found.values()}) == 6
    assert placement.remembered.cache_info().maxsize == REMEMBERED
