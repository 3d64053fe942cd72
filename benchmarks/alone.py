"""What leases add to each request of a node that is alone, as a share of its work on the session.

A session that is loaded from memory is looked at once more: was this node found dead since it
came there, and has it been heard of lately? Nothing is added to a save. The same two looks are
timed by themselves, because there is no engine without them to compare with.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from benchmarks.cycles import SESSIONS, SIZES, change_and_save, load_only, per_cycle
from benchmarks.engines import OURS, engine
from benchmarks.measure import Goal, Scale, Table, median, ratio, take_turns
from benchmarks.sessions import stored

CYCLES = 2_000
LOOKS = "the looks"
KINDS = {"load + change + save": change_and_save, "load only": load_only}


def measure(scale: Scale) -> Iterator[Table | Goal]:
    """Yield the share, and the figures behind it."""
    from deferred_sessions.memory.pulse import moment  # noqa: PLC0415 - needs Django to be set up
    from deferred_sessions.runtime import get_runtime  # noqa: PLC0415

    scale.progress("what leases add")
    store, pulse = engine(OURS), get_runtime().pulse
    keys = [stored(store, SIZES[0]) for _ in range(SESSIONS)]

    def looks(cycles: int) -> None:
        for _ in range(cycles):
            pulse.doubts(1.0, moment())

    def nothing(cycles: int) -> None:
        for _ in range(cycles):
            pass

    def of_looks() -> float:
        pulse.beat(moment())  # as an agent does each second
        return per_cycle(looks, CYCLES) - per_cycle(nothing, CYCLES)

    candidates = {LOOKS: of_looks} | {
        kind: partial(per_cycle, partial(work, store, keys), CYCLES) for kind, work in KINDS.items()
    }
    take_turns(candidates, 1)  # to warm up
    figures = take_turns(candidates, scale.of(31, 7))
    rows = [(name, f"{median(times) * 1e6:.2f}") for name, times in figures.items()]
    yield Table(f"what leases add to a request, {SIZES[0]} bytes", ("work", "µs"), rows)
    kind, *_ = KINDS
    share, (least, most) = ratio(figures, LOOKS, kind)
    spread = 100 * least, 100 * most
    yield Goal(f"share of leases in {kind}", 100 * share, 2, spread=spread, unit=" %")
