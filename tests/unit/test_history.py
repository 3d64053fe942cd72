"""The rings of samples, and the rates between samples."""

from __future__ import annotations

from pathlib import Path

import pytest

from deferred_sessions.memory.counters import Counter
from deferred_sessions.memory.history import DAY, FILE, HOUR, STEP, Gauge, History, Sample
from deferred_sessions.rates import grown, per_second, point, series

START = 1_000_000_000.0


@pytest.fixture
def history(tmp_path: Path) -> History:
    return History(tmp_path / "store")


def sample(at: float, requests: int = 0, dirty: float = 0.0, **counts: int) -> Sample:
    counters = dict.fromkeys(Counter, 0) | {Counter.REQUESTS: requests}
    counters |= {Counter[name]: count for name, count in counts.items()}
    return Sample(at, counters, dict.fromkeys(Gauge, 0.0) | {Gauge.DIRTY: dirty})


def test_what_was_recorded_comes_back_in_order(history: History) -> None:
    assert history.read(0.0, START) == []
    known = [sample(START + n * STEP, requests=n, dirty=n / 2) for n in range(5)]
    for each in reversed(known):
        history.record(each)
    assert history.read(START, START + 60) == known
    assert history.read(START + 15, START + 30) == known[2:4]


def test_the_file_never_grows_and_keeps_the_latest(history: History, tmp_path: Path) -> None:
    for n in range(2 * HOUR.places):
        history.record(sample(START + n * HOUR.step, requests=n))
    size = (tmp_path / "store" / FILE).stat().st_size
    end = START + 2 * HOUR.span - HOUR.step
    kept = history.read(end - HOUR.span, end)
    assert [each.counters[Counter.REQUESTS] for each in kept] == list(
        range(HOUR.places, 2 * HOUR.places)
    )
    for n in range(1000):
        history.record(sample(end + n * DAY.step))
    assert (tmp_path / "store" / FILE).stat().st_size <= max(size, 400_000)


def test_beyond_an_hour_there_is_one_for_every_five_minutes(history: History) -> None:
    for n in range(int(7200 / STEP)):
        history.record(sample(START + n * STEP, requests=n))
    found = history.read(START, START + 7200)
    assert 24 <= len(found) <= 25
    assert found[-1].counters[Counter.REQUESTS] == 719  # the last of its five minutes


def test_another_process_finds_them(history: History, tmp_path: Path) -> None:
    history.record(sample(START, requests=7))
    assert History(tmp_path / "store").read(START, START) == [sample(START, requests=7)]


def test_a_torn_sample_is_passed_over(history: History, tmp_path: Path) -> None:
    history.record(sample(START))
    history.record(sample(START + STEP, requests=1))
    path = tmp_path / "store" / FILE
    data = bytearray(path.read_bytes())
    data[HOUR.place(START) + 20] ^= 1
    path.write_bytes(data)
    assert history.read(START, START + 60) == [sample(START + STEP, requests=1)]
    path.write_bytes(data[: HOUR.place(START + STEP) + 50])
    assert history.read(START, START + 60) == []


def test_rates() -> None:
    before, after = sample(START, requests=100), sample(START + 20, requests=160, dirty=3)
    assert per_second(before, after)[Counter.REQUESTS] == 3.0
    shown = point(before, after)
    assert (shown["at"], shown["requests"], shown["dirty"]) == (START + 20, 180.0, 3.0)
    assert shown["hit_rate"] is shown["batch"] is shown["lock_wait"] is None


def test_shares_and_means() -> None:
    after = sample(
        START + 60,
        LOADS=90,
        MISSES=10,
        UPDATES=50,
        CREATIONS=10,
        STATEMENTS=12,
        ROWS_WRITTEN=48,
        LOCK_WAITS=4,
        LOCK_WAIT_MILLISECONDS=2000,
    )
    shown = point(sample(START), after)
    assert shown["hit_rate"] == 0.9
    assert (shown["batch"], shown["avoided"], shown["lock_wait"]) == (4.0, 48.0, 0.5)


def test_counters_that_were_set_back_stand_still() -> None:
    assert grown(sample(START, requests=9), sample(START + 1))[Counter.REQUESTS] == 0


def test_a_series_has_a_gap_where_samples_are_missing() -> None:
    assert series([]) == {"at": []}
    times = [0, 10, 20, 30, 1000, 1010]
    columns = series([sample(START + at, requests=at) for at in times])
    assert columns["at"] == [START + at for at in (10, 20, 30, 515, 1000, 1010)]
    assert columns["requests"][3] is None
    assert [n and round(n) for n in columns["requests"]] == [60, 60, 60, None, 60, 60]
