"""Judges what visitors were told: nothing lost, nothing stale, nobody logged out.

Each visitor counts on an item of its own, so what it was told last is what must be found. A
read may never give less than what anybody was told before the read began. All processes
of a machine share the clock that this goes by.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from operator import itemgetter
from pathlib import Path
from typing import Any

Item = tuple[str, str]  # the key of a session, and the name of a visitor


@dataclass
class Verdict:
    """What the diaries say."""

    told: dict[Item, int] = field(default_factory=dict)
    """The last count that each visitor was told, in each session."""
    updates: int = 0
    reads: int = 0
    stale: list[str] = field(default_factory=list)
    logouts: list[str] = field(default_factory=list)
    errors: Counter[str] = field(default_factory=Counter)
    longest: float = 0.0
    """Seconds of the longest request."""
    last: float = 0.0
    """When the last update was acknowledged."""

    def wrong(self, sessions: Mapping[str, Mapping[str, int]]) -> list[str]:
        """Return what must never be, given the sessions that there are in the end."""
        return [*self.stale, *self.logouts, *self.lost(sessions)]

    def lost(self, sessions: Mapping[str, Mapping[str, int]]) -> list[str]:
        """Return what was told and is not in these sessions."""
        return [
            f"{key[:4]} {who}: told {count}, found {sessions.get(key, {}).get(who, 0)}"
            for (key, who), count in self.told.items()
            if sessions.get(key, {}).get(who, 0) < count
        ]

    def __str__(self) -> str:
        errors = ", ".join(f"{count} {name}" for name, count in self.errors.items())
        return (
            f"{self.updates} updates acknowledged, {self.reads} reads, "
            f"{len(self.stale)} stale, {len(self.logouts)} logged out, errors: {errors or 'none'}, "
            f"longest request {self.longest:.2f} s"
        )


def judge(*diaries: Path) -> Verdict:
    """Read the diaries."""
    pages = [page for diary in diaries for page in _pages(diary)]
    verdict = Verdict()
    for page in pages:
        verdict.longest = max(verdict.longest, page["ended"] - page["began"])
        if "error" in page:
            verdict.errors[page["error"].partition(":")[0]] += 1
        elif page["read"] is None:
            verdict.logouts.append(f"{page['who']} at {page['began']:.3f}")
    acknowledged = sorted((page for page in pages if "wrote" in page), key=itemgetter("ended"))
    reads = sorted((page for page in pages if page.get("read")), key=itemgetter("began"))
    verdict.updates, verdict.reads = len(acknowledged), len(reads)
    verdict.last = acknowledged[-1]["ended"] if acknowledged else 0.0
    done = iter([*acknowledged, None])
    nearest = next(done)
    for read in reads:
        while nearest is not None and nearest["ended"] < read["began"]:
            _tell(verdict.told, nearest)
            nearest = next(done)
        verdict.stale += _stale(verdict.told, read)
    while nearest is not None:
        _tell(verdict.told, nearest)
        nearest = next(done)
    return verdict


def _tell(told: dict[Item, int], page: Mapping[str, Any]) -> None:
    item = page["key"], page["who"]
    told[item] = max(told.get(item, 0), page["wrote"])


def _stale(told: Mapping[Item, int], page: Mapping[str, Any]) -> list[str]:
    """Return what this read should have known."""
    key, items = page["key"], page["read"]
    return [
        f"at {page['began']:.3f} {page['who']} read {items.get(who, 0)} of {who} in {key[:4]}, "
        f"who had been told {count}"
        for (session, who), count in told.items()
        if session == key and items.get(who, 0) < count
    ]


def _pages(diary: Path) -> list[dict[str, Any]]:
    """Return the lines; the last one may have been cut when its process was killed."""
    lines = diary.read_text().splitlines() if diary.exists() else []
    pages = []
    for line in lines:
        try:
            pages.append(json.loads(line))
        except ValueError:
            continue
    return pages
