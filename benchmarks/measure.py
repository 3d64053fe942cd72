"""How things are timed and compared, for a machine that is busy with other things.

Invariant: what is compared takes turns within each round, so that a disturbance hits
both; a ratio is the ratio of the medians over all rounds.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Mapping, Sequence


def take_turns(
    candidates: Mapping[str, Callable[[], float]], rounds: int
) -> dict[str, list[float]]:
    """Let each candidate measure itself once per round; return all its figures."""
    figures: dict[str, list[float]] = {name: [] for name in candidates}
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


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table, aligned for people who read it as text."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]

    def line(cells: Sequence[str]) -> str:
        first, *rest = (cell.ljust(width) for cell, width in zip(cells, widths, strict=True))
        numbers = [cell.strip().rjust(len(cell)) for cell in rest]
        return f"| {' | '.join([first, *numbers])} |"

    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    return "\n".join([line(header), f"| {' | '.join(rule)} |", *map(line, rows)])
