"""Kombu's filesystem transport, made safe for several processes.

Called by Celery through the name that `testproject.celery` registers. Kombu writes
messages and exchange tables in place, so that a worker may read one that is half written
and end with a JSONDecodeError (celery/kombu issue 1551). Here whatever can be read is
complete: a message appears under its name in one step, and tables change under a lock.
"""

from __future__ import annotations

import fcntl
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from kombu.transport import filesystem
from kombu.utils.json import dumps


class Channel(filesystem.Channel):
    """A channel whose files are never seen half written."""

    def _put(self, queue: str, payload: Any, **_: Any) -> None:
        folder = Path(self.data_folder_out)
        # Readers take names that end in ".<queue>.msg", oldest name first.
        name = f"{time.monotonic_ns() // 1_000_000}_{uuid.uuid4()}"
        draft = folder / f"{name}.draft"
        draft.write_text(dumps(payload))
        draft.rename(folder / f"{name}.{queue}.msg")

    def get_table(self, exchange: str) -> list[Any]:
        """Return the queues that are bound to an exchange."""
        with self._tables():
            return super().get_table(exchange)

    def _queue_bind(self, exchange: str, *args: Any) -> None:
        with self._tables():
            super()._queue_bind(exchange, *args)

    def _delete(self, queue: str, exchange: str, *args: Any, **kwargs: Any) -> None:
        with self._tables():
            super()._delete(queue, exchange, *args, **kwargs)

    @contextmanager
    def _tables(self) -> Iterator[None]:
        folder = Path(self.control_folder)
        folder.mkdir(exist_ok=True)
        with (folder / "tables.lock").open("a") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield


class Transport(filesystem.Transport):
    """The transport behind `filesystem://` addresses in this project."""

    Channel = Channel
