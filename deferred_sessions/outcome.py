"""What became of the records of a write, and what the host store is to make of it.

Filled in by `writer`, reported by `flusher`. Invariant: every record of a batch ends
up in exactly one of the lists, so that none is forgotten.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, fields
from functools import partial

from deferred_sessions import lifecycle
from deferred_sessions.memory.tables import Dirty, Transition
from deferred_sessions.policy import Policy
from deferred_sessions.record import SessionRecord
from deferred_sessions.servers.rows import State


@dataclass(slots=True)
class Outcome:
    """The records of a write, by what became of them."""

    inserted: Sequence[Dirty] = ()
    updated: Sequence[Dirty] = ()
    touched: Sequence[Dirty] = ()
    deleted: Sequence[Dirty] = ()
    repeated: list[tuple[Dirty, int, float]] = field(default_factory=list)
    """Had been written before, by an attempt that did not live to say so; with the
    version and the expiry that PostgreSQL has."""
    vanished: list[Dirty] = field(default_factory=list)
    """Deleted in PostgreSQL by somebody else; to be deleted here."""
    superseded: list[Dirty] = field(default_factory=list)
    """Newer in PostgreSQL, written by somebody else; to be forgotten here."""
    fenced: list[tuple[Dirty, State]] = field(default_factory=list)
    """The lease had passed to another node; stored for inspection, to be forgotten here."""
    moved: list[Dirty] = field(default_factory=list)
    """The same, but with nothing that PostgreSQL lacks."""
    outdated: list[Dirty] = field(default_factory=list)
    """Older in PostgreSQL than it had confirmed; to be written again in full."""
    incomplete: list[Dirty] = field(default_factory=list)
    """Written, but some further home does not have it yet; to be written again at once."""

    def miss(self, keys: Collection[str]) -> None:
        """Take note that some further home lacks what was written of these."""
        for name in ("inserted", "updated", "touched", "deleted"):
            taken: Sequence[Dirty] = getattr(self, name)
            self.incomplete += [dirty for dirty in taken if dirty.key in keys]
            setattr(self, name, [dirty for dirty in taken if dirty.key not in keys])
        self.incomplete += [dirty for dirty, *_ in self.repeated if dirty.key in keys]
        self.repeated = [found for found in self.repeated if found[0].key not in keys]

    def with_others(self, other: Outcome) -> Outcome:
        """Return these records and those of another server."""
        return Outcome(*([*getattr(self, f.name), *getattr(other, f.name)] for f in fields(self)))

    @property
    def written(self) -> list[Dirty]:
        """What PostgreSQL has now as it was sent."""
        return [*self.inserted, *self.updated, *self.touched]

    @property
    def rows(self) -> int:
        """Rows that were inserted, updated or deleted."""
        return sum(map(len, (self.inserted, self.updated, self.touched, self.deleted)))

    def transitions(
        self, *, changed_since: Collection[str], now: float, policy: Policy
    ) -> dict[str, Transition]:
        """Return how to mark what cannot just be marked as clean.

        What a server says counts for what it was sent: a session that has moved to another
        server meanwhile, and has a later fence since, stays due there.
        """
        marks: dict[str, Transition] = {}

        def mark(dirty: Dirty, transition: Transition) -> None:
            marks[dirty.key] = partial(_unless_moved, dirty.head.fence, transition, now)

        if changed_since:
            for dirty in self.written:
                if dirty.key in changed_since:
                    head = dirty.head
                    mark(dirty, partial(_written, head.version, head.expires_at, now, policy))
        for dirty, version, expires_at in self.repeated:
            mark(dirty, partial(_written, version, expires_at, now, policy))
        for dirty in (*self.deleted, *self.vanished):
            mark(dirty, partial(_deleted, dirty.key, now, policy))
        for dirty in (*self.superseded, *self.moved, *(dirty for dirty, _ in self.fenced)):
            mark(dirty, partial(_superseded, dirty.head.version))
        for dirty in self.outdated:
            mark(dirty, partial(_outdated, now))
        for dirty in self.incomplete:
            mark(dirty, partial(_incomplete, now))
        return marks


def _unless_moved(
    fence: int, transition: Transition, now: float, record: SessionRecord | None
) -> SessionRecord | None:
    if record is not None and record.fence > fence:
        return lifecycle.due_again(record, due_at=now)
    return transition(record)


def _written(
    version: int, expires_at: float, now: float, policy: Policy, record: SessionRecord | None
) -> SessionRecord | None:
    if record is None or (record.version < version and not record.is_tombstone):
        return None  # PostgreSQL has a later state: the next load reads that
    return lifecycle.written(record, version=version, expires_at=expires_at, now=now, policy=policy)


def _deleted(key: str, now: float, policy: Policy, record: SessionRecord | None) -> SessionRecord:
    return lifecycle.buried(lifecycle.deleted(record, key, now=now, policy=policy), now=now)


def _superseded(version: int, record: SessionRecord | None) -> SessionRecord | None:
    """Forget our version, so that the next load reads theirs; keep what came after."""
    if record is None or record.is_tombstone or record.version > version:
        return record
    return None


def _incomplete(now: float, record: SessionRecord | None) -> SessionRecord | None:
    return record and lifecycle.certain(lifecycle.due_again(record, due_at=now))


def _outdated(now: float, record: SessionRecord | None) -> SessionRecord | None:
    if record is None or record.is_tombstone:
        return record
    return lifecycle.forgotten(record, now=now)
