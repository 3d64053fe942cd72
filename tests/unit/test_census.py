"""What a scan of the sessions counts."""

from __future__ import annotations

from deferred_sessions import lifecycle
from deferred_sessions.census import bins, take_census
from deferred_sessions.memory.store import HostStore
from tests.unit.records import LIFE, NOW, POLICY, key, put


def test_d03_sessions_are_scanned_for_statistics(store: HostStore) -> None:
    """D03: live, expired and deleted ones, whose, how large, how old, how many unsaved."""
    put(store, key(1), at=NOW - 30, payload=b"x" * 100)
    put(store, key(2), at=NOW - 7200, payload=b"x" * 2000, clean=True)
    put(store, key(3), at=NOW - 2 * LIFE)
    put(store, key(4), clean=True)
    store.update(key(2), lambda r: r and r._replace(user_id="7"))
    store.bury(key(4), lambda r: lifecycle.deleted(r, key(4), now=NOW - 5, policy=POLICY))

    census = take_census(store.scan(), NOW)

    assert (census.sessions, census.expired, census.tombstones) == (2, 1, 1)
    assert census.dirty == 3
    assert census.oldest_change == 2 * LIFE
    assert (census.payload, census.largest) == (2100, 2000)
    assert (census.logged_in, census.busiest()) == (1, [("7", 1)])
    assert dict(census.sizes) == {"< 0.25 KiB": 1, "< 4 KiB": 1}
    assert dict(census.ages) == {"< 1 min": 1, "< 1 d": 1}


def test_bins_have_names_in_order() -> None:
    sizes, ages = bins()
    assert sizes == [
        *("< 0.25 KiB", "< 1 KiB", "< 4 KiB", "< 16 KiB", "< 64 KiB", "< 1 MiB", ">= 1 MiB"),
    ]
    assert ages == ["< 1 min", "< 10 min", "< 1 h", "< 1 d", "< 7 d", ">= 7 d"]


def test_an_empty_store(store: HostStore) -> None:
    census = take_census(store.scan(), NOW)
    assert (census.sessions, census.oldest_change, census.busiest()) == (0, None, [])


def test_d10_the_store_knows_its_space(store: HostStore) -> None:
    """D10: what is allocated, used, free, and free because it was given back."""
    empty = store.status()
    assert empty.size == 8 << 20
    for number in range(200):
        put(store, key(number), payload=b"x" * 3000, clean=True)
    full = store.status()
    assert full.used - empty.used > 200 * 3000
    assert full.used + full.reusable <= full.size
    while store.evict(50):
        pass
    after = store.status()
    assert after.used < full.used / 4
    assert after.reusable > full.used / 2
