"""What becomes of a record: one pure function per event in a session's life.

Called by `tiers`, `saving`, `bypass` and `flusher`, mostly as transitions that the host
store applies inside its write transaction; therefore nothing here does I/O, decodes a
payload or calls user code. Invariant: a record is clean, touched or changed exactly as far as
its last confirmed write to PostgreSQL says so.

                 saved                     written
    created ──▶ changed ◀──▶ ... ──▶ clean ◀──────── touched ◀── saved without a change
                    └──────────── deleted ──▶ tombstone ──▶ (forgotten)
"""

from __future__ import annotations

from typing import Final

from deferred_sessions.policy import NEVER, Policy
from deferred_sessions.record import (
    CHANGED,
    RECOVERED,
    SHUT,
    TOMBSTONE,
    TOUCHED,
    Head,
    SessionRecord,
)

TOMBSTONE_LIFETIME: Final = 300.0
"""Seconds a deletion is remembered after PostgreSQL has it: longer than a request
that read the row before may take to come back with it."""

REMEMBERED: Final = 86_400.0
"""Seconds that PostgreSQL keeps on record what others deleted, for nodes that are away."""

DELETE_AGAIN: Final = 60.0
"""Seconds after which the deletion of a row that may have been on its way is repeated;
no flusher waits longer for PostgreSQL."""

USE_GRAIN: Final = 600.0
"""Seconds; a use refreshes `used_at` only when that is older than this, because each
refresh moves an index entry."""


def created(
    key: str, payload: bytes, user_id: str, *, expires_at: float, now: float, policy: Policy
) -> SessionRecord:
    """Return the first record of a new session, which PostgreSQL does not have yet."""
    return SessionRecord(
        key=key,
        payload=payload,
        user_id=user_id,
        flags=CHANGED,
        updates=0,
        requests=0,
        version=1,
        stored_version=0,
        fence=0,
        created_at=now,
        expires_at=expires_at,
        stored_expires_at=0.0,
        written_at=now,
        changed_at=now,
        due_at=now + policy.interval,
        used_at=now,
        entered_at=now,
    )


def loaded(
    key: str,
    payload: bytes,
    user_id: str,
    *,
    version: int,
    fence: int,
    created_at: float,
    expires_at: float,
    written_at: float,
    now: float,
) -> SessionRecord:
    """Return the clean record of a session as PostgreSQL has it."""
    return SessionRecord(
        key=key,
        payload=payload,
        user_id=user_id,
        flags=0,
        updates=0,
        requests=0,
        version=version,
        stored_version=version,
        fence=fence,
        created_at=created_at,
        expires_at=expires_at,
        stored_expires_at=expires_at,
        written_at=written_at,
        changed_at=0.0,
        due_at=0.0,
        used_at=now,
        entered_at=now,
    )


def saved(  # noqa: PLR0917 - positional, because each save pays for keywords
    record: SessionRecord,
    payload: bytes,
    user_id: str,
    expires_at: float,
    now: float,
    policy: Policy,
) -> SessionRecord:
    """Return `record` with this payload and expiry; the same object if both are old.

    The version grows only with the payload: a touch leaves the caches of all
    processes valid.
    """
    # Unpacked and packed as tuples, because this is the hot path.
    (
        key, old_payload, _, old_flags, updates, requests, version, stored_version, fence,
        created_at, _, stored_expires_at, written_at, changed_at, due_at, used_at,
        entered_at,
    ) = record  # fmt: skip
    if payload == old_payload:
        return touched(record, expires_at=expires_at, now=now, policy=policy)
    updates += 1
    flags = CHANGED | TOUCHED if expires_at > stored_expires_at else CHANGED
    flags |= old_flags & RECOVERED
    if flags != old_flags or (due_at > now and policy.has_reached_count(updates, requests)):
        due_at = policy.due_at(
            now,
            known=due_at or NEVER,
            changed=True,
            written_at=NEVER if old_flags & CHANGED else written_at,
            updates=updates,
            requests=requests,
            expires_at=expires_at,
            stored_expires_at=stored_expires_at,
        )
    if now - used_at >= USE_GRAIN:
        used_at = now
    after = (
        key, payload, user_id, flags, updates, requests, version + 1, stored_version, fence,
        created_at, expires_at, stored_expires_at, written_at, changed_at or now, due_at, used_at,
        entered_at,
    )  # fmt: skip
    return tuple.__new__(SessionRecord, after)


def touched(
    record: SessionRecord, *, expires_at: float, now: float, policy: Policy
) -> SessionRecord:
    """Return `record` with this expiry; the same object if it has it already."""
    if expires_at == record.expires_at:
        return record
    after = record._replace(
        flags=(record.flags & (CHANGED | RECOVERED)) | _touch_flag(record, expires_at),
        expires_at=expires_at,
        used_at=used(record, now=now).used_at,
    )
    return _dated(after, known=record.due_at or NEVER, since=NEVER, now=now, policy=policy)


def served(record: SessionRecord, *, now: float, policy: Policy) -> SessionRecord:
    """Return `record` with one more request counted."""
    if record.is_tombstone:
        return record
    after = record._replace(requests=record.requests + 1)
    return _dated(after, known=record.due_at or NEVER, since=NEVER, now=now, policy=policy)


def used(record: SessionRecord, *, now: float) -> SessionRecord:
    """Return `record` as used now; the same object if that is known well enough."""
    if now - record.used_at < USE_GRAIN:
        return record
    return record._replace(used_at=now)


def written(
    record: SessionRecord, *, version: int, expires_at: float, now: float, policy: Policy
) -> SessionRecord:
    """Return `record` after PostgreSQL confirmed this version and expiry at `now`.

    What changed while the write was under way stays dirty, and is due one interval
    after this write.
    """
    if record.is_tombstone:  # deleted while the write was under way: delete what it wrote
        return record._replace(flags=record.flags | CHANGED, changed_at=now, due_at=now)
    changed = record.version > version
    after = record._replace(
        flags=(CHANGED if changed else 0)
        | (TOUCHED if record.expires_at > expires_at else 0)
        | (record.flags & SHUT),
        updates=record.version - version if changed else 0,
        requests=0,
        stored_version=max(version, record.stored_version),
        stored_expires_at=expires_at,
        written_at=now,
        changed_at=now if changed else 0.0,
    )
    return _dated(after, known=NEVER, since=now if changed else NEVER, now=now, policy=policy)


def deleted(record: SessionRecord | None, key: str, *, now: float, policy: Policy) -> SessionRecord:
    """Return the tombstone of a session, which PostgreSQL has yet to hear of.

    Safe to call again: the tombstone of a tombstone is itself.
    """
    if record is not None and record.is_tombstone:
        return record
    return SessionRecord(
        key=key,
        payload=b"",
        user_id="",
        flags=TOMBSTONE | CHANGED,
        updates=0,
        requests=0,
        version=record.version + 1 if record else 1,
        stored_version=record.stored_version if record else 0,
        fence=record.fence if record else 0,
        created_at=record.created_at if record else now,
        expires_at=now + TOMBSTONE_LIFETIME,
        stored_expires_at=0.0,
        written_at=now,
        changed_at=now,
        due_at=now + policy.interval,
        used_at=now,
        entered_at=now,
    )


def buried(record: SessionRecord, *, now: float) -> SessionRecord:
    """Return a tombstone whose deletion PostgreSQL has confirmed: clean, soon forgotten.

    If PostgreSQL never had the row, as far as is known, its INSERT may be under way: then
    the deletion is repeated after a while.
    """
    if not record.stored_version:
        return record._replace(stored_version=record.version, due_at=now + DELETE_AGAIN)
    return record._replace(
        flags=TOMBSTONE,
        written_at=now,
        changed_at=0.0,
        due_at=0.0,
        expires_at=now + TOMBSTONE_LIFETIME,
        used_at=now,
    )


def forgotten(record: SessionRecord, *, now: float) -> SessionRecord:
    """Return `record` to be written in full at once: PostgreSQL lost what it had."""
    return record._replace(
        flags=record.flags | CHANGED, changed_at=record.changed_at or now, due_at=now
    )


def is_remembered(record: SessionRecord | Head, *, now: float) -> bool:
    """Tell whether PostgreSQL would still know of it if somebody had deleted the row."""
    known_at = record.changed_at if record.flags & RECOVERED else record.entered_at
    return max(record.written_at, known_at) > now - REMEMBERED / 2


def recovered(record: SessionRecord, *, now: float) -> SessionRecord:
    """Return `record` as the journal had it: nobody knows what PostgreSQL has; due before now.

    One that has expired, too: the clock may be wrong after a start.
    """
    return record._replace(
        flags=record.flags & ~SHUT | CHANGED | (0 if record.is_tombstone else RECOVERED),
        changed_at=record.changed_at or record.written_at,
        due_at=now - 1.0,
        used_at=now,
        entered_at=now,
    )


def certain(record: SessionRecord) -> SessionRecord:
    """Return `record` as one that PostgreSQL has judged, and that stands."""
    return record._replace(flags=record.flags & ~RECOVERED)


def confirmed(
    record: SessionRecord, *, row_version: int, fence: int, now: float
) -> SessionRecord | None:
    """Return `record` as one that this node has the lease of, given its row; None if it is void.

    Void is what a node had that was found dead, if another has had the lease since and has
    written under it.
    """
    if fence > record.fence and row_version != record.stored_version:
        return None
    return record._replace(fence=max(fence, record.fence), entered_at=now)


def moved(record: SessionRecord, *, least: int) -> SessionRecord:
    """Return `record` on its way to another server: a change of hands, which outbids `least`."""
    return record._replace(fence=max(record.fence, least) + 1)


def unstored(record: SessionRecord, *, now: float) -> SessionRecord:
    """Return `record` to be inserted at once: PostgreSQL lost the whole row."""
    return forgotten(record._replace(stored_version=0, stored_expires_at=0.0), now=now)


def due_again(record: SessionRecord, *, due_at: float) -> SessionRecord:
    """Return `record` due at another time, after a write that did not succeed."""
    return record._replace(due_at=due_at) if record.is_dirty else record


def _touch_flag(record: SessionRecord, expires_at: float) -> int:
    return TOUCHED if expires_at > record.stored_expires_at else 0


def _dated(
    record: SessionRecord, *, known: float, since: float, now: float, policy: Policy
) -> SessionRecord:
    """Return `record` with the due time that its own figures demand."""
    if not record.is_dirty:
        return record._replace(due_at=0.0)
    return record._replace(
        due_at=policy.due_at(
            now,
            known=known,
            changed=record.is_changed,
            written_at=since,
            updates=record.updates,
            requests=record.requests,
            expires_at=record.expires_at,
            stored_expires_at=record.stored_expires_at,
        )
    )
