"""The private directory that holds one host store, and the room for its map.

Called by `HostStore` when it opens. Invariant: nobody but the running user can have
put anything into the directory, and every byte of the map is backed by real memory
or disk before it is mapped: a sparse map on a full filesystem is a SIGBUS.
"""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import re
import stat
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from deferred_sessions.exceptions import StoreUnavailableError, UnsafeDirectoryError

logger = logging.getLogger(__name__)

SHARED_MEMORY: Final = Path("/dev/shm")  # noqa: S108 - this is the place for it
BOOT_ID: Final = Path("/proc/sys/kernel/random/boot_id")

DATA_FILE: Final = "data.mdb"
LOCK_FILE: Final = "lock.mdb"
OPEN_LOCK_FILE: Final = "open.lock"
BOOT_FILE: Final = "boot"

PAGE: Final = 4096
MIN_SIZE: Final = 4 << 20  # bytes; below this a store is not worth having
FREE_SHARE: Final = 0.75  # of the free space, at most; others need some of it too


def default_directory(identity: str) -> Path:
    """Return where the host store of this project lives unless the settings say so.

    The name holds the user and a digest of `identity`, so that projects, databases
    and users never meet. Shared memory is preferred: it survives every process.
    """
    base = SHARED_MEMORY if os.access(SHARED_MEMORY, os.W_OK) else Path(tempfile.gettempdir())
    digest = hashlib.sha256(identity.encode()).hexdigest()[:12]
    return base / f"deferred-sessions-{os.geteuid()}-{digest}"


def other_owners(directory: Path) -> list[int]:
    """Return the users who have the same project's store, where the default one would be."""
    parts = re.fullmatch(r"(deferred-sessions)-\d+-([0-9a-f]{12})", directory.name)
    if parts is None:
        return []
    found = directory.parent.glob(f"{parts[1]}-*-{parts[2]}")
    return sorted(path.lstat().st_uid for path in found if path.name != directory.name)


def make_private(directory: Path) -> None:
    """Create `directory` with mode 0700, or make sure that it is safe as it is.

    Raises:
        UnsafeDirectoryError: It is a link, somebody else's, or open to others.
        StoreUnavailableError: It cannot be created.
    """
    try:
        directory.mkdir(mode=0o700)
    except FileExistsError:
        pass
    except OSError as error:
        raise StoreUnavailableError(
            f"Cannot create the session directory {directory}: {error.strerror}. "
            "Its parent must exist and be writable; see DEFERRED_SESSIONS['DIRECTORY']."
        ) from error
    _check_private(directory, stat.S_ISDIR, "a directory")
    parent = directory.parent.stat().st_mode
    if parent & stat.S_IWOTH and not parent & stat.S_ISVTX:
        raise UnsafeDirectoryError(
            f"Everybody may rename and remove what is in {directory.parent}. Session data needs "
            f"a safer place: chmod +t {directory.parent}, or name another "
            "DEFERRED_SESSIONS['DIRECTORY']."
        )


def check_contents(directory: Path) -> None:
    """Make sure that every file in `directory` is safe. Call it while holding `opening`.

    Raises:
        UnsafeDirectoryError: A file is a link, somebody else's, or open to others.
    """
    for path in directory.iterdir():
        _check_private(path, stat.S_ISREG, "a regular file")


def _check_private(path: Path, is_kind: Callable[[int], bool], kind: str) -> None:
    info = path.lstat()
    if not is_kind(info.st_mode):
        raise UnsafeDirectoryError(f"{path} must be {kind}, not a link or anything else.")
    if info.st_uid != os.geteuid():
        raise UnsafeDirectoryError(
            f"{path} belongs to user {info.st_uid}, but this process runs as user "
            f"{os.geteuid()}. All processes of a site must run as one user."
        )
    if info.st_mode & 0o077:
        raise UnsafeDirectoryError(
            f"{path} can be reached by other users (mode {stat.S_IMODE(info.st_mode):04o}). "
            f"Sessions need a place of their own: name a directory that does not exist yet in "
            f"DEFERRED_SESSIONS['DIRECTORY'], such as {_place_beside(path)}; or, if nothing "
            f"else is in it, chmod go-rwx {path}"
        )


def _place_beside(path: Path) -> Path:
    return path / "sessions" if path.is_dir() else path.parent


@contextmanager
def opening(directory: Path) -> Iterator[None]:
    """Let one process at a time create, size or discard what is in `directory`."""
    flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
    descriptor = os.open(directory / OPEN_LOCK_FILE, flags, 0o600)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            logger.info(
                "Waiting for another process that opens the session store in %s.",
                directory,
                extra={"action": "waiting_for_store"},
            )
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def discard_after_reboot(directory: Path) -> bool:
    """Remove a store that an earlier boot left behind; return whether there was one.

    The map is never synced, so after a crash of the host its pages are of different
    ages: a store on disk may be trusted only within the boot that made it. Call it
    while holding `opening`.
    """
    boot = BOOT_ID.read_text().strip() if BOOT_ID.exists() else "unknown"
    boot_file = directory / BOOT_FILE
    data_file = directory / DATA_FILE
    if boot_file.exists() and boot_file.read_text() == boot:
        return False
    stale = data_file.exists()
    if stale:
        logger.warning(
            "The host store in %s is from an earlier boot of this host and is discarded; "
            "PostgreSQL has what had been flushed.",
            directory,
            extra={"action": "store_discarded"},
        )
        data_file.unlink()
        (directory / LOCK_FILE).unlink(missing_ok=True)
    # Whole or not at all, or the next process would discard what this one makes.
    new_file = directory / f"{BOOT_FILE}.new"
    new_file.unlink(missing_ok=True)
    descriptor = os.open(new_file, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    with os.fdopen(descriptor, "w") as file:
        file.write(boot)
    new_file.rename(boot_file)
    return stale


def room_for(directory: Path, wanted: int) -> int:
    """Return how many of `wanted` bytes a new map in `directory` may take.

    Raises:
        StoreUnavailableError: There is not even room for the smallest store.
    """
    free, size = _room(directory, wanted)
    if size < min(wanted, MIN_SIZE):
        raise StoreUnavailableError(
            f"{directory} has {free >> 20} MiB free; a session store needs at least "
            f"{int(MIN_SIZE / FREE_SHARE) >> 20} MiB, and {int(wanted / FREE_SHARE) >> 20} MiB "
            "for the STORE_SIZE that is set. Make room, or name another "
            "DEFERRED_SESSIONS['DIRECTORY']. (Docker: --shm-size; Kubernetes: an emptyDir "
            "of medium Memory.)"
        )
    if size < wanted:
        _warn_of_size(directory, free, size, wanted)
    return size


def room_beside(directory: Path, wanted: int) -> int:
    """Return how many of `wanted` bytes a map in `directory` could take, if it were made."""
    place = next(path for path in (directory, *directory.parents) if path.exists())
    return _room(place, wanted)[1]


def grow(file: Path, wanted: int) -> None:
    """Extend the map in `file` to `wanted` bytes if there is room; else leave it, and say so.

    Nobody may have it mapped meanwhile.
    """
    size = file.stat().st_size
    free, more = _room(file.parent, wanted - size)
    if size + more < wanted:
        _warn_of_size(file.parent, free, size, wanted)
    else:
        allocate(file, wanted)


def _room(directory: Path, wanted: int) -> tuple[int, int]:
    """Return what is free in `directory`, and how many of `wanted` bytes we may take."""
    filesystem = os.statvfs(directory)
    free = filesystem.f_bavail * filesystem.f_frsize
    return free, min(wanted, int(free * FREE_SHARE)) // PAGE * PAGE


def _warn_of_size(directory: Path, free: int, size: int, wanted: int) -> None:
    logger.warning(
        "%s has %d MiB free: the session store has %d MiB, not the %d MiB of STORE_SIZE. "
        "It works, but evicts sessions sooner.",
        directory,
        free >> 20,
        size >> 20,
        wanted >> 20,
        extra={"action": "store_too_small"},
    )


def allocate(file: Path, size: int) -> None:
    """Back the first `size` bytes of `file` with real space, so that no access can fail.

    Raises:
        StoreUnavailableError: The filesystem has no room for it; `file` keeps its size.
    """
    descriptor = os.open(file, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    before = os.fstat(descriptor).st_size
    try:
        os.posix_fallocate(descriptor, 0, size)
    except OSError as error:
        os.ftruncate(descriptor, before)
        raise StoreUnavailableError(
            f"No room for {size >> 20} MiB in {file.parent}: {error.strerror}."
        ) from error
    finally:
        os.close(descriptor)
