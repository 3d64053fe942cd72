"""The breaker: whether a process tries to connect to a server that is away."""

from __future__ import annotations

from deferred_sessions.servers.breaker import FIRST, LONGEST, Breaker


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_nobody_waits_while_all_is_well() -> None:
    breaker = Breaker()
    assert breaker.pause() == 0
    breaker.succeeded()
    assert breaker.pause() == 0


def test_after_a_failure_one_tries_for_all() -> None:
    clock = Clock()
    breaker = Breaker(clock)
    breaker.failed()
    assert FIRST / 2 <= breaker.pause() <= FIRST
    clock.now += FIRST
    assert breaker.pause() == 0  # this one tries
    assert breaker.pause() > 0  # the others wait for what comes of it
    breaker.succeeded()
    assert breaker.pause() == 0


def test_who_tries_and_never_says_what_came_of_it() -> None:
    """Killed, say: another tries after a while."""
    clock = Clock()
    breaker = Breaker(clock)
    breaker.failed()
    clock.now += FIRST
    assert breaker.pause() == 0
    clock.now += LONGEST
    assert breaker.pause() == 0


def test_pauses_grow_up_to_a_bound() -> None:
    clock = Clock()
    breaker = Breaker(clock)
    for failures in range(2000):
        breaker.failed()
        longest = min(LONGEST, FIRST * 2 ** min(failures, 10))
        assert longest / 2 <= breaker.pause() <= longest
        clock.now += LONGEST
        assert breaker.pause() == 0


def test_what_was_found_out_last() -> None:
    clock = Clock()
    breaker = Breaker(clock)
    assert (breaker.is_broken, breaker.seen_ago()) == (False, None)
    breaker.failed()
    clock.now += 7
    assert (breaker.is_broken, breaker.seen_ago()) == (True, 7)
    breaker.succeeded()
    assert (breaker.is_broken, breaker.seen_ago()) == (False, 0)
