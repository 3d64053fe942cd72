"""The pulse of a node: what is doubted, whatever the clock of the host is set to."""

from __future__ import annotations

import math
import random
from pathlib import Path

import pytest

from deferred_sessions.memory import pulse as module
from deferred_sessions.memory.pulse import AHEAD, BEAT, SUSPECT, Pulse, moment

HOUR = 3600.0


class Clocks:
    """The clock of the host, which may be set, and the time since it was started."""

    def __init__(self) -> None:
        self.moment, self.ahead = 5000.0, 1.8e9

    @property
    def now(self) -> float:
        return self.moment + self.ahead

    def go_on(self, seconds: float = 0.01) -> None:
        self.moment += seconds


@pytest.fixture
def clocks(monkeypatch: pytest.MonkeyPatch) -> Clocks:
    clocks = Clocks()
    monkeypatch.setattr(module, "moment", lambda: clocks.moment)
    return clocks


@pytest.fixture
def pulse(tmp_path: Path) -> Pulse:
    return Pulse(tmp_path, patience=3.0)


def test_a_session_enters_now(pulse: Pulse, clocks: Clocks) -> None:
    """So that a record that is created, used and entered at once stays small."""
    assert pulse.entry(clocks.now) == clocks.now
    pulse.suspect(clocks.now)
    clocks.go_on()
    assert pulse.entry(clocks.now) == clocks.now


def test_the_clock_is_set_back_before_the_suspicion(pulse: Pulse, clocks: Clocks) -> None:
    before = pulse.entry(clocks.now)
    clocks.ahead -= HOUR
    clocks.go_on()
    pulse.suspect(clocks.now)
    assert pulse.is_suspect(before)
    clocks.go_on()
    assert not pulse.is_suspect(pulse.entry(clocks.now))


def test_the_clock_is_set_back_after_it(pulse: Pulse, clocks: Clocks) -> None:
    """What enters then is not doubted for an hour."""
    pulse.entry(clocks.now)
    pulse.suspect(clocks.now)
    clocks.ahead -= HOUR
    clocks.go_on()
    first = pulse.entry(clocks.now)
    clocks.go_on()
    assert not pulse.is_suspect(first)
    assert pulse.entry(clocks.now) > first


def test_whatever_the_clock_is_set_to(pulse: Pulse, clocks: Clocks) -> None:
    """All that entered before a suspicion is doubted, nothing that enters after."""
    chance = random.Random(7)
    before: list[float] = []
    for _ in range(3000):
        clocks.go_on(chance.choice([0.0001, 1.0, 100.0]))
        if chance.random() < 0.1:
            clocks.ahead += chance.choice([-1e6, -HOUR, -1.0, -0.001, 0.001, 1.0, HOUR])
        if chance.random() < 0.05:
            pulse.suspect(clocks.now)
            assert all(map(pulse.is_suspect, before))
            before.clear()
        else:
            before.append(pulse.entry(clocks.now))
            assert not pulse.is_suspect(before[-1])


def test_an_earlier_release_took_no_note_of_the_clock(pulse: Pulse, clocks: Clocks) -> None:
    pulse.suspect(clocks.now)
    assert pulse.is_suspect(clocks.now)


def test_a_suspicion_of_an_earlier_boot(pulse: Pulse, clocks: Clocks) -> None:
    """The directory may outlive it, the sessions in it do not."""
    pulse.entry(clocks.now)
    pulse.suspect(clocks.now)
    clocks.moment, clocks.ahead = 20.0, clocks.ahead - HOUR
    first = pulse.entry(clocks.now)
    clocks.go_on()
    assert not pulse.is_suspect(first)
    assert pulse.entry(clocks.now) > first


def test_all_is_doubted_for_a_moment(pulse: Pulse, clocks: Clocks) -> None:
    pulse.suspect_all()
    assert pulse.suspects_all
    entered = pulse.entry(clocks.now)
    assert entered == clocks.now
    assert pulse.is_suspect(entered)
    assert pulse.doubts(entered, clocks.moment)
    pulse.suspect(clocks.now)
    assert not pulse.suspects_all
    clocks.go_on()
    assert not pulse.is_suspect(pulse.entry(clocks.now))


def test_a_heartbeat_is_owed(pulse: Pulse) -> None:
    """A node that never beat is not late, unless it has to beat."""
    assert not pulse.is_late(moment())
    assert not pulse.doubts(1.0, moment())
    pulse.expect()
    assert pulse.is_late(moment())
    assert pulse.doubts(math.inf, moment())
    pulse.beat(moment())
    pulse.expect()
    assert not pulse.is_late(moment())


def test_all_processes_see_it(pulse: Pulse, tmp_path: Path, clocks: Clocks) -> None:
    pulse.beat(7.0)
    pulse.suspect(clocks.now)
    other = Pulse(tmp_path, patience=3.0)
    words = other._open()
    assert (words[BEAT], words[SUSPECT]) == (7.0, clocks.now)
    other.watch_clock(clocks.now + HOUR)
    assert pulse._open()[AHEAD] == clocks.ahead + HOUR
