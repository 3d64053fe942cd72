"""A request's work on its session, in one process: load, change, save; or load alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

from benchmarks.engines import CONTROL, NOTHING, OURS, REDIS, available, engine
from benchmarks.engines import ENGINES as CANDIDATES
from benchmarks.measure import (
    Figures,
    Goal,
    Plot,
    Scale,
    Table,
    medians,
    ratio,
    seconds,
    take_turns,
)
from benchmarks.sessions import Engine, stored

SIZES = (300, 3_000, 30_000)  # bytes of JSON
SESSIONS = 100
Work = Callable[[Engine, list[str], int], object]


def measure(scale: Scale) -> Iterator[Table | Goal | Plot]:
    """Yield a table for each kind of request."""
    for kind, work in {"load + change + save": change_and_save, "load only": load_only}.items():
        rows, smallest = [], {}
        for size in SIZES:
            scale.progress(f"{kind}, {size:,} bytes")
            figures = measure_size(work, size, scale)
            middle = medians(figures)
            smallest = smallest or middle
            rows += [
                (f"{size:,} bytes, {name}", f"{value * 1e6:,.1f}", f"{value / middle[CONTROL]:.2f}")
                for name, value in middle.items()
            ]
            yield from goals(kind, size, figures)
        title = f"{kind}, in one process"
        yield Table(title, ("session, engine", "µs", f"ratio to {CONTROL}"), rows)
        micro = {name: value * 1e6 for name, value in smallest.items() if name != NOTHING}
        name = "save" if work is change_and_save else "load"
        yield Plot(name, f"{kind}, {SIZES[0]} bytes", micro, "µs", is_logarithmic=True)


def goals(kind: str, size: int, figures: Figures) -> Iterator[Goal]:
    """Yield what is to be reached."""
    value, spread = ratio(figures, OURS, CONTROL)
    limit = 1.0 if kind == "load + change + save" else 0.6
    yield Goal(f"{kind}, {size:,} bytes, to {CONTROL}", value, limit, spread=spread)
    if REDIS in figures and limit == 1.0:
        value, spread = ratio(figures, REDIS, OURS)
        what = f"{kind}, {size:,} bytes, times faster than {REDIS}"
        yield Goal(what, value, 15, is_least=True, spread=spread)


def measure_size(work: Work, size: int, scale: Scale) -> Figures:
    """Return each engine's seconds per request, by round."""
    candidates = {}
    for name in available(quick=scale.quick):
        cycles = CANDIDATES[name].cycles * SIZES[0] * 3 // (SIZES[0] * 2 + size)
        store = engine(name)
        keys = [stored(store, size) for _ in range(SESSIONS)]
        cycles = max(1, cycles // scale.of(1, 4))
        candidates[name] = partial(per_cycle, partial(work, store, keys), cycles)
    take_turns(candidates, 1)  # to warm up
    return take_turns(candidates, scale.of(10, 2))


def per_cycle(work: Callable[[int], object], cycles: int) -> float:
    """Return the seconds per cycle."""
    return seconds(partial(work, cycles)) / cycles


def change_and_save(store: Engine, keys: list[str], cycles: int) -> None:
    """Do what a request does that changes its session."""
    for number in range(cycles):
        session = store(keys[number % SESSIONS])
        session["count"] = session["count"] + 1
        session.save()


def load_only(store: Engine, keys: list[str], cycles: int) -> None:
    """Do what a request does that only reads its session."""
    for number in range(cycles):
        store(keys[number % SESSIONS])["count"]
