"""Draws the figures: one file for each plot, next to the tables."""

from __future__ import annotations

from pathlib import Path

import matplotlib as mpl
from matplotlib.figure import Figure

from benchmarks.engines import OURS
from benchmarks.measure import Plot

OUR_COLOUR, OTHERS = "#0b6e4f", "#b8c0cc"


def draw(plot: Plot, directory: Path) -> Path:
    """Write `plot` as an SVG file that is the same for the same figures."""
    mpl.rcParams["svg.hashsalt"] = plot.name
    figure = Figure(figsize=(7, 0.5 * len(plot.bars) + 1.2), layout="constrained")
    axes = figure.add_subplot()
    names = list(plot.bars)[::-1]
    values = [plot.bars[name] for name in names]
    colours = [OUR_COLOUR if name == OURS else OTHERS for name in names]
    bars = axes.barh(names, values, color=colours, log=plot.is_logarithmic)
    axes.bar_label(bars, [f"{value:,.4g}" for value in values], padding=3)
    axes.set_title(plot.title, loc="left")
    axes.set_xlabel(plot.unit)
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(x=0.15)
    path = directory / f"{plot.name}.svg"
    figure.savefig(path, metadata={"Date": None})
    return path
