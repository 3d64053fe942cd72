"""A real filesystem of 64 MB, and one that is full: never a SIGBUS."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from deferred_sessions.backend import SessionStore
from deferred_sessions.exceptions import StoreUnavailableError
from deferred_sessions.models import Session
from deferred_sessions.runtime import get_runtime
from tests.processes.conftest import Site

MIB = 1 << 20


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Path]:
    """A tmpfs of 64 MB, as Docker gives to `/dev/shm`."""
    if os.geteuid() != 0:
        if "CI" in os.environ:
            pytest.fail("CI must run as root, to mount a small filesystem.")
        pytest.skip("Only root can mount a filesystem.")
    place = tmp_path / "small"
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", place], check=True)
    yield place
    subprocess.run(["umount", "--lazy", place], check=True)


def test_a_small_filesystem_gets_a_smaller_store(
    small: Path, make_site: Callable[..., Site], caplog: pytest.LogCaptureFixture
) -> None:
    """More sessions than fit: all of them work, in memory or in PostgreSQL."""
    make_site(small / "sessions", STORE_SIZE=256 * MIB)
    session = SessionStore()
    session["x"] = "first"
    session.save()

    status = get_runtime().store.status()
    assert 40 * MIB < status.size <= 48 * MIB
    assert "not the 256 MiB of STORE_SIZE" in caplog.text
    keys = []
    for number in range(3000):
        other = SessionStore()
        other["x"] = f"{number}" + "x" * 20_000
        other.save()
        keys.append(other.session_key)

    assert [SessionStore(key)["x"][:4] for key in keys[::500]] == [
        f"{number}xxxx"[:4] for number in range(0, 3000, 500)
    ]
    assert SessionStore(session.session_key)["x"] == "first"


def test_the_filesystem_fills_up_behind_our_back(
    small: Path, make_site: Callable[..., Site]
) -> None:
    """Every page of the map was allocated before: writing goes on."""
    make_site(small / "sessions", STORE_SIZE=16 * MIB)
    session = SessionStore()
    session["n"] = 0
    session.save()
    _fill(small)

    for number in range(5000):
        session["n"] = number
        session["x"] = "x" * (number % 3000)
        session.save()

    get_runtime().flusher.flush_once(time.time(), everything=True)
    assert Session.objects.get().get_decoded()["n"] == 4999


def test_a_full_filesystem_is_a_clear_error(small: Path, make_site: Callable[..., Site]) -> None:
    make_site(small / "sessions")
    _fill(small)
    session = SessionStore()
    session["n"] = 1

    with pytest.raises(StoreUnavailableError, match="Make room, or name another"):
        session.save()


def _fill(place: Path) -> None:
    with suppress(OSError), (place / "ballast").open("wb", buffering=0) as ballast:
        while ballast.write(bytes(MIB)):
            pass
