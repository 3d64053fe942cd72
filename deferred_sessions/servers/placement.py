"""Which session servers hold a key: rendezvous hashing, weighted.

Called by whatever has more than one session server to choose from. Each server draws a
number for each key; the highest draws hold it. Invariant: what a server draws for a key
depends on their names and its weight alone, so all nodes agree without a word, and a server
that comes or goes moves only the keys that are its own.

Highest random weight is Thaler and Ravishankar's (1998); that a draw of -weight / ln(u) gives
each server its share of the keys is Schindelhauer and Schomaker's logarithmic method (2005).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import lru_cache
from hashlib import blake2b
from typing import Final

BITS: Final = 52  # of a weighted draw; with a half added it is exact, never 0 and never 1
REMEMBERED: Final = 1 << 15  # ranks, some 5 MB, in each process that has several servers


class Placement:
    """Ranks named servers for each key; made once, and shared by threads."""

    def __init__(self, weights: Mapping[str, float]) -> None:
        """Take the servers by name, with how much each is to hold compared with the others.

        Renaming a server moves its keys; the order of the names means nothing.

        Raises:
            ValueError: There is no server, or a weight that is not a positive number.
        """
        if not weights:
            raise ValueError("There is no session server to place sessions on.")
        for name, weight in weights.items():
            if not 0 < weight < math.inf:
                raise ValueError(f"The weight of {name!r} is {weight!r}; it must be positive.")
        self.names = tuple(sorted(weights))
        self._are_equal = len(set(weights.values())) == 1
        self._servers = [(name, weights[name], _beginning(name)) for name in self.names]
        self._orders: dict[tuple[str, ...], tuple[str, ...]] = {}
        self.remembered = lru_cache(REMEMBERED)(self.ranked)
        """Does what `ranked` does, and knows the ranks of the sessions asked for last."""

    def ranked(self, key: str) -> tuple[str, ...]:
        """Return all servers in the order in which they are to hold `key`."""
        if len(self.names) == 1:
            return self.names
        data = key.encode()
        ranking = []
        for name, weight, beginning in self._servers:
            hashed = beginning.copy()
            hashed.update(data)
            draw = int.from_bytes(hashed.digest(), "little")
            ranking.append((draw if self._are_equal else _weighted(draw, weight), name))
        ranking.sort(reverse=True)
        order = tuple([name for _, name in ranking])
        return self._orders.setdefault(order, order)  # or each would be remembered by itself


def _weighted(draw: int, weight: float) -> float:
    return -weight / math.log(((draw >> (64 - BITS)) + 0.5) / (1 << BITS))


def _beginning(name: str) -> blake2b:
    """Return a hash that has begun with the server; of one length, whatever its name."""
    return blake2b(blake2b(name.encode(), digest_size=16).digest(), digest_size=8)


@lru_cache(maxsize=8)
def placement_of(servers: tuple[tuple[str, float], ...]) -> Placement:
    """Return the placement by these names and weights; the same one each time."""
    return Placement(dict(servers))
