"""Fixtures for all tests: a session store of one's own, and Django on top of it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from deferred_sessions.memory.store import HostStore
from deferred_sessions.runtime import Runtime, get_runtime, reset_runtime

MIB = 1 << 20


@pytest.fixture
def store(tmp_path: Path) -> Iterator[HostStore]:
    """A host store without Django."""
    store = HostStore(tmp_path / "store", size=8 * MIB, identity="tests")
    yield store
    store.close()


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """Where this test's sessions live."""
    return tmp_path / "sessions"


@pytest.fixture(autouse=True)
def _own_sessions(settings: Any, directory: Path) -> Iterator[None]:
    """Give every test a host store of its own."""
    settings.DEFERRED_SESSIONS = {"DIRECTORY": str(directory), "STORE_SIZE": 16 * MIB}
    yield
    reset_runtime()


@pytest.fixture
def runtime() -> Runtime:
    """The runtime as the settings of this test make it."""
    return get_runtime()


@pytest.fixture
def tune(settings: Any) -> Callable[..., Runtime]:
    """Change DEFERRED_SESSIONS; return the runtime that results."""

    def change(**changes: Any) -> Runtime:
        settings.DEFERRED_SESSIONS = {**settings.DEFERRED_SESSIONS, **changes}
        return get_runtime()

    return change


@pytest.fixture
def now() -> float:
    """The time at the start of the test."""
    return time.time()
