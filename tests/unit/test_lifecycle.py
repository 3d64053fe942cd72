"""What becomes of a record, event by event."""

from __future__ import annotations

import pytest

from deferred_sessions import lifecycle
from deferred_sessions.policy import Policy
from deferred_sessions.record import CHANGED, TOUCHED, SessionRecord

POLICY = Policy(60.0, after_updates=50)
NOW = 1_000_000.0
LIFE = 1_209_600.0


@pytest.fixture
def new() -> SessionRecord:
    return lifecycle.created("k" * 32, b"{}", "", expires_at=NOW + LIFE, now=NOW, policy=POLICY)


@pytest.fixture
def clean(new: SessionRecord) -> SessionRecord:
    return lifecycle.written(new, version=1, expires_at=NOW + LIFE, now=NOW, policy=POLICY)


def save(record: SessionRecord, payload: bytes, now: float, user: str = "") -> SessionRecord:
    return lifecycle.saved(record, payload, user, now + LIFE, now, POLICY)


def test_a_new_session_is_dirty_until_it_is_written(new: SessionRecord) -> None:
    assert new.is_changed
    assert new.stored_version == 0
    assert new.due_at == NOW + 60


def test_written_makes_clean(clean: SessionRecord) -> None:
    assert not clean.is_dirty
    assert clean.stored_version == clean.version == 1
    assert clean.due_at == clean.changed_at == 0.0


def test_a_save_grows_the_version_and_remembers_the_first_change(clean: SessionRecord) -> None:
    changed = save(save(clean, b"1", NOW + 10, "7"), b"2", NOW + 20, "7")

    assert changed.version == 3
    assert changed.updates == 2
    assert changed.changed_at == NOW + 10
    assert changed.user_id == "7"


def test_a_save_of_the_same_is_a_touch(clean: SessionRecord) -> None:
    touched = save(clean, b"{}", NOW + 10)

    assert touched.version == clean.version
    assert touched.flags == TOUCHED
    assert touched.updates == 0


def test_a_touch_to_the_same_expiry_is_nothing(clean: SessionRecord) -> None:
    """Nothing to write: the very same record comes back."""
    assert lifecycle.saved(clean, b"{}", "", clean.expires_at, NOW + 10, POLICY) is clean


def test_a_touch_keeps_a_change(clean: SessionRecord) -> None:
    changed = save(clean, b"1", NOW + 1)

    touched = save(changed, b"1", NOW + 2)

    assert touched.flags == CHANGED | TOUCHED
    assert touched.due_at == changed.due_at


def test_a_shorter_expiry_is_not_a_touch(clean: SessionRecord) -> None:
    """The stored expiry lets the session live longer, which harms nobody."""
    shorter = lifecycle.saved(clean, b"{}", "", NOW + 5, NOW + 1, POLICY)

    assert not shorter.is_dirty
    assert shorter.expires_at == NOW + 5


def test_a_change_during_the_write_stays_dirty(clean: SessionRecord) -> None:
    """Trap 1: clean is only the version that was written."""
    sent = save(clean, b"1", NOW + 10)
    newer = save(save(sent, b"2", NOW + 11), b"3", NOW + 12)

    after = lifecycle.written(
        newer, version=sent.version, expires_at=sent.expires_at, now=NOW + 13, policy=POLICY
    )

    assert after.is_changed
    assert after.stored_version == sent.version
    assert after.updates == 2
    assert after.due_at == NOW + 13 + 60


def test_a_touch_during_the_write_stays_touched(clean: SessionRecord) -> None:
    sent = save(clean, b"1", NOW + 10)
    touched = save(sent, b"1", NOW + 20)

    after = lifecycle.written(
        touched, version=sent.version, expires_at=sent.expires_at, now=NOW + 21, policy=POLICY
    )

    assert after.flags == TOUCHED
    assert after.stored_expires_at == sent.expires_at


def test_a_write_reported_late_does_not_take_the_stored_version_back(
    clean: SessionRecord,
) -> None:
    """Two flushers: the slower one reports the older version."""
    newer = save(save(clean, b"1", NOW + 1), b"2", NOW + 2)
    written = lifecycle.written(
        newer, version=3, expires_at=newer.expires_at, now=NOW + 3, policy=POLICY
    )

    late = lifecycle.written(
        written, version=2, expires_at=newer.expires_at, now=NOW + 4, policy=POLICY
    )

    assert late.stored_version == 3
    assert late.version == 3


def test_deletion_leaves_a_tombstone(clean: SessionRecord) -> None:
    tombstone = lifecycle.deleted(clean, clean.key, now=NOW, policy=POLICY)

    assert tombstone.is_tombstone
    assert tombstone.is_dirty
    assert tombstone.payload == b""
    assert lifecycle.deleted(tombstone, clean.key, now=NOW + 9, policy=POLICY) is tombstone


def test_deletion_of_the_unknown_is_remembered_as_well() -> None:
    """Somebody may be on the way with a row that was read before."""
    assert lifecycle.deleted(None, "k" * 32, now=NOW, policy=POLICY).is_tombstone


def test_a_buried_tombstone_is_clean_and_stays_one(clean: SessionRecord) -> None:
    tombstone = lifecycle.deleted(clean, clean.key, now=NOW, policy=POLICY)

    buried = lifecycle.buried(tombstone, now=NOW + 1)

    assert buried.is_tombstone
    assert not buried.is_dirty
    assert lifecycle.buried(buried, now=NOW + 2).due_at == 0


def test_a_session_that_postgresql_may_be_about_to_insert_is_deleted_twice(
    new: SessionRecord,
) -> None:
    """The INSERT may be under way, and the first DELETE finds nothing."""
    tombstone = lifecycle.deleted(new, new.key, now=NOW, policy=POLICY)
    once = lifecycle.buried(tombstone, now=NOW)
    assert once.is_dirty
    assert once.due_at == NOW + lifecycle.DELETE_AGAIN
    assert not lifecycle.buried(once, now=NOW + 60).is_dirty


def test_a_write_that_ends_after_the_deletion(clean: SessionRecord) -> None:
    """It may have written the row after the DELETE: delete it again."""
    tombstone = lifecycle.deleted(clean, clean.key, now=NOW, policy=POLICY)
    buried = lifecycle.buried(tombstone, now=NOW)
    again = lifecycle.written(buried, version=1, expires_at=NOW, now=NOW + 1, policy=POLICY)
    assert again.is_tombstone
    assert again.is_dirty
    assert again.due_at == NOW + 1
    assert lifecycle.served(buried, now=NOW, policy=POLICY) is buried


def test_what_postgresql_forgot_is_due_in_full(clean: SessionRecord) -> None:
    forgotten = lifecycle.forgotten(clean, now=NOW + 5)

    assert forgotten.is_changed
    assert forgotten.due_at == NOW + 5
    assert forgotten.changed_at == NOW + 5


def test_only_dirty_records_are_due_again(clean: SessionRecord) -> None:
    assert lifecycle.due_again(clean, due_at=NOW) is clean
    assert lifecycle.due_again(save(clean, b"1", NOW), due_at=NOW + 300).due_at == NOW + 300


def test_a_set_aside_record_stays_aside_when_it_is_saved(clean: SessionRecord) -> None:
    """A record PostgreSQL refuses is not tried with every save of a busy visitor."""
    aside = lifecycle.due_again(save(clean, b"1", NOW), due_at=NOW + 300)

    assert save(aside, b"2", NOW + 1).due_at == NOW + 300


def test_use_is_noted_to_ten_minutes(clean: SessionRecord) -> None:
    """Each refresh moves an index entry, so there are few."""
    assert lifecycle.used(clean, now=NOW + 599) is clean
    assert lifecycle.used(clean, now=NOW + 600).used_at == NOW + 600
    assert save(clean, b"1", NOW + 599).used_at == NOW
    assert save(clean, b"1", NOW + 600).used_at == NOW + 600
