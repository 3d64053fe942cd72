"""A bar that shows how far a command is, if somebody watches.

Used by commands that take long. Invariant: nothing is printed where nobody watches, so that
the log of a job has results only.
"""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Any, Final

BAR: Final = 40  # characters
PAUSE: Final = 0.1  # seconds between two signs of progress


class ProgressBar:
    """Shows a bar while its block lasts; only a number where the total is not known."""

    def __init__(self, output: Any, total: int | None) -> None:
        self._output = output
        self._total = total
        self._is_shown = sys.stderr.isatty()
        self._width = 0
        self._show_at = 0.0

    def __enter__(self) -> ProgressBar:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._width:
            self._write("")
            self._output.write("\r", ending="")

    def show(self, done: int) -> None:
        """Say that so many of the total are done."""
        if self._is_shown and time.monotonic() >= self._show_at:
            self._show_at = time.monotonic() + PAUSE
            self._write(bar(done, self._total))

    def _write(self, text: str) -> None:
        self._output.write(f"\r{text:<{self._width}}", ending="")
        self._width = len(text)


def bar(done: int, total: int | None) -> str:
    """Return the bar: `[####    ]  50%  50,000`."""
    if not total:
        return f"{done:,}"
    share = min(1.0, done / total)
    return f"[{'#' * int(share * BAR):<{BAR}}] {share:4.0%}  {done:,}"
