"""Records and their bytes."""

from __future__ import annotations

import math
import struct
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from deferred_sessions import lifecycle
from deferred_sessions import record as record_module
from deferred_sessions.exceptions import DeferredSessionsError, RecordCorruptError
from deferred_sessions.memory.indexes import has_moved
from deferred_sessions.memory.tables import Dirty
from deferred_sessions.policy import Policy
from deferred_sessions.record import (
    CHANGED,
    CHANGED_AT,
    FORMAT,
    RECOVERED,
    SHUT,
    TOMBSTONE,
    TOUCHED,
    SessionRecord,
    decode,
    decode_head,
    encode,
    encode_recovered,
    encode_saved_again,
    encode_written,
    is_tombstone,
    split_rests,
    version_of,
)

times = st.floats(min_value=0, max_value=4e9)
counts = st.integers(min_value=0, max_value=2**32 - 1)
numbers = st.integers(min_value=0, max_value=2**64 - 1)
_CLEAN = SessionRecord(
    "k" * 32, b"{}", "", 0, 0, 0, 1, 1, 0, 1.0, 2.0, 2.0, 1.0, 0.0, 0.0, 1.0, 1.0
)
anything = st.builds(
    SessionRecord,
    key=st.text("abcdefghijklmnopqrstuvwxyz0123456789", min_size=8, max_size=40),
    payload=st.binary(max_size=500),
    user_id=st.text(max_size=50),
    flags=st.integers(min_value=0, max_value=31),
    updates=counts,
    requests=counts,
    version=numbers,
    stored_version=numbers,
    fence=numbers,
    created_at=times,
    expires_at=times,
    stored_expires_at=times,
    written_at=times,
    changed_at=times,
    due_at=times,
    used_at=times,
    entered_at=times,
)


clean = st.builds(
    lambda record: record._replace(
        flags=record.flags & (TOMBSTONE | SHUT),
        updates=0,
        requests=0,
        stored_version=record.version,
        stored_expires_at=record.expires_at,
        changed_at=0.0,
        due_at=0.0,
    ),
    anything,
)
records = st.one_of(
    anything,
    clean,
    st.builds(
        lambda r, same: r._replace(
            version=7, stored_version=7, fence=1, **dict.fromkeys(same, r.entered_at)
        ),
        clean,
        st.sets(st.sampled_from(["created_at", "written_at", "used_at"])),
    ),
)


@given(records)
def test_d02_a_record_survives_its_bytes(record: SessionRecord) -> None:
    """D02: what is stored under an identifier is what comes back, field by field."""
    assert decode(record.key, encode(record)) == record
    assert decode(record.key, memoryview(encode(record))) == record


@given(records)
def test_head_is_the_fixed_part(record: SessionRecord) -> None:
    """The head has the same figures, without decoding the rest."""
    head = decode_head(encode(record))

    assert head[2:] == record[3:]
    assert split_rests([(head, encode(record))]) == ([record.user_id], [record.payload])


@given(records)
def test_written_bytes_are_those_of_the_written_record(record: SessionRecord) -> None:
    """The shortcut of the flusher does what `lifecycle.written` does."""
    record = record._replace(flags=CHANGED | record.flags & SHUT)
    expected = lifecycle.written(
        record._replace(stored_version=0),
        version=record.version,
        expires_at=record.expires_at,
        now=123.0,
        policy=Policy(60.0),
    )

    data = encode(record)

    assert decode(record.key, encode_written(data, decode_head(data), 123.0)) == expected


COUNTED = Policy(60.0, after_updates=50, after_requests=3)
NOW = 1e9
busy = st.builds(
    lambda record, sooner, later, used_at, due_at, requests: record._replace(
        flags=CHANGED | TOUCHED,
        updates=record.updates % 60,
        requests=requests,
        version=record.version // 2,
        expires_at=NOW + later,
        stored_expires_at=NOW + sooner,
        used_at=used_at,
        due_at=due_at,
    ),
    anything,
    st.sampled_from([0, 59, 60, 61, 1000]),
    st.sampled_from([60, 61, 1000]),
    st.sampled_from([0.0, NOW - 601, NOW - 600, NOW - 599, NOW]),
    st.sampled_from([NOW - 1, NOW, NOW + 1]),
    st.integers(min_value=0, max_value=4),
)


def saved_again(record: SessionRecord, payload: bytes, expires_at: float) -> bytes | None:
    used_after = NOW - lifecycle.USE_GRAIN
    return encode_saved_again(
        *(encode(record), record.version, record.entered_at, payload, "42", expires_at),
        *(used_after, NOW, COUNTED),
    )


@given(busy, st.sampled_from([b"", b"new"]), st.sampled_from([60, 61, 1000, 1001]))
def test_bytes_saved_again_are_those_of_the_saved_record(
    record: SessionRecord, payload: bytes, lifetime: float
) -> None:
    """The shortcut of a save does what `lifecycle.saved` does, where the indexes stay."""
    expected = lifecycle.saved(record, payload, "42", NOW + lifetime, NOW, COUNTED)

    data = saved_again(record, payload, NOW + lifetime)

    if data is not None:
        assert decode(record.key, data) == expected
        assert expected is not record
        assert not has_moved(record, expected)
        assert not COUNTED.cannot_wait(NOW, expected.expires_at, expected.stored_expires_at)


_BUSY = _CLEAN._replace(
    flags=CHANGED | TOUCHED,
    version=7,
    expires_at=NOW + 900,
    stored_expires_at=NOW + 800,
    changed_at=NOW - 9,
    due_at=NOW + 9,
    used_at=NOW,
)


def test_most_saves_take_the_shortcut() -> None:
    data = saved_again(_BUSY, b"new", NOW + 901)
    assert data is not None
    assert decode(_BUSY.key, data).version == 8


@pytest.mark.parametrize(
    "differs",
    [
        {"flags": CHANGED},
        {"flags": CHANGED | TOUCHED | SHUT},
        {"flags": CHANGED | TOUCHED | RECOVERED},
        {"flags": TOMBSTONE | CHANGED | TOUCHED},
        {"changed_at": 0.0},
        {"used_at": NOW - 600},
        {"stored_expires_at": NOW + 60},
        {"stored_expires_at": NOW + 901},
        {"payload": b"new"},
        {"payload": b"new", "user_id": "42"},
        {"updates": 49},
        {"requests": 3},
    ],
)
def test_a_save_that_takes_more_thought(differs: dict[str, Any]) -> None:
    assert saved_again(_BUSY._replace(**differs), b"new", NOW + 901) is None


def test_a_save_of_another_state_takes_more_thought() -> None:
    rest = (b"new", "", NOW + 901, NOW - 600, NOW, COUNTED)
    again = (_BUSY.entered_at, *rest)
    data = encode(_BUSY)
    assert encode_saved_again(data, 7, _BUSY.entered_at, *rest) is not None
    assert encode_saved_again(data, 8, _BUSY.entered_at, *rest) is None
    assert encode_saved_again(data, 7, _BUSY.entered_at + 1, *rest) is None
    assert encode_saved_again(encode(_CLEAN), 1, _CLEAN.entered_at, *rest) is None
    assert encode_saved_again(encode(_BUSY._replace(user_id="4" * 9))[:105], 7, *again) is None
    assert encode_saved_again(data[:50], 7, _BUSY.entered_at, *rest) is None
    assert encode_saved_again(b"", 7, _BUSY.entered_at, *rest) is None


@given(records, st.booleans())
def test_recovered_bytes_are_those_of_the_recovered_record(
    record: SessionRecord, is_changed: bool
) -> None:
    """The shortcut of a recovery does what `lifecycle.recovered` does."""
    flags, changed_at = record.flags | TOUCHED, record.changed_at if is_changed else 0.0
    record = record._replace(flags=flags, changed_at=changed_at)
    now = 2e9

    data = encode_recovered(memoryview(encode(record)), now)

    assert decode(record.key, data) == lifecycle.recovered(record, now=now)
    assert version_of(memoryview(b"xx" + data), 2, 2 + len(data)) == record.version
    assert is_tombstone(data) == record.is_tombstone
    assert struct.unpack("<d", data[CHANGED_AT]) == (record.changed_at or record.written_at,)


@pytest.mark.parametrize("data", [b"", encode(_CLEAN), bytes([FORMAT + 1]) * 200])
def test_only_dirty_records_are_recovered(data: bytes) -> None:
    with pytest.raises(RecordCorruptError, match="A record of layout"):
        version_of(memoryview(data), 0, len(data))


@given(records, st.data())
def test_cut_bytes_are_refused(record: SessionRecord, data: st.DataObject) -> None:
    """A record that is cut short in its fixed part or its user id is not taken for one."""
    whole = encode(record._replace(payload=b"", user_id=record.user_id + "u"))
    length = data.draw(st.integers(min_value=0, max_value=len(whole) - 1))

    with pytest.raises(RecordCorruptError, match="cut short"):
        decode(record.key, whole[:length])


def test_unknown_layout_is_refused() -> None:
    """A record of a later release says so instead of being misread."""
    data = bytes([FORMAT + 1]) + bytes(200)

    with pytest.raises(RecordCorruptError, match="layout 5 is unknown"):
        decode("somekey1", data)


def test_versions_do_not_wrap() -> None:
    """Trap 11: versions have 64 bits."""
    big = 2**64 - 1
    record = _CLEAN._replace(version=big, stored_version=big, fence=big)

    assert decode(record.key, encode(record)).version == big


def test_a_clean_record_is_short() -> None:
    """Half as much for what nearly all of memory is; whatever does not fit is as any other."""
    clean = _CLEAN
    times = {"created_at": 1.5, "written_at": 2.5, "used_at": 3.5, "entered_at": 4.5}
    for same, size in (
        ((), 52),
        (("created_at", "entered_at"), 44),
        (("written_at", "created_at"), 44),
        (("used_at", "entered_at"), 44),
        (("written_at", "created_at", "used_at", "entered_at"), 28),
    ):
        record = clean._replace(**{**times, **dict.fromkeys(same, 9.5)})
        assert len(encode(record)) == size + len(clean.payload)
        assert decode(record.key, encode(record)) == record
    for other in (
        clean._replace(flags=TOUCHED),
        clean._replace(requests=1),
        clean._replace(stored_expires_at=1.5),
        clean._replace(version=2**32, stored_version=2**32),
        clean._replace(user_id="u" * 256),
    ):
        assert len(encode(other)) == 100 + len(clean.payload) + len(other.user_id)
        assert decode(other.key, encode(other)) == other


def test_flags_are_told_apart() -> None:
    clean = _CLEAN

    assert not clean.is_dirty
    assert clean._replace(flags=TOUCHED).is_dirty
    assert not clean._replace(flags=TOUCHED).is_changed
    assert clean._replace(flags=CHANGED | TOUCHED).is_changed
    assert clean._replace(flags=TOMBSTONE).is_tombstone
    assert math.isfinite(clean.due_at)


def test_errors_have_one_root() -> None:
    assert issubclass(RecordCorruptError, DeferredSessionsError)
    assert issubclass(RecordCorruptError, ValueError)


def test_the_layout_has_its_number() -> None:
    """Whoever changes the layout must raise FORMAT, or old stores are misread."""
    layouts = [
        (each.format, each.size)
        for each in (record_module._HEADER, record_module._SHORTS[0], record_module._SHORTS[7])
    ]
    assert (FORMAT, layouts) == (
        4,
        [("<BHBIIQQQdddddddd", 100), ("<BBBBIIddddd", 52), ("<BBBBIIdd", 28)],
    )


@given(records)
def test_a_record_does_not_tell_its_secrets(record: SessionRecord) -> None:
    assume(record.key not in str(record.version))
    assert record.key not in repr(record)
    assert record.key not in repr([Dirty.of(record), [record]])
