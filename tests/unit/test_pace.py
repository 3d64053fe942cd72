"""When a poller pauses, and for how long."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from deferred_sessions.memory.counters import Counter, Counters
from deferred_sessions.pace import AS_LONG, LONGEST, PART, SHORT, Look, Pace, look

BATCH = 10 * PART
SECONDS = 0.12 / AS_LONG  # of a batch after which it pauses for 0.12 s


class Run(NamedTuple):
    pauses: list[float]
    sizes: list[int]
    """What its batches were to have, and one more."""


def run(*looks: Look, patience: float = 15.0, may_pause: bool = True) -> Run:
    """Make a run; of `looks`, two for each of its batches follow the first."""
    found, done = iter(looks), Run([], [])
    pace = Pace(
        lambda: next(found),
        patience=patience,
        batch_size=BATCH,
        may_pause=lambda: may_pause,
        sleep=done.pauses.append,
    )

    def batches() -> Iterator[int]:
        for number in range(len(looks) // 2):
            done.sizes.append(pace.batch_size())
            yield number
        done.sizes.append(pace.batch_size())

    assert list(pace.between(batches())) == [*range(len(looks) // 2)]
    assert next(found, None) is None
    return done


def paused(*looks: Look, patience: float = 15.0, may_pause: bool = True) -> list[float]:
    return run(*looks, patience=patience, may_pause=may_pause).pauses


def batch(seconds: float, *, waited: float, served: int = 1, ran: float = 0.01) -> list[Look]:
    """Return a first look, and those after one batch."""
    before = Look(100.0, 5.0, 7.0, 50)
    after = Look(100.0 + seconds, 5.0 + ran, 7.0 + waited, 50 + served)
    return [before, after, after]


def test_it_pauses_several_times_as_long_as_the_batch_took() -> None:
    assert paused(*batch(SECONDS, waited=0.01)) == [pytest.approx(0.12)]


def test_not_where_processors_are_free() -> None:
    assert paused(*batch(0.03, waited=0.0)) == []
    assert paused(*batch(0.03, ran=1.0 - SHORT, waited=0.9 * SHORT)) == []
    assert paused(*batch(0.03, ran=1.0 - SHORT, waited=1.1 * SHORT)) != []


def test_not_where_no_requests_are_served() -> None:
    """Somebody else needs the processors: to wait for them would help nobody here."""
    assert paused(*batch(0.03, waited=0.01, served=0)) == []


def test_not_where_somebody_waits_for_its_end() -> None:
    assert paused(*batch(0.03, waited=0.01), may_pause=False) == []


def test_a_pause_has_a_bound() -> None:
    assert paused(*batch(3.0, waited=1.0)) == [LONGEST]


def test_so_have_all_pauses_of_a_run() -> None:
    first = batch(SECONDS, waited=1.0)
    second = [look._replace(at=look.at + 1, waited=9.0, served=99) for look in first[1:]]
    assert paused(*first, *second, patience=0.15) == [pytest.approx(0.12), pytest.approx(0.03)]
    assert paused(*first, *second, patience=0.12) == [pytest.approx(0.12)]


def test_each_pause_is_of_what_came_since_the_last() -> None:
    """What the thread waited for before it paused is over."""
    first = batch(SECONDS, waited=1.0)
    assert paused(*first, first[1]._replace(at=101.0, served=99), first[1]) == [pytest.approx(0.12)]


def test_it_does_little_at_a_time_until_there_are_processors() -> None:
    """The first batch is a whole one: nobody knows yet."""
    short, free = batch(0.03, waited=0.01), batch(0.03, waited=0.0)
    assert run(*short, *free[1:]).sizes == [BATCH, BATCH // PART, BATCH]
    assert run(*free).sizes == [BATCH, BATCH]


def test_it_does_much_at_a_time_when_it_may_not_pause() -> None:
    """To the end as fast as can be; so it does when its patience is at an end."""
    short = batch(SECONDS, waited=0.01)
    assert run(*short, may_pause=False).sizes == [BATCH, BATCH]
    later = [look._replace(at=look.at + 1, waited=9.0, served=99) for look in short[1:]]
    assert run(*short, *later, patience=0.12).sizes == [BATCH, BATCH // PART, BATCH]


@pytest.fixture
def counters(tmp_path: Path) -> Iterator[Counters]:
    found = Counters(tmp_path)
    yield found
    found.close()


def test_how_things_stand(counters: Counters) -> None:
    before = look(counters)
    counters.add(Counter.LOADS, 3)
    while look(counters).ran == before.ran:
        pass
    after = look(counters)
    assert after.at > before.at
    assert after.ran > before.ran
    assert 0.5 < after.ran / time.thread_time() < 2.0
    assert (before.served, after.served) == (0, 3)


def test_where_nobody_tells(counters: Counters, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deferred_sessions.pace.STATISTICS", Path("/nosuchfile"))
    assert look(counters)[1:] == (0.0, 0.0, 0)
