"""When a record is due: thresholds one by one, and together."""

from __future__ import annotations

import time

import pytest
from freezegun import freeze_time
from hypothesis import given
from hypothesis import strategies as st

from deferred_sessions import lifecycle
from deferred_sessions.policy import NEVER, Policy
from deferred_sessions.record import SessionRecord

DAY = 86_400.0
FORTNIGHT = 14 * DAY


def stored(*, at: float, lifetime: float = FORTNIGHT) -> SessionRecord:
    """A session that PostgreSQL has had since `at`."""
    return lifecycle.loaded(
        "k" * 32,
        b"{}",
        "",
        version=1,
        fence=0,
        created_at=at,
        expires_at=at + lifetime,
        written_at=at,
        now=at,
    )


def save(record: SessionRecord, policy: Policy, payload: bytes) -> SessionRecord:
    now = time.time()
    return lifecycle.saved(record, payload, "", now + FORTNIGHT, now, policy)


@freeze_time("2026-01-01 12:00:00")
def test_a02_due_one_interval_after_the_last_write() -> None:
    """A02: the time counts from the last write, not from the change."""
    record = stored(at=time.time() - 45)

    changed = save(record, Policy(60.0), b"1")

    assert changed.due_at == time.time() + 15


@freeze_time("2026-01-01 12:00:00")
def test_a02_due_at_once_if_the_last_write_is_long_ago() -> None:
    """A02: a session that was idle for longer than the interval is due with its first change."""
    record = stored(at=time.time() - 3600)

    assert save(record, Policy(60.0), b"1").due_at <= time.time()


def test_a02_constant_use_does_not_put_the_write_off() -> None:
    """Trap 3: a session changed every second is due when an idle one is."""
    with freeze_time("2026-01-01 12:00:00") as clock:
        start = time.time()
        record = stored(at=start)
        for second in range(59):
            clock.tick(1)
            record = save(record, Policy(60.0), b"%d" % second)

    assert record.due_at == start + 60


def test_a07_due_with_the_nth_update_and_not_before() -> None:
    """A07: N updates make it due at once, N - 1 do not."""
    policy = Policy(300.0, after_updates=3)
    with freeze_time("2026-01-01 12:00:00") as clock:
        start = time.time()
        record = stored(at=start)
        clock.tick(1)
        record = save(save(record, policy, b"1"), policy, b"2")
        assert record.due_at == start + 300

        record = save(record, policy, b"3")
        assert record.due_at == time.time()


def test_a07_further_updates_do_not_put_it_off() -> None:
    """A07: a session that is due stays due, however often it changes."""
    policy = Policy(300.0, after_updates=2)
    with freeze_time("2026-01-01 12:00:00") as clock:
        record = save(save(stored(at=time.time()), policy, b"1"), policy, b"2")
        due_at = record.due_at
        for count in range(5):
            clock.tick(10)
            record = save(record, policy, b"more %d" % count)

    assert record.due_at == due_at


def test_a08_due_with_the_nth_request_and_not_before() -> None:
    """A08: N requests make a changed session due, N - 1 do not."""
    policy = Policy(300.0, after_requests=3)
    with freeze_time("2026-01-01 12:00:00"):
        now = time.time()
        record = save(stored(at=now), policy, b"1")
        for _ in range(2):
            record = lifecycle.served(record, now=now, policy=policy)
        assert record.due_at == now + 300

        assert lifecycle.served(record, now=now, policy=policy).due_at == now


def test_a08_requests_before_the_change_count_too() -> None:
    """A08: requests are counted since the last write, whether they changed anything or not."""
    policy = Policy(300.0, after_requests=3)
    now = 1_000_000.0
    record = stored(at=now)
    for _ in range(3):
        record = lifecycle.served(record, now=now, policy=policy)
    assert not record.is_dirty

    assert lifecycle.saved(record, b"1", "", now + FORTNIGHT, now, policy).due_at == now


def test_a_clean_session_is_never_due() -> None:
    policy = Policy(60.0, after_requests=2)
    record = stored(at=1.0)
    for _ in range(5):
        record = lifecycle.served(record, now=100.0, policy=policy)

    assert record.due_at == 0.0


@freeze_time("2026-01-01 12:00:00")
def test_a_touch_waits_until_the_stored_expiry_comes_near() -> None:
    """A touch alone is due when a tenth of the lifetime is left in PostgreSQL."""
    now = time.time()
    record = stored(at=now - DAY)

    touched = save(record, Policy(60.0), b"{}")

    assert touched.is_dirty
    assert not touched.is_changed
    assert touched.due_at == pytest.approx(now - DAY + FORTNIGHT - 0.1 * FORTNIGHT)


def test_a_touch_of_a_short_session_leaves_two_intervals() -> None:
    """Trap 5: there is always time for the poller before the stored expiry bites."""
    policy = Policy(60.0)
    record = stored(at=0.0 + 1000, lifetime=600.0)

    touched = lifecycle.saved(record, b"{}", "", 1100.0 + 600, 1100.0, policy)

    assert touched.due_at == record.stored_expires_at - 120


def test_a_change_is_due_before_the_stored_expiry_bites() -> None:
    """Trap 5: the expiry part of a changed record is due early enough as well."""
    policy = Policy(3600.0)
    record = stored(at=1000.0, lifetime=7200.0)

    changed = lifecycle.saved(record, b"1", "", 8000.0 + 7200, 8000.0, policy)

    assert changed.due_at == record.stored_expires_at - 7200


@pytest.mark.parametrize(
    ("lifetime", "left", "expected"),
    [
        (FORTNIGHT, 59.0, True),  # the poller should have come long ago
        (FORTNIGHT, 61.0, False),
        (30.0, 14.0, True),  # lives shorter than the interval: half of it is left
        (30.0, 16.0, False),
    ],
)
def test_what_cannot_wait_for_the_poller(lifetime: float, left: float, expected: bool) -> None:
    assert Policy(60.0).cannot_wait(0.0, lifetime, left) is expected


def test_what_was_never_stored_can_wait() -> None:
    """While PostgreSQL is away, a new session does not try it with each save."""
    assert not Policy(60.0).cannot_wait(1000.0, 2000.0, 0.0)


@given(
    known=st.one_of(st.just(NEVER), st.floats(min_value=0, max_value=1e6)),
    now=st.floats(min_value=1, max_value=1e6),
    written_at=st.floats(min_value=0, max_value=1e6),
    updates=st.integers(min_value=0, max_value=100),
    stored_expires_at=st.floats(min_value=0, max_value=1e6),
    lifetime=st.floats(min_value=0, max_value=1e6),
)
def test_thresholds_only_bring_forward(
    known: float,
    now: float,
    written_at: float,
    updates: int,
    stored_expires_at: float,
    lifetime: float,
) -> None:
    """Whatever comes, a record that was due is never due later, and the interval holds."""
    due_at = Policy(60.0, after_updates=50).due_at(
        now,
        known=known,
        changed=True,
        written_at=written_at,
        updates=updates,
        requests=0,
        expires_at=now + lifetime,
        stored_expires_at=stored_expires_at,
    )

    assert due_at <= known
    assert due_at <= written_at + 60.0


def test_frozen_time_moves() -> None:
    """The tests above mean something: freezegun reaches `time.time`."""
    with freeze_time("2026-01-01") as clock:
        before = time.time()
        clock.tick(5)
        assert time.time() == before + 5


@given(
    st.floats(1.0, 300.0),
    st.floats(2.0, 1000.0),
    st.lists(st.tuples(st.floats(0.0, 0.99), st.booleans()), max_size=200),
)
def test_a_touch_is_written_before_the_stored_expiry_bites(
    interval: float, intervals: float, steps: list[tuple[float, bool]]
) -> None:
    """A row never expires before its session: nobody who cleans up may take it for dead.

    Whatever the visits, if sessions live for two intervals (E004) and the poller comes in each.
    """
    policy, now, lifetime = Policy(interval), FORTNIGHT, intervals * interval
    record = stored(at=now, lifetime=lifetime)
    for pause, is_used in steps:
        now += pause * interval
        if record.expires_at <= now:
            return
        assert record.stored_expires_at > now
        if record.is_dirty and record.due_at <= now:
            record = written(record, now, policy)
        if is_used:
            record = lifecycle.touched(record, expires_at=now + lifetime, now=now, policy=policy)
            if policy.cannot_wait(now, record.expires_at, record.stored_expires_at):
                record = written(record, now, policy)


def written(record: SessionRecord, now: float, policy: Policy) -> SessionRecord:
    return lifecycle.written(
        record, version=record.version, expires_at=record.expires_at, now=now, policy=policy
    )
