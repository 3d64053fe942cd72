"""Hosts with a journal, for tests: they can lose their memory."""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import Final

from deferred_sessions.memory.journal import Journal
from deferred_sessions.memory.logs import LOGS
from deferred_sessions.memory.store import HostStore
from deferred_sessions.record import SessionRecord

MIB: Final = 1 << 20


class Host:
    """A host with a journal; it can lose its memory."""

    def __init__(self, place: Path, *, size: int = MIB, identity: str = "tests") -> None:
        self.place = place
        self.size = size
        self.identity = identity
        self.store = self._start()

    @property
    def logs(self) -> Path:
        return self.place / "journal"

    @property
    def journal(self) -> Journal:
        assert self.store.journal is not None
        return self.store.journal

    def lose_power(self) -> None:
        """What a reboot does to shared memory; what was synced is on disk."""
        self.store.close()
        shutil.rmtree(self.place / "store")
        self.store = self._start()

    def records(self) -> dict[str, SessionRecord]:
        return {record.key: record for record in self.store.scan()}

    def active(self) -> Path:
        return self.logs / LOGS[self.journal.position()[0] & 1]

    def _start(self, *, store_size: int = 8 * MIB) -> HostStore:
        journal = Journal(
            self.logs,
            store=self.place / "store",
            size=self.size,
            sync_interval=0.1,
            identity=self.identity,
        )
        store = HostStore(
            self.place / "store", size=store_size, identity=self.identity, journal=journal
        )
        store.open()
        return store


def second_process(host: Host, *, sync_interval: float = 0.1) -> Journal:
    """Return the journal as another process of the host has it."""
    return Journal(
        host.logs,
        store=host.place / "store",
        size=MIB,
        sync_interval=sync_interval,
        identity=host.identity,
    )


def swapped(journal: Journal) -> None:
    journal.swap(journal.prepare(), time.time())
