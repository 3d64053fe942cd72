"""The host store, on a real memory-mapped file, without Django or PostgreSQL."""

from __future__ import annotations

import logging
import threading
from functools import partial

import pytest

from deferred_sessions import lifecycle
from deferred_sessions.memory import tables
from deferred_sessions.memory.store import HostStore
from deferred_sessions.record import Head, SessionRecord, encode
from tests.unit.records import NOW, bury, due_keys, key, put, save


def test_the_constructor_touches_nothing(tmp_path: object, store: HostStore) -> None:
    assert not store.directory.exists()
    assert not store.exists()


def test_b02_an_update_replaces_the_stored_session(store: HostStore) -> None:
    """B02: what was stored is gone, what is stored now is found."""
    put(store, key(1), payload=b"old")

    save(store, key(1), b"new", at=NOW + 1)

    record = store.get(key(1))
    assert record is not None
    assert record.payload == b"new"
    assert store.status().records == 1


def test_b04_what_is_stored_is_bytes(store: HostStore) -> None:
    """B04: the map holds the serialized payload itself."""
    put(store, key(1), payload=b'{"a":"needle in the map"}')
    store.close()

    assert b"needle in the map" in (store.directory / "data.mdb").read_bytes()


def test_an_unknown_key_is_none(store: HostStore) -> None:
    assert store.get("nosuchkey") is None
    assert store.head("nosuchkey") is None


def test_head_agrees_with_get(store: HostStore) -> None:
    put(store, key(1))
    record, head = store.get(key(1)), store.head(key(1))

    assert record is not None
    assert head is not None
    assert head[2:] == record[3:]


def test_a_transition_that_changes_nothing_writes_nothing(store: HostStore) -> None:
    before = put(store, key(1))

    assert store.update(key(1), lambda record: record) == (before, before)
    assert store.update("nosuchkey", lambda record: record) == (None, None)
    assert store.status().records == 1


def test_a_transition_may_remove(store: HostStore) -> None:
    put(store, key(1))

    store.update(key(1), lambda _: None)

    assert store.get(key(1)) is None
    assert store.status()[:2] == (0, 0)
    assert due_keys(store, NOW + 1000) == []


def test_a_failing_transition_changes_nothing(store: HostStore) -> None:
    """Trap 2: an error within the transaction leaves everything as it was."""
    before = put(store, key(1))

    def fail(_: SessionRecord | None) -> SessionRecord | None:
        raise RuntimeError("no")

    with pytest.raises(RuntimeError):
        store.update(key(1), fail)
    with pytest.raises(RuntimeError):
        store.update_many({key(0): lambda _: before._replace(key=key(0)), key(1): fail})

    assert store.get(key(1)) == before
    assert store.get(key(0)) is None


def test_due_is_ordered_by_time_and_chosen_by_limit(store: HostStore) -> None:
    """The longest due come first, whatever their keys; a batch is in order of its keys."""
    for number, at in ((1, NOW + 30), (2, NOW + 10), (3, NOW + 20), (4, NOW + 500)):
        put(store, key(number), at=at)

    assert due_keys(store, NOW + 69) == []
    assert due_keys(store, NOW + 70) == [key(2)]
    assert due_keys(store, NOW + 100) == [key(1), key(2), key(3)]
    assert due_keys(store, NOW + 100, limit=2) == [key(2), key(3)]
    assert due_keys(store, float("inf")) == [key(1), key(2), key(3), key(4)]


def test_due_goes_on_where_it_stopped(store: HostStore) -> None:
    for number in range(5):
        put(store, key(number), at=NOW + number)

    first = store.due(NOW + 100, limit=2)
    second = store.due(NOW + 100, limit=2, after=max(dirty.entry for dirty in first))
    third = store.due(NOW + 100, limit=2, after=max(dirty.entry for dirty in second))
    last = store.due(NOW + 100, limit=2, after=max(dirty.entry for dirty in third))

    assert [d.key for d in (*first, *second, *third)] == [key(n) for n in range(5)]
    assert last == []


def test_a_save_keeps_the_place_in_the_due_index(store: HostStore) -> None:
    """Trap 3: constant use does not move a session to the back of the queue."""
    put(store, key(1))
    for second in range(50):
        save(store, key(1), b"%d" % second, at=NOW + second)

    assert due_keys(store, NOW + 60) == [key(1)]
    assert store.status().dirty == 1


def test_what_is_found_can_be_decoded(store: HostStore) -> None:
    record = put(store, key(1))

    assert store.due(NOW + 60, limit=1)[0].record == record
    assert store.find_dirty([key(1), "nosuchkey"])[0].record == record
    assert store.find_dirty([key(1)]) == store.due(NOW + 60, limit=1)


def test_clean_records_are_not_found_dirty(store: HostStore) -> None:
    put(store, key(1), clean=True)

    assert store.find_dirty([key(1)]) == []
    assert due_keys(store, float("inf")) == []


def test_cleaning_leaves_nothing_due(store: HostStore) -> None:
    for number in range(600):  # more than one transaction's worth
        put(store, key(number))

    assert store.clean_many(store.due(NOW + 60, limit=1000), NOW + 61) == []

    assert store.status().dirty == 0
    record = store.get(key(7))
    assert record is not None
    assert not record.is_dirty
    assert record.written_at == NOW + 61
    assert record.stored_version == 1


def test_trap_1_cleaning_spares_what_changed_meanwhile(store: HostStore) -> None:
    """Trap 1: only the version that was written becomes clean."""
    put(store, key(1))
    put(store, key(2))
    batch = store.due(NOW + 60, limit=10)
    changed = save(store, key(1), b"newer", at=NOW + 60)

    assert store.clean_many(batch, NOW + 61) == [key(1)]

    assert store.get(key(1)) == changed
    assert due_keys(store, NOW + 60) == [key(1)]


def test_cleaning_spares_what_was_removed_meanwhile(store: HostStore) -> None:
    put(store, key(1))
    batch = store.due(NOW + 60, limit=10)
    store.update(key(1), lambda _: None)

    assert store.clean_many(batch, NOW + 61) == [key(1)]
    assert store.get(key(1)) is None


def test_an_unreadable_record_does_not_hold_up_the_others(
    store: HostStore, caplog: pytest.LogCaptureFixture
) -> None:
    """A record this version cannot read is kept, logged once, and passed over."""
    put(store, key(1))
    put(store, key(2))
    dbs = store._file.open()
    with dbs.env.begin(dbs.records, write=True) as txn:
        txn.put(key(1).encode(), b"\xff" + bytes(200))

    with caplog.at_level(logging.ERROR):
        assert due_keys(store, NOW + 60) == [key(2)]
        assert due_keys(store, NOW + 60) == [key(2)]

    assert caplog.text.count("1 records of the session store cannot be read") == 1
    assert store.status().records == 2


def test_oldest_change(store: HostStore) -> None:
    assert store.oldest_change() is None
    put(store, key(1), clean=True)
    assert store.oldest_change() is None
    save(store, key(1), b"1", at=NOW + 5)
    put(store, key(2), at=NOW + 3)

    assert store.oldest_change() == NOW + 3


def test_a_touch_is_not_an_unsaved_change(store: HostStore) -> None:
    put(store, key(1), clean=True)
    save(store, key(1), b"{}", at=NOW + 5)

    assert store.status().dirty == 1
    assert store.oldest_change() is None


def test_notes(store: HostStore) -> None:
    assert store.note("flush") is None
    store.set_note("flush", b"done")
    assert store.note("flush") == b"done"


def test_clear(store: HostStore) -> None:
    put(store, key(1))
    put(store, key(2), clean=True)
    store.clear()

    assert store.status()[:2] == (0, 0)
    assert due_keys(store, float("inf")) == []
    assert store.evict(10) == 0


def test_threads_lose_nothing(store: HostStore) -> None:
    """Many threads of one process write at once; every update is kept."""

    def count_up() -> None:
        for _ in range(200):
            store.update(key(1), lambda r: r and r._replace(updates=r.updates + 1))

    put(store, key(1))
    threads = [threading.Thread(target=count_up) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    record = store.get(key(1))
    assert record is not None
    assert record.updates == 1600


def test_closing_while_threads_work_harms_nobody(store: HostStore) -> None:
    """A fork closes the map under other threads; they open it again and go on."""
    put(store, key(1))
    stop = threading.Event()
    failures: list[BaseException] = []

    def work() -> None:
        try:
            while not stop.is_set():
                store.update(key(1), lambda r: r and r._replace(updates=r.updates + 1))
                assert store.get(key(1)) is not None
                assert store.head(key(1)) is not None
        except BaseException as error:  # noqa: BLE001 - shown below
            failures.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for _ in range(200):
        store.close()
    stop.set()
    for thread in threads:
        thread.join()

    assert failures == []


def test_entries_in_the_indexes_are_exact(store: HostStore) -> None:
    """Whatever happens to a record, it leaves no stray entry behind."""
    put(store, key(1))
    save(store, key(1), b"1", at=NOW + 100)
    store.clean_many(store.due(float("inf"), limit=1), NOW + 101)
    save(store, key(1), b"2", at=NOW + 300)
    store.update(key(1), lambda r: r and lifecycle.due_again(r, due_at=NOW + 900))
    store.update(key(1), partial(bury, at=NOW + 400))
    put(store, key(2))
    store.update(key(2), lambda _: None)

    dbs = store._file.open()
    with dbs.env.begin() as txn:
        assert txn.stat(dbs.due)["entries"] == 0
        assert txn.stat(dbs.used)["entries"] == txn.stat(dbs.records)["entries"] == 1


def test_dirty_of_a_record_is_as_if_found(store: HostStore) -> None:
    record = put(store, key(1))

    assert tables.Dirty.of(record) == store.due(float("inf"), limit=1)[0]
    assert tables.Dirty.of(record).data == encode(record)


def test_what_is_known_is_known_at_the_very_version(store: HostStore) -> None:
    """A process cache is never believed about a change of another process, or another stay."""
    record = put(store, key(1))
    known = (record.version, record.entered_at)
    assert isinstance(store.look(key(1), *known), Head)
    assert store.look(key(1), record.version + 1, record.entered_at) == record
    assert store.look(key(1), record.version, record.entered_at + 1) == record
    saved = save(store, key(1), b"[]", at=NOW)
    assert store.look(key(1), *known) == saved
    assert store.look(key(2), *known) is None


def test_what_stays_in_place_in_the_indexes(store: HostStore) -> None:
    """Saved twice, then a change since another time: the due index tells the last."""
    record = put(store, key(1), clean=True)
    save(store, key(1), b"1", at=NOW + 1)
    save(store, key(1), b"2", at=NOW + 2)
    assert store.oldest_change() == NOW + 1
    assert due_keys(store, NOW + 100) == [key(1)]
    store.update(key(1), lambda r: r and r._replace(changed_at=NOW + 5))
    assert store.oldest_change() == NOW + 5
    store.update(key(1), lambda _: None)
    assert due_keys(store, NOW + 100) == []
    assert store.evict(10) == 0
    assert record.version == 1
