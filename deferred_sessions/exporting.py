"""Gives sessions back to Django's own table, for a site that leaves.

Called by `manage.py exportsessions`. Rows are in Django's format already, so they are copied
as they are: by PostgreSQL itself where both tables are in one database, else in batches.
Invariant: beginning again does no harm, and writes only what differs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from typing import Any, Final, NamedTuple

from django.contrib.sessions.backends.base import SessionBase
from django.db import connections, router, transaction
from django.utils import timezone

from deferred_sessions.exceptions import NotListableError
from deferred_sessions.servers.fleet import Fleet
from deferred_sessions.servers.moves import Moves
from deferred_sessions.servers.server import SessionServer

FIELDS: Final = ["session_data", "expire_date"]


class Batch(NamedTuple):
    """What was looked at, and how many rows that wrote."""

    keys: Sequence[str]
    written: int

    def __repr__(self) -> str:
        return f"<Batch of {len(self.keys)} sessions>"


class Exporter:
    """Copies the rows of the session servers to the table of Django's `db` engine, or its kin."""

    def __init__(self, *, servers: Fleet, store: type[SessionBase]) -> None:
        """Take the engine that the site is to use.

        Raises:
            NotListableError: It does not keep its sessions in a table.
        """
        if not hasattr(store, "get_model_class"):
            raise NotListableError(f"{store.__module__} does not keep its sessions in a table.")
        self._servers = servers
        self._store: Any = store
        self._model: Any = self._store.get_model_class()
        self._alias: str = router.db_for_write(self._model)

    def count(self, now: float, since: float) -> int:
        """Return how many sessions there are to copy, each counted on each of its servers."""
        return sum(Moves(server).count_written(now, since) for server in self._servers.live())

    def copy(self, now: float, since: float, size: int) -> Iterator[Batch]:
        """Copy the live sessions that were written since then, batch by batch.

        Raises:
            ServerUnavailableError, RowRefusedError: Batches so far are committed.
        """
        # What PostgreSQL copies by itself may be of a copy; whoever decides comes after it.
        for server in sorted(self._servers.live(), key=lambda s: not self._is_beside(s)):
            after = ""
            while True:
                batch = self._copy(server, after, now, since, size)
                if not batch.keys:
                    break
                self._drop_cached(batch.keys)
                after = batch.keys[-1]
                yield batch

    def delete(self) -> int:
        """Delete there what was deleted here in the last day; return how many those were."""
        keys = sorted(
            key
            for server in self._servers.live()
            for key in Moves(server).gone()
            if self._servers.at(key) is server
        )
        rows = self._model.objects.using(self._alias)
        deleted = 0
        for start in range(0, len(keys), 1000):
            part = keys[start : start + 1000]
            deleted += rows.filter(session_key__in=part).delete()[0]
            self._drop_cached(part)
        return deleted

    def _is_beside(self, server: SessionServer) -> bool:
        return _place(self._alias) == _place(server.alias)

    def _copy(
        self, server: SessionServer, after: str, now: float, since: float, size: int
    ) -> Batch:
        if self._is_beside(server):
            table: str = self._model._meta.db_table  # noqa: SLF001 - public, whatever its name
            return Batch(*Moves(server).export(table, after, now, since, size))
        rows = Moves(server).written(after, now, since, size)
        written = self._write(
            [self._row(*row) for row in rows if self._servers.at(row[0]) is server]
        )
        return Batch([row[0] for row in rows], written)

    def _row(self, key: str, data: str, expires_at: float) -> Any:
        expires = datetime.fromtimestamp(expires_at, tz=UTC)
        if timezone.is_naive(timezone.now()):
            expires = timezone.make_naive(expires)
        return self._model(session_key=key, session_data=data, expire_date=expires)

    def _write(self, rows: list[Any]) -> int:
        """Write rows that differ; returns how many those were."""
        known = {
            row.pk: (row.session_data, row.expire_date)
            for row in self._model.objects.using(self._alias).filter(pk__in=[r.pk for r in rows])
        }
        new = [row for row in rows if row.pk not in known]
        old = [row for row in rows if row.pk in known]
        changed = [row for row in old if known[row.pk] != (row.session_data, row.expire_date)]
        with transaction.atomic(using=self._alias):
            objects = self._model.objects.using(self._alias)
            objects.bulk_create(new, ignore_conflicts=True)
            objects.bulk_update(changed, FIELDS)
        return len(new) + len(changed)

    def _drop_cached(self, keys: Sequence[str]) -> None:
        """Have `cached_db` read the rows, not what it had of the sessions before."""
        store = self._store()
        if hasattr(store, "cache_key_prefix"):
            store._cache.delete_many([store.cache_key_prefix + key for key in keys])  # noqa: SLF001


def _place(alias: str) -> tuple[object, ...]:
    database = connections[alias].settings_dict
    return tuple(str(database.get(part) or "") for part in ("ENGINE", "HOST", "PORT", "NAME"))
