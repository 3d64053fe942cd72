"""The private directory: what is refused, what is made, what is thrown away."""

from __future__ import annotations

import logging
import os
import stat
from pathlib import Path

import pytest

from deferred_sessions.exceptions import (
    RecordCorruptError,
    StoreMismatchError,
    StoreUnavailableError,
    UnsafeDirectoryError,
)
from deferred_sessions.memory import directory as place
from deferred_sessions.memory.store import HostStore

MIB = 1 << 20


def make(directory: Path, *, size: int = 8 * MIB, identity: str = "tests") -> HostStore:
    return HostStore(directory, size=size, identity=identity)


def test_directory_and_files_are_private(tmp_path: Path) -> None:
    store = make(tmp_path / "store")
    store.open()
    store.set_note("x", b"y")
    store.close()

    assert stat.S_IMODE(store.directory.stat().st_mode) == 0o700
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in store.directory.iterdir()}
    assert set(modes.values()) == {0o600}
    assert {"data.mdb", "lock.mdb"} <= modes.keys()


def test_private_whatever_the_umask(tmp_path: Path) -> None:
    old = os.umask(0)
    try:
        store = make(tmp_path / "store")
        store.open()
        store.close()
    finally:
        os.umask(old)

    assert stat.S_IMODE(store.directory.stat().st_mode) == 0o700
    assert {stat.S_IMODE(p.stat().st_mode) for p in store.directory.iterdir()} == {0o600}


def test_an_open_directory_is_refused(tmp_path: Path) -> None:
    directory = tmp_path / "store"
    directory.mkdir(mode=0o755)

    with pytest.raises(UnsafeDirectoryError, match="chmod go-rwx"):
        make(directory).open()


def test_a_link_is_refused(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir(mode=0o700)
    (tmp_path / "link").symlink_to(tmp_path / "real")

    with pytest.raises(UnsafeDirectoryError, match="not a link"):
        make(tmp_path / "link").open()


def test_a_link_inside_is_refused(tmp_path: Path) -> None:
    """Nobody gets us to write through a link that was laid before we came."""
    directory = tmp_path / "store"
    directory.mkdir(mode=0o700)
    (tmp_path / "victim").write_text("precious")
    (directory / "data.mdb").symlink_to(tmp_path / "victim")

    with pytest.raises(UnsafeDirectoryError, match="not a link"):
        make(directory).open()
    assert (tmp_path / "victim").read_text() == "precious"


def test_an_open_file_inside_is_refused(tmp_path: Path) -> None:
    store = make(tmp_path / "store")
    store.open()
    store.close()
    (store.directory / "data.mdb").chmod(0o644)

    with pytest.raises(UnsafeDirectoryError, match=r"data\.mdb can be reached"):
        store.open()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a directory away")
def test_a_directory_of_somebody_else_is_refused(tmp_path: Path) -> None:
    directory = tmp_path / "store"
    directory.mkdir(mode=0o700)
    os.chown(directory, 12345, 12345)

    with pytest.raises(UnsafeDirectoryError, match="belongs to user 12345"):
        make(directory).open()


def test_a_missing_parent_is_a_clear_error(tmp_path: Path) -> None:
    with pytest.raises(StoreUnavailableError, match="DIRECTORY"):
        make(tmp_path / "no" / "such" / "place").open()


def test_a_file_in_its_place_is_a_clear_error(tmp_path: Path) -> None:
    (tmp_path / "store").write_text("")

    with pytest.raises(UnsafeDirectoryError, match="must be a directory"):
        make(tmp_path / "store").open()


def test_errors_are_what_the_builtins_mean() -> None:
    assert issubclass(UnsafeDirectoryError, PermissionError)
    assert issubclass(StoreUnavailableError, OSError)
    assert issubclass(StoreMismatchError, ValueError)


def test_every_byte_of_the_map_is_backed(tmp_path: Path) -> None:
    """A sparse map on a full filesystem would be a SIGBUS."""
    store = make(tmp_path / "store")
    store.open()
    info = (store.directory / "data.mdb").stat()

    assert info.st_size == 8 * MIB
    assert info.st_blocks * 512 >= 8 * MIB


def test_a_smaller_filesystem_gets_a_smaller_store(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    _pretend_free(monkeypatch, 12 * MIB)

    with caplog.at_level(logging.WARNING):
        store = make(tmp_path / "store", size=64 * MIB)
        store.open()

    assert store.status().size == 9 * MIB
    assert "the session store has 9 MiB, not the 64 MiB" in caplog.text
    assert len(caplog.records) == 1


def test_a_full_filesystem_is_a_clear_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _pretend_free(monkeypatch, 2 * MIB)

    with pytest.raises(StoreUnavailableError, match="2 MiB free.*shm-size"):
        make(tmp_path / "store", size=64 * MIB).open()
    assert not (tmp_path / "store" / "data.mdb").exists()


def test_no_room_at_the_last_moment_is_a_clear_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Somebody else took the space between the question and the allocation."""

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)

    with pytest.raises(StoreUnavailableError, match="No room for 8 MiB"):
        make(tmp_path / "store").open()
    monkeypatch.undo()
    make(tmp_path / "store").open()


def test_another_project_is_refused(tmp_path: Path) -> None:
    first = make(tmp_path / "store", identity="shop.urls@/shop")
    first.open()
    first.close()

    with pytest.raises(StoreMismatchError, match=r"shop\.urls@/shop.*blog\.urls@/blog"):
        make(tmp_path / "store", identity="blog.urls@/blog").open()


def test_another_layout_is_refused(tmp_path: Path) -> None:
    store = make(tmp_path / "store")
    store.set_note("layout", b"99")
    store.close()

    with pytest.raises(RecordCorruptError, match="layout 99.*flushsessions --all"):
        store.open()


def test_a_store_grows_when_nobody_else_has_it_open(tmp_path: Path) -> None:
    """A larger STORE_SIZE takes effect, and what is stored stays."""
    small = make(tmp_path / "store")
    small.set_note("kept", b"yes")
    small.close()

    large = make(tmp_path / "store", size=16 * MIB)

    assert large.status().size == 16 * MIB
    assert large.note("kept") == b"yes"


def test_a_store_does_not_shrink(tmp_path: Path) -> None:
    large = make(tmp_path / "store", size=16 * MIB)
    large.open()
    large.close()

    assert make(tmp_path / "store", size=8 * MIB).status().size == 16 * MIB


def test_a_store_that_cannot_grow_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    small = make(tmp_path / "store")
    small.open()
    small.close()
    _pretend_free(monkeypatch, MIB)

    with caplog.at_level(logging.WARNING):
        assert make(tmp_path / "store", size=64 * MIB).status().size == 8 * MIB
    assert "the session store has 8 MiB, not the 64 MiB" in caplog.text


def test_a_half_made_store_is_made_anew(tmp_path: Path) -> None:
    """Killed while it laid out the file: the next one starts over."""
    store = make(tmp_path / "store")
    store.open()
    store.close()
    (store.directory / "data.mdb").rename(store.directory / "new")
    (store.directory / "new-lock").touch(mode=0o600)

    store.set_note("x", b"y")

    assert store.note("x") == b"y"
    assert not (store.directory / "new").exists()


def test_a_store_of_an_earlier_boot_is_discarded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Never synced, so after a crash of the host its pages are of different ages."""
    store = make(tmp_path / "store")
    store.set_note("before", b"crash")
    store.close()
    other_boot = tmp_path / "boot_id"
    other_boot.write_text("another boot\n")
    monkeypatch.setattr(place, "BOOT_ID", other_boot)

    with caplog.at_level(logging.WARNING):
        assert store.note("before") is None
    assert "earlier boot" in caplog.text

    store.set_note("after", b"crash")
    store.close()
    assert store.note("after") == b"crash"


def test_a_note_of_another_boot_without_a_store(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The first process makes a store; the second must not take it for an old one."""
    first = make(tmp_path / "store")
    place.make_private(first.directory)
    (first.directory / "boot").touch(mode=0o600)
    (first.directory / "boot").write_text("another boot")
    first.set_note("x", b"y")
    first.close()

    second = make(tmp_path / "store")
    assert second.note("x") == b"y"
    assert "earlier boot" not in caplog.text
    second.close()


def test_a_parent_that_everybody_may_change_is_refused(tmp_path: Path) -> None:
    """Whoever may rename the directory may put another in its place; /tmp has the sticky bit."""
    parent = tmp_path / "open"
    parent.mkdir()
    parent.chmod(0o777)
    with pytest.raises(UnsafeDirectoryError, match=r"chmod \+t"):
        make(parent / "store").set_note("x", b"y")

    parent.chmod(0o1777)
    store = make(parent / "store")
    store.set_note("x", b"y")
    store.close()


def test_a_store_without_a_boot_is_discarded(tmp_path: Path) -> None:
    """Killed between the file and the note of the boot: not trusted."""
    store = make(tmp_path / "store")
    store.set_note("x", b"y")
    store.close()
    (store.directory / "boot").unlink()

    assert store.note("x") is None


def test_garbage_is_a_clear_error(tmp_path: Path) -> None:
    store = make(tmp_path / "store")
    store.open()
    store.close()
    (store.directory / "data.mdb").write_bytes(b"garbage" * 4096)

    with pytest.raises(StoreUnavailableError, match="Cannot open the session store"):
        store.open()


def test_default_directory_tells_projects_apart() -> None:
    one, two = place.default_directory("a@db"), place.default_directory("b@db")

    assert one != two
    assert one == place.default_directory("a@db")
    assert str(os.geteuid()) in one.name
    assert one.parent == Path("/dev/shm")


def test_default_directory_without_shared_memory(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(place, "SHARED_MEMORY", tmp_path / "none")

    assert place.default_directory("a").parent == Path(place.tempfile.gettempdir())


def _pretend_free(monkeypatch: pytest.MonkeyPatch, free: int) -> None:
    real = os.statvfs("/")
    values = list(real)
    values[1], values[4] = 1, free  # f_frsize, f_bavail
    monkeypatch.setattr(os, "statvfs", lambda _: os.statvfs_result(values))
