"""How things are timed and compared, for a machine that is busy with other things.

Invariant: what is compared takes turns within each round, so that a disturbance hits
both; a ratio is the ratio of the medians over all rounds, with the spread of the ratios
of the rounds.
"""

from __future__ import annotations

import gc
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

Figures = dict[str, list[float]]


@dataclass(frozen=True)
class Table:
    """Rows of text below a header, and what they show."""

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]

    def __str__(self) -> str:
        widths = [max(map(len, column)) for column in zip(self.header, *self.rows, strict=True)]

        def line(cells: Sequence[str]) -> str:
            first, *rest = (cell.ljust(width) for cell, width in zip(cells, widths, strict=True))
            numbers = [cell.strip().rjust(len(cell)) for cell in rest]
            return f"| {' | '.join([first, *numbers])} |"

        rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
        lines = [line(self.header), f"| {' | '.join(rule)} |", *map(line, self.rows)]
        return "\n".join([f"### {self.title}", "", *lines])


@dataclass(frozen=True)
class Goal:
    """A figure that is to be reached."""

    what: str
    reached: float
    limit: float
    is_least: bool = False
    """The limit is the least that will do; else the most."""
    spread: tuple[float, float] | None = None
    unit: str = ""

    @property
    def is_met(self) -> bool:
        """Tell whether it was reached."""
        return self.reached >= self.limit if self.is_least else self.reached <= self.limit

    def row(self) -> tuple[str, str, str, str]:
        """Return the goal as a row of the summary."""
        sign = "≥" if self.is_least else "≤"
        reached = f"{self.reached:.2f}{self.unit}"
        if self.spread is not None:
            reached += f" ({self.spread[0]:.2f} to {self.spread[1]:.2f})"
        wanted = f"{sign} {self.limit:g}{self.unit}"
        return self.what, wanted, reached, "yes" if self.is_met else "NO"


@dataclass(frozen=True)
class Plot:
    """Bars to be drawn, one for each name; longer is worse, unless told otherwise."""

    name: str
    title: str
    bars: Mapping[str, float]
    unit: str
    is_logarithmic: bool = False


@dataclass
class Scale:
    """How thorough to be."""

    quick: bool = False
    begun: float = field(default_factory=time.monotonic)

    def of(self, thorough: int, quick: int) -> int:
        """Return the number for this run."""
        return quick if self.quick else thorough

    def progress(self, text: str) -> None:
        """Say what is being done, to people who watch."""
        print(f"  {time.monotonic() - self.begun:5.0f} s  {text}", file=sys.stderr, flush=True)


def take_turns(candidates: Mapping[str, Callable[[], float]], rounds: int) -> Figures:
    """Let each candidate measure itself once per round; return all its figures."""
    figures: Figures = {name: [] for name in candidates}
    for _ in range(rounds):
        for name, candidate in candidates.items():
            gc.collect()
            figures[name].append(candidate())
    return figures


def seconds(work: Callable[[], object]) -> float:
    """Return how long `work` takes."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def median(figures: Sequence[float]) -> float:
    """Return the median."""
    return statistics.median(figures)


def medians(figures: Figures) -> dict[str, float]:
    """Return the median of each candidate."""
    return {name: median(values) for name, values in figures.items()}


def ratio(figures: Figures, name: str, control: str) -> tuple[float, tuple[float, float]]:
    """Return the ratio of two candidates' medians, and the range of most rounds' ratios."""
    rounds = sorted(a / b for a, b in zip(figures[name], figures[control], strict=True))
    edge = len(rounds) // 10
    spread = rounds[edge], rounds[len(rounds) - 1 - edge]
    return median(figures[name]) / median(figures[control]), spread
