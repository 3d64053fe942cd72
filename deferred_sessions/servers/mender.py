"""Brings the rows of one server into line with those of the others, a page at a time.

Used by `resync`, which says which page is next. Invariant: of all rows of a session the newest
one wins, by fence, version and expiry; and a session that was deleted at its authority comes
back from nowhere: whoever was deleted while its row was on the way is removed where it arrived.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Final, NamedTuple

from deferred_sessions.servers.shelf import Shelf, Stamp
from deferred_sessions.servers.standing import IN
from deferred_sessions.servers.view import Rank, View

MARGIN: Final = 600.0  # seconds by which the clocks of two servers may differ


class Tally(NamedTuple):
    """What one page came to."""

    looked_at: int = 0
    copied: int = 0
    """Rows that were missing or older somewhere, and are there now."""
    removed: int = 0
    """Rows that had no business where they were."""

    def __add__(self, other: object) -> Tally:
        if not isinstance(other, Tally):
            return NotImplemented
        return Tally(*map(sum, zip(self, other, strict=True)))


class Page(NamedTuple):
    """A page that is done."""

    after: str | int
    """Where the next one begins."""
    tally: Tally
    is_last: bool = False


class Mender:
    """Compares and repairs under one view of the servers.

    Every method raises ServerUnavailableError if one of the servers is away, and
    RowLockedError if somebody holds a row; the page can be repeated then.
    """

    def __init__(
        self,
        shelves: Mapping[str, Shelf],
        view: View,
    ) -> None:
        self._shelves = shelves
        self._view = view
        self._ranked = view.placement.ranked

    def delete(self, source: str, target: str, after: int, since: float) -> Page:
        """Remove from `target` what was deleted elsewhere since then, as `source` has it."""
        found = self._shelves[source].deletions(after, since - MARGIN)
        keys = {deletion.key for deletion in found if deletion.key}
        gone = self._without_row(self._filled(keys, target))
        shelf = self._shelves[target]
        removed = shelf.remove(shelf.stamps(gone))
        truncated_at = max((each.made_at for each in found if each.key is None), default=None)
        if truncated_at is not None:
            removed += self._truncate(source, target, truncated_at)
        last = max((deletion.number for deletion in found), default=after)
        return Page(last, Tally(len(found), 0, removed), not found)

    def fill(self, source: str, target: str, after: str, most: int = 1) -> Page:
        """Copy to `target` what it lacks of the sessions whose authority is `source`.

        Up to so many pages; one is read while the one before is written.
        """
        origin, shelf, tally = self._shelves[source], self._shelves[target], Tally()
        page, theirs = self._read(source, target, after)
        while page and most:
            most -= 1
            missing, older = _lacking(theirs, shelf)
            sent = {key: theirs[key] for key in missing}
            with shelf.receiving(origin.fetch([*missing, *older])) as transfer:
                looked_at, after = len(page), max(page)
                if most:
                    page, theirs = self._read(source, target, after)
            copied = transfer.rows - self._take_back(origin, shelf, sent)
            tally += Tally(looked_at, copied)
        return Page(after, tally, not page)

    def _read(
        self, source: str, target: str, after: str
    ) -> tuple[dict[str, Stamp], dict[str, Stamp]]:
        """Return the next page of `source`, and what of it is to be on `target`."""
        page = self._shelves[source].page(after)
        return page, {key: page[key] for key in self._filled(page, target, source)}

    def tidy(self, source: str, after: str, now: float, *, mend: bool = True) -> Page:
        """Make all homes of the sessions on `source` have what it has, and remove its strays.

        Without `mend`, only count.
        """
        page = self._shelves[source].page(after)
        homes = {key: self._view.homes(self._ranked(key)) for key in page}
        dead = self._dead(source, page, homes, now)
        stamps = {key: page[key] for key in page.keys() - dead}
        copied = 0
        for target in sorted({home for places in homes.values() for home in places} - {source}):
            wanted = {key: stamp for key, stamp in stamps.items() if target in homes[key]}
            if mend:
                copied += self._deliver(source, wanted, target)
            else:
                copied += sum(map(len, _lacking(wanted, self._shelves[target])))
        strays = {key: page[key] for key in page if key in dead or source not in homes[key]}
        removed = self._shelves[source].remove(strays) if mend else len(strays)
        return Page(max(page, default=after), Tally(len(page), copied, removed), not page)

    # Inside

    def _filled(self, keys: Iterable[str], target: str, source: str = "") -> list[str]:
        """Return those of `keys` of which `target`, which is filling, is to be a home.

        With a `source`, only those that this one is the authority of.
        """
        fitting: dict[Rank, bool] = {}
        found = []
        for key in keys:
            rank = self._ranked(key)
            if rank not in fitting:
                fitting[rank] = self._is_filled(rank, target, source)
            if fitting[rank]:
                found.append(key)
        return found

    def _is_filled(self, rank: Rank, target: str, source: str) -> bool:
        if source not in ("", self._view.authority(rank)):
            return False
        before = rank[: rank.index(target)] if target in rank else ()
        return target in rank and len(self._view.trusted.intersection(before)) < self._view.copies

    def _deliver(self, source: str, stamps: Mapping[str, Stamp], target: str) -> int:
        """Copy what `target` lacks of these; return how many rows that were."""
        origin, shelf = self._shelves[source], self._shelves[target]
        missing, older = _lacking(stamps, shelf)
        with shelf.receiving(origin.fetch([*missing, *older])) as transfer:
            pass
        return transfer.rows - self._take_back(origin, shelf, {key: stamps[key] for key in missing})

    def _take_back(self, origin: Shelf, shelf: Shelf, sent: Mapping[str, Stamp]) -> int:
        """Remove from `shelf` what was deleted while it was on its way; return how many."""
        suspects = origin.missing(sent) | shelf.ended(sent)
        if not suspects:
            return 0
        arrived = shelf.stamps(suspects)  # perhaps later rows: what was said is asked again
        void = origin.missing(arrived) | shelf.ended(arrived)
        return shelf.remove({key: arrived[key] for key in void})

    def _dead(
        self,
        source: str,
        page: Mapping[str, Stamp],
        homes: Mapping[str, tuple[str, ...]],
        now: float,
    ) -> set[str]:
        """Return whose row is missing at the authority, because it was deleted or has expired.

        In disorder, also who was deleted elsewhere: where it had been before.
        """
        dead: set[str] = set()
        for authority, keys in _grouped(page, lambda key: homes[key][0]).items():
            if authority == source:
                continue
            missing = self._shelves[authority].missing(keys)
            dead |= {key for key in missing if page[key].expires_at <= now}
            since = self._view.since(authority) if self._view.phase(authority) == IN else math.inf
            dead |= self._shelves[authority].ended({key: page[key] for key in missing}, since)
        if not self._view.is_in_order:
            for alias in self._shelves.keys() - {source}:
                missing = self._shelves[alias].missing(page)
                dead |= self._shelves[alias].ended_since({key: page[key] for key in missing})
        return dead

    def _without_row(self, keys: Iterable[str]) -> set[str]:
        """Return those of `keys` that their authority has no row of."""
        gone: set[str] = set()
        places = _grouped(keys, lambda key: self._view.authority(self._ranked(key)))
        for authority, theirs in places.items():
            gone |= self._shelves[authority].missing(theirs)
        return gone

    def _truncate(self, source: str, target: str, made_at: float) -> int:
        """Remove from `target` what `source` had when somebody emptied it, and has no more."""
        shelf, after, removed = self._shelves[target], "", 0
        while page := shelf.page(after):
            after = max(page)
            old = {key for key, stamp in page.items() if stamp.written_at < made_at}
            theirs = self._filled(old, target, source)
            removed += shelf.remove({key: page[key] for key in self._without_row(theirs)})
        return removed


def _lacking(stamps: Mapping[str, Stamp], shelf: Shelf) -> tuple[list[str], list[str]]:
    """Return what `shelf` has no row of, and of what an older one."""
    there = shelf.stamps(stamps)
    missing = [key for key in stamps if key not in there]
    return missing, [key for key, stamp in there.items() if stamp.is_behind(stamps[key])]


def _grouped(keys: Iterable[str], place: Callable[[str], str]) -> dict[str, set[str]]:
    """Return `keys` by what `place` says of each."""
    groups: dict[str, set[str]] = {}
    for key in keys:
        groups.setdefault(place(key), set()).add(key)
    return groups
