"""When a log of the journal may be reset: whatever the clocks say, and whoever saves meanwhile."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest

from deferred_sessions.journal_keeper import JournalKeeper
from tests.unit import records
from tests.unit.hosts import Host
from tests.unit.records import key, save

YEARS = 1e8  # seconds, from when on all that is dirty is due
AGE = 10_000.0


@pytest.fixture
def now() -> float:
    return time.time() + AGE  # the journal was made just now


def keeper_of(host: Host, *, flushed: Callable[[float], object] | None = None) -> JournalKeeper:
    def flush(now: float) -> None:
        host.store.clean_many(host.store.due(now + 2 * YEARS, limit=100), now)
        if flushed is not None:
            flushed(now)

    return JournalKeeper(store=host.store, flush=flush, age=AGE)


@pytest.mark.parametrize("ahead", [-3600.0, 0.0, 0.5, 3600.0])
def test_d04_a_save_just_before_the_swap(host: Host, now: float, ahead: float) -> None:
    """By a process that looked at the clock after the keeper did, or before it was set back."""
    keeper = keeper_of(host)
    records.put(host.store, key(1), at=now + ahead)
    keeper.keep_once(now)
    assert host.journal.generation() == 2
    keeper.keep_once(now + 1)
    assert host.journal.retired()
    host.lose_power()
    assert set(host.records()) == {key(1)}


def test_d04_a_save_while_what_stands_in_the_way_is_flushed(host: Host, now: float) -> None:
    """It is in the log that the swap retires, though it was made after the keeper began."""
    keeper = keeper_of(host, flushed=lambda now: records.put(host.store, key(2), at=now + 0.001))
    for number, at in ((1, now), (3, now + AGE)):
        records.put(host.store, key(number), at=at)
        keeper.keep_once(at)
    assert host.journal.generation() == 3
    keeper.keep_once(now + AGE + 1)
    host.lose_power()
    assert key(2) in host.records()


@pytest.mark.parametrize("behind", [0.001, 3600.0])
def test_d05_a_save_after_the_swap_holds_nothing_up(host: Host, now: float, behind: float) -> None:
    """The log that was retired has nothing of it, though the clock may have been set back."""
    keeper = keeper_of(host)
    records.put(host.store, key(1), at=now)
    keeper.keep_once(now)
    host.store.clean_many(host.store.due(now + YEARS, limit=100), now)
    records.put(host.store, key(2), at=now - behind)
    keeper.keep_once(now - behind)
    assert host.journal.generation() == 2
    assert host.journal.retired() == 0
    host.lose_power()
    assert key(2) in host.records()


def test_a_session_saved_again_after_the_swap(host: Host, now: float) -> None:
    """Both logs have it; the older one waits for PostgreSQL all the same."""
    keeper = keeper_of(host)
    records.put(host.store, key(1), at=now)
    keeper.keep_once(now)
    save(host.store, key(1), b"later", at=now + 1)
    keeper.keep_once(now + 1)
    assert host.journal.retired()
    host.lose_power()
    assert host.records()[key(1)].payload == b"later"


def test_what_only_lacks_an_expiry_keeps_its_log(host: Host, now: float) -> None:
    """A session that was extended must not expire because the host lost power."""
    keeper = keeper_of(host)
    before = records.put(host.store, key(1), at=now - 2000, clean=True)
    after = save(host.store, key(1), before.payload, at=now)
    assert after.expires_at > before.expires_at
    assert not after.is_changed
    keeper.keep_once(now)
    keeper.keep_once(now + 1)
    host.lose_power()
    assert host.records()[key(1)].expires_at == after.expires_at


def test_what_was_recovered_keeps_its_log(host: Host, now: float) -> None:
    """Power is lost, what was recovered is still on its way to PostgreSQL, and power is lost."""
    records.put(host.store, key(1), at=now)
    host.lose_power()
    keeper = keeper_of(host)
    keeper.keep_once(now)
    keeper.keep_once(now + 1)
    assert host.journal.retired()
    host.lose_power()
    assert set(host.records()) == {key(1)}


def test_a_clock_that_was_set_back_by_long(host: Host, now: float) -> None:
    """Logs go on being swapped."""
    keeper = keeper_of(host)
    records.put(host.store, key(1), at=now)
    keeper.keep_once(now)
    records.put(host.store, key(2), at=now - YEARS)
    keeper.keep_once(now - YEARS)
    assert host.journal.generation() == 3


def test_logs_are_left_alone_while_somebody_reads_them(host: Host, now: float) -> None:
    """What is mapped must not be cut off: `recoversessions --check` on a site that runs."""
    keeper = keeper_of(host)
    records.put(host.store, key(1), at=now)
    with keeper.at_rest():
        keeper_of(host).keep_once(now)
        assert host.journal.generation() == 1
    keeper.keep_once(now)
    assert host.journal.generation() == 2
