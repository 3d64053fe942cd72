"""A host store that is full, or nearly: what makes room, and what must stay."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from functools import partial

import pytest

from deferred_sessions import lifecycle
from deferred_sessions.exceptions import StoreFullError
from deferred_sessions.memory import indexes
from deferred_sessions.memory.store import HostStore
from tests.unit.records import NOW, POLICY, bury, due_keys, key, put, save


def fill(store: HostStore, *, clean: bool, payload: bytes = b"x" * 900) -> int:
    """Put sessions into `store` until it has passed its high water mark, then some."""
    number = 0
    while store.status().used < 0.8 * store.status().size:
        put(store, key(number), at=NOW + number, clean=clean, payload=payload)
        number += 1
    return number


def test_a_full_store_evicts_the_clean_session_not_used_for_longest(store: HostStore) -> None:
    """A full store makes room: clean ones go, oldest use first; dirty ones stay."""
    dirty = put(store, "dirtyone", at=NOW - 1000)
    count = fill(store, clean=True)
    evicted: list[int] = []
    store.on_evicted = evicted.append

    for number in range(count, count * 3):
        put(store, key(number), at=NOW + number, clean=True, payload=b"x" * 900)

    left = [n for n in range(count * 3) if store.get(key(n)) is not None]
    assert left == list(range(left[0], count * 3))
    assert left[0] > 0
    assert sum(evicted) == left[0]
    assert store.get("dirtyone") == dirty
    assert store.status().used < 0.95 * store.status().size


def test_use_saves_from_eviction(store: HostStore) -> None:
    for number in range(10):
        put(store, key(number), at=NOW + number, clean=True)
    store.update(key(0), lambda record: record and lifecycle.used(record, now=NOW + 1000))

    assert store.evict(3) == 3

    assert store.get(key(0)) is not None
    assert [store.get(key(n)) for n in (1, 2, 3)] == [None, None, None]
    assert store.get(key(4)) is not None


def test_the_oldest_use_goes_first_whatever_the_keys(store: HostStore) -> None:
    """To the minute; many sessions of one minute are no trouble."""
    for number in range(900):
        put(store, key(900 - number), at=NOW + number // 300 * indexes.GRAIN, clean=True)

    for minute in range(3):
        assert store.evict(300) == 300
        left = sorted(record.key for record in store.scan())
        assert left == [key(1 + number) for number in range(600 - minute * 300)]


def test_sessions_whose_keys_start_alike_have_their_own_places(store: HostStore) -> None:
    """Keys of a project's own making; one that goes does not take the other's place along."""
    keys = ["shop-eu-" + end for end in ("", "0", "0000", "0000a", "0000b", "0001")]
    for number, name in enumerate(keys):
        put(store, name, at=NOW + number * indexes.GRAIN, clean=True)
        put(store, name + "-twin"[: 40 - len(name)], at=NOW + number * indexes.GRAIN, clean=True)
    store.update(keys[3], lambda record: record and lifecycle.used(record, now=NOW + 9999))

    for left in range(11, 0, -1):
        assert store.evict(1) == 1
        assert store.status().records == left
    assert store.get(keys[3]) is not None
    assert store.evict(1) == 1
    assert entries_of_use(store) == set()


@pytest.mark.parametrize("seed", range(5))
def test_every_record_can_be_found_by_its_use(store: HostStore, seed: int) -> None:
    """Whatever happens in whatever order; a record without a place would never leave."""
    chance = random.Random(seed)
    keys = [start + end for start in ("alike-alike-", "shorter0") for end in ("", "1", "2", "23")]
    for step in range(300):
        name, now = chance.choice(keys), NOW + step * 10
        match chance.randrange(5):
            case 0:
                put(store, name, at=now, clean=True)
            case 1:
                store.update(name, lambda r, now=now: r and lifecycle.used(r, now=now + 600))
            case 2:
                store.update(name, lambda _: None)
            case 3 if store.get(name) is not None:
                store.update(name, partial(bury, at=now))
            case _:
                store.evict(chance.randrange(2))
        places = entries_of_use(store)
        for record in store.scan():
            start = indexes.start_of(record.key.encode())
            assert (indexes.minute_of(record), start) in places

    store.evict(100)
    assert store.status().records == 0
    assert entries_of_use(store) == set()


def entries_of_use(store: HostStore) -> set[tuple[bytes, bytes]]:
    """Return the entries of the index by last use."""
    dbs = store._file.open()
    with dbs.env.begin() as txn:
        return {(bytes(when), bytes(start)) for when, start in txn.cursor(dbs.used)}


def test_a_store_full_of_changes_refuses_and_loses_nothing(store: HostStore) -> None:
    """What PostgreSQL does not have is never evicted; a save that finds no room says so."""
    with pytest.raises(StoreFullError, match="STORE_SIZE"):
        for number in range(100_000):
            put(store, key(number), at=NOW + number, payload=b"x" * 900)

    assert store.evict(100) == 0
    assert store.status().records == number
    assert all(store.get(key(n)) is not None for n in range(number))
    assert store.get(key(number)) is None


def test_a_full_store_works_again_after_cleaning(store: HostStore) -> None:
    with pytest.raises(StoreFullError):
        for number in range(100_000):
            put(store, key(number), at=NOW + number, payload=b"x" * 900)

    while batch := store.due(float("inf"), limit=1000):
        assert store.clean_many(batch, NOW) == []

    put(store, "newcomer", payload=b"x" * 900)
    assert store.get("newcomer") is not None


@pytest.mark.parametrize("size", [1, 900, 3000, 100_000])
def test_a_full_store_can_be_cleaned_and_emptied(store: HostStore, size: int) -> None:
    """To remove takes pages too: they are kept in reserve, whatever the sessions' size."""
    with pytest.raises(StoreFullError):
        for number in range(1_000_000):
            put(store, key(number), at=NOW + number, payload=b"x" * size)

    save(store, key(0), b"y" * size, at=NOW + 1)  # no larger than before
    with pytest.raises(StoreFullError):
        save(store, key(0), b"y" * (size + 1), at=NOW + 2)
    store.update(key(1), lambda _: None)
    store.update_many({key(2): lambda r: r and lifecycle.due_again(r, due_at=NOW)})
    assert store.clean_many(store.due(float("inf"), limit=10**6), NOW) == []

    assert store.status().dirty == 0


def test_a_full_store_serves_on(store: HostStore) -> None:
    with pytest.raises(StoreFullError):
        for number in range(100_000):
            put(store, key(number), at=NOW + number, payload=b"x" * 900)

    for second in range(300):
        assert save(store, key(second % 10), b"%900d" % second, at=NOW + second) is not None


def test_confirmed_tombstones_are_swept(store: HostStore) -> None:
    """A deletion that PostgreSQL has is remembered for as long as a late save may take."""
    put(store, key(1), clean=True)
    store.update(key(1), partial(bury, at=NOW))
    assert store.sweep(NOW + lifecycle.TOMBSTONE_LIFETIME - 1) == 0

    assert store.sweep(NOW + lifecycle.TOMBSTONE_LIFETIME + indexes.GRAIN) == 1

    assert store.get(key(1)) is None
    assert store.status().records == 0


def test_however_many_tombstones_there_are_all_are_swept(store: HostStore) -> None:
    for number in range(600):
        put(store, key(number), clean=True)
        store.update(key(number), partial(bury, at=NOW))

    assert store.sweep(NOW + lifecycle.TOMBSTONE_LIFETIME + indexes.GRAIN) == 600


def test_confirmed_tombstones_are_evicted_before_sessions(store: HostStore) -> None:
    put(store, key(1), clean=True)
    put(store, key(2), clean=True, at=NOW + 5)
    put(store, key(3), clean=True, at=NOW + 5)
    store.update(key(2), partial(bury, at=NOW + 9))
    store.update(key(3), lambda r: lifecycle.deleted(r, key(3), now=NOW + 9, policy=POLICY))

    assert store.evict(1) == 1
    assert store.get(key(2)) is None
    assert store.evict(5) == 1
    assert store.get(key(1)) is None
    assert store.get(key(3)) is not None


def test_an_unwritten_tombstone_is_not_swept(store: HostStore) -> None:
    """Trap 4: as long as PostgreSQL has the row, the deletion is remembered."""
    put(store, key(1), clean=True)
    store.update(key(1), lambda r: lifecycle.deleted(r, key(1), now=NOW, policy=POLICY))

    assert store.sweep(NOW + 1e6) == 0
    assert due_keys(store, NOW + 60) == [key(1)]


def test_scan_pages_through_all(store: HostStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deferred_sessions.memory.store.BATCH", 2)
    for number in range(5):
        put(store, key(number))

    assert [record.key for record in store.scan()] == [key(number) for number in range(5)]


def test_a_slow_reader_makes_writers_wait(
    store: HostStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It pins the pages that were replaced since; they wait a moment before giving up."""
    store.open()
    assert store._file.databases is not None
    reader = store._file.databases.env.begin()

    with pytest.raises(StoreFullError, match="is one of this host's processes stopped"):
        for _ in range(store.status().size // 4096):
            store.set_note("x", b"1")

    monkeypatch.setattr("deferred_sessions.memory.transactions.PAUSES", _pauses_until(reader.abort))
    store.set_note("x", b"1")


def _pauses_until(reader_ends: Callable[[], None]) -> Iterator[float]:
    yield 0.0
    reader_ends()
    yield 0.0
