"""For the tests of projects: a session store of its own for each test.

Imported by users' tests, never by the package. Invariant: what a test leaves in memory no
other test sees, and nothing is left on the disk.

The store is made in a temporary directory when the test uses its first session, so that a
test without sessions pays nothing.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from django.test import override_settings

from deferred_sessions.conf import NAME, raw_settings
from deferred_sessions.report import FlushReport
from deferred_sessions.runtime import get_runtime

try:
    import pytest
except ImportError:  # only the fixture needs it
    if not TYPE_CHECKING:
        pytest = None

if TYPE_CHECKING:
    from django.test import SimpleTestCase as _TestCase
else:
    _TestCase = object

SIZE = 4 << 20  # bytes; the smallest there is


@contextmanager
def own_sessions() -> Iterator[None]:
    """Give the block a store of its own, empty at first, gone afterwards."""
    with tempfile.TemporaryDirectory(prefix="sessions-of-a-test-") as place:
        project: Any = raw_settings()
        own = {"STORE_SIZE": SIZE, **project, "DIRECTORY": f"{place}/store"}
        with override_settings(**{NAME: own}):
            yield  # changing the setting back closes the store


def flush_sessions(*, everything: bool = True) -> FlushReport:
    """Write what is dirty, or what is due, to PostgreSQL, as the poller does; say what was.

    Within a test that is rolled back, such as Django's `TestCase`, it is written in the
    transaction of the test, and stays dirty in memory.
    """
    return get_runtime().flusher.flush_once(time.time(), everything=everything)


class CleanSessionsMixin(_TestCase):
    """For Django's test cases: `class CartTests(CleanSessionsMixin, TestCase)`."""

    def setUp(self) -> None:
        """Begin with an empty store."""
        self.enterContext(own_sessions())
        super().setUp()

    def flush_sessions(self, *, everything: bool = True) -> FlushReport:
        """Do what the poller does; see `flush_sessions` of this module."""
        return flush_sessions(everything=everything)


if pytest is not None:

    @pytest.fixture
    def clean_sessions() -> Iterator[Any]:
        """Begin with an empty store; the value is `flush_sessions`."""
        with own_sessions():
            yield flush_sessions
