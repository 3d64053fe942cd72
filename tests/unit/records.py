"""Puts records into host stores, for tests."""

from __future__ import annotations

from deferred_sessions import lifecycle
from deferred_sessions.memory.store import HostStore
from deferred_sessions.policy import Policy
from deferred_sessions.record import SessionRecord

POLICY = Policy(60.0)
NOW = 1_000_000.0
LIFE = 1_209_600.0


def put(
    store: HostStore, key: str, *, at: float = NOW, clean: bool = False, payload: bytes = b"{}"
) -> SessionRecord:
    """Put a session into `store`: new and dirty, or as PostgreSQL has it."""
    record = lifecycle.created(key, payload, "", expires_at=at + LIFE, now=at, policy=POLICY)
    if clean:
        record = lifecycle.written(
            record, version=1, expires_at=record.expires_at, now=at, policy=POLICY
        )
    store.update(key, lambda _: record)
    return record


def save(store: HostStore, key: str, payload: bytes, *, at: float) -> SessionRecord | None:
    def transition(record: SessionRecord | None) -> SessionRecord | None:
        return record and lifecycle.saved(record, payload, "", at + LIFE, at, POLICY)

    return store.update(key, transition)[1]


def due_keys(store: HostStore, now: float, limit: int = 100) -> list[str]:
    return [dirty.key for dirty in store.due(now, limit=limit)]


def key(number: int) -> str:
    return f"session{number:05d}"


def bury(record: SessionRecord | None, at: float) -> SessionRecord:
    """Return the tombstone of `record`, which PostgreSQL has heard of."""
    assert record is not None
    tombstone = lifecycle.deleted(record, record.key, now=at, policy=POLICY)
    return lifecycle.buried(tombstone, now=at)
