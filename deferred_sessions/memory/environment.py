"""The memory-mapped file under a host store: made, sized, opened, closed around forks.

Called by `HostStore`. Invariant: a process never uses a map that it inherited; it is
closed before every fork and opened again by the next use on either side.

LMDB gives what is needed here: readers never wait, a writer that is killed at any
instruction leaves the last commit intact and its lock free (robust mutexes), and all
processes see a commit at once. See https://www.symas.com/lmdb and reference tests
in tests/processes.
"""

from __future__ import annotations

import fcntl
import os
import secrets
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Final, NamedTuple, Protocol

import lmdb

from deferred_sessions.exceptions import (
    RecordCorruptError,
    StoreError,
    StoreMismatchError,
    StoreUnavailableError,
)
from deferred_sessions.memory import directory as place
from deferred_sessions.memory import forks
from deferred_sessions.record import FORMAT

IN_USE_FILE: Final = "in-use.lock"
MAX_READERS: Final = 4096  # threads of all processes that read at the same instant
SEED_SIZE: Final = 1 << 20  # bytes; the map with which a new file is laid out
LAYOUT: Final = f"{FORMAT}.1"  # of the records, and of what stands in the indexes


class Log(Protocol):
    """Takes each record that PostgreSQL may lack, within the transaction that puts it."""

    def append(self, name: bytes, data: bytes) -> None:
        """Write a record down."""

    def generation(self) -> int:
        """Return the number of the log that takes the next one; it changes between changes."""


class Databases(NamedTuple):
    """An open environment and its named databases."""

    env: lmdb.Environment
    records: lmdb._Database
    """session key -> record"""
    due: lmdb._Database
    """due time, session key -> since when, and from which log on; dirty records only"""
    used: lmdb._Database
    """kind, minute of last use -> starts of session keys; see `indexes`"""
    notes: lmdb._Database
    """name -> what the processes of the node tell each other"""
    incarnation: str
    """Random; another one for each store that is made"""
    in_use: int
    """Descriptor of the shared lock that tells others the map is in use."""
    log: Log | None


Recover = Callable[[Databases], Log | None]
"""Makes a store whole before this process uses it; returns what logs its records."""


class MappedFile:
    """Opens the map lazily, once per process and again after a fork."""

    def __init__(self, directory: Path, *, size: int, identity: str, recover: Recover) -> None:
        self.directory = directory
        self._recover = recover
        self.databases: Databases | None = None
        self._size = size
        self._identity = identity
        self._is_new = False  # made by the call that is under way
        # Held while opening or closing, and across a fork, so that no other thread
        # opens the map between the moment we close it and the moment of the fork.
        self._gate = threading.RLock()
        self.writing = threading.RLock()
        """Held by the thread whose write transaction is under way. Never wait for the
        gate while holding it: whoever closes holds the gate and waits for this, because
        py-lmdb 3.0 crashes if the map is closed under a thread that begins to write."""

    def open(self) -> Databases:
        """Return the open databases; make the file if there is none.

        Raises:
            UnsafeDirectoryError, StoreUnavailableError, StoreMismatchError: see there.
        """
        forks.watch(self)  # before taking the gate, which a fork takes as well
        with self._gate:
            if self.databases is None:
                try:
                    self.databases = self._open_directory()
                except StoreError:
                    raise
                except OSError as error:
                    raise StoreUnavailableError(
                        f"Cannot open the session store in {self.directory}: {error.strerror}. "
                        "Make room, or name another DEFERRED_SESSIONS['DIRECTORY']."
                    ) from error
            return self.databases

    def exists(self) -> bool:
        """Tell whether there is a file to open; never makes one."""
        return (self.directory / place.DATA_FILE).exists()

    def close(self) -> None:
        """Unmap the file. Reads under way in other threads fail and are retried."""
        with self._gate:
            # First this, so that who comes now waits for the gate, not for the map.
            databases, self.databases = self.databases, None
            with self.writing:
                if databases is not None:
                    databases.env.close()
                    os.close(databases.in_use)

    def before_fork(self) -> None:
        """Close, and keep other threads from opening until the fork is done."""
        self._gate.acquire()
        self.close()
        self.writing.acquire()  # no child must inherit it from a thread that is not there

    def after_fork(self, *, in_child: bool) -> None:  # noqa: ARG002
        """Let the next use open the map again, on either side."""
        self.writing.release()
        self._gate.release()

    def _open_directory(self) -> Databases:
        place.make_private(self.directory)
        with place.opening(self.directory):
            place.check_contents(self.directory)
            place.discard_after_reboot(self.directory)
            dbs = self._open_file()
            try:
                return dbs._replace(log=self._recover(dbs))
            except BaseException:
                dbs.env.close()
                os.close(dbs.in_use)
                raise

    def _open_file(self) -> Databases:
        data_file = self.directory / place.DATA_FILE
        self._is_new = not data_file.exists()
        if self._is_new:
            self._make_file(data_file)
        in_use = self._take_in_use(data_file)
        try:
            env = _open_environment(self.directory, data_file.stat().st_size, writemap=True)
            try:
                return self._checked(env, in_use)
            except BaseException:
                env.close()
                raise
        except BaseException:
            os.close(in_use)
            raise

    def _make_file(self, data_file: Path) -> None:
        """Lay out a new file beside the place and move it there when it is whole."""
        (self.directory / place.LOCK_FILE).unlink(missing_ok=True)
        size = place.room_for(self.directory, self._size)
        seed = self.directory / "new"
        for left_over in (seed, seed.with_name("new-lock")):
            left_over.unlink(missing_ok=True)
        env = _open_environment(seed, SEED_SIZE, writemap=False)
        try:
            notes = env.open_db(b"notes")
            with env.begin(write=True) as txn:
                txn.put(b"identity", self._identity.encode(), db=notes)
                txn.put(b"layout", LAYOUT.encode(), db=notes)
                txn.put(b"incarnation", secrets.token_hex(8).encode(), db=notes)
            for name in (b"records", b"due"):
                env.open_db(name)
            env.open_db(b"used", dupsort=True, dupfixed=True)
        finally:
            env.close()
        place.allocate(seed, size)
        seed.rename(data_file)
        seed.with_name("new-lock").unlink(missing_ok=True)

    def _take_in_use(self, data_file: Path) -> int:
        """Tell other processes that the map is in use; grow it if nobody else uses it."""
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        descriptor = os.open(self.directory / IN_USE_FILE, flags, 0o600)
        try:
            self._grow(data_file, descriptor)
            fcntl.flock(descriptor, fcntl.LOCK_SH)
        except BaseException:
            os.close(descriptor)
            raise
        return descriptor

    def _grow(self, data_file: Path, descriptor: int) -> None:
        """Give a larger STORE_SIZE effect, if no other process has the map open."""
        wanted = self._size // place.PAGE * place.PAGE
        if self._is_new or data_file.stat().st_size >= wanted:
            return
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return
        place.grow(data_file, wanted)

    def _checked(self, env: lmdb.Environment, in_use: int) -> Databases:
        notes = env.open_db(b"notes")
        with env.begin(notes) as txn:
            identity = (txn.get(b"identity") or b"").decode()
            layout = (txn.get(b"layout") or b"").decode()
            incarnation = (txn.get(b"incarnation") or b"").decode()
        if identity != self._identity:
            raise StoreMismatchError(
                f"The session store in {self.directory} belongs to {identity!r}, not to "
                f"{self._identity!r}. Give each project and database its own "
                "DEFERRED_SESSIONS['DIRECTORY']."
            )
        if layout != LAYOUT:
            raise RecordCorruptError(
                f"The session store in {self.directory} has layout {layout or '?'}; this "
                f"version reads layout {LAYOUT}. Flush it with the version that wrote it "
                "(manage.py flushsessions --all), then remove the directory."
            )
        records, due = map(env.open_db, (b"records", b"due"))
        used = env.open_db(b"used", dupsort=True, dupfixed=True)
        return Databases(env, records, due, used, notes, incarnation, in_use, None)


def _open_environment(path: Path, size: int, *, writemap: bool) -> lmdb.Environment:
    """Open LMDB as a cache that outlives processes: no syncs, one shared writable map.

    `max_spare_txns=0`: a cached reader would keep a slot that a forked child could free.
    """
    try:
        return lmdb.open(
            os.fspath(path),
            map_size=size,
            subdir=path.is_dir(),
            mode=0o600,
            max_dbs=8,
            max_readers=MAX_READERS,
            max_spare_txns=0,
            sync=False,
            metasync=False,
            writemap=writemap,
            map_async=writemap,
            meminit=False,
            readahead=False,
        )
    except (lmdb.InvalidError, lmdb.CorruptedError) as error:
        raise StoreUnavailableError(
            f"Cannot open the session store, it is damaged: {error}. Stop the site, remove the "
            "directory and start again: PostgreSQL has what had been flushed."
        ) from error
    except (lmdb.Error, OSError) as error:
        raise StoreUnavailableError(f"Cannot open the session store at {path}: {error}") from error
