"""What `SERVERS` and `COPIES` say: names, weights, and what can be wrong with them.

Called by `conf` with what stands in the settings. Pure. Invariant: what `is_servers` accepts,
`weights_of` understands, in the order in which it was written.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final

Servers = tuple[str, ...] | Mapping[str, float]
Databases = Mapping[str, Mapping[str, Any]]

PLACE: Final = ("HOST", "PORT", "NAME")  # what tells one database from another


def is_servers(value: object) -> bool:
    """Tell whether these are names of servers, each once, perhaps with weights."""
    if isinstance(value, Mapping):
        weights = list(value.values())
        return all(map(_is_name, value)) and all(map(_is_weight, weights)) and any(weights)
    if not isinstance(value, list | tuple) or not all(map(_is_name, value)):
        return False
    return len(value) == len(set(value)) > 0


def weights_of(servers: Servers) -> dict[str, float]:
    """Return how much each server is to hold compared with the others.

    Left out are those with weight 0, which are to be emptied.
    """
    if isinstance(servers, Mapping):
        return {name: float(weight) for name, weight in servers.items() if weight}
    return dict.fromkeys(servers, 1.0)


def server_problems(
    servers: Servers, copies: int, databases: Databases, kind: Callable[[str], str | None]
) -> Iterator[tuple[str, str, str]]:
    """Yield what is wrong, as code, message and hint.

    `kind` returns what a known database is if it is not PostgreSQL, else None.
    """
    places: dict[tuple[str, ...], str] = {}
    for name in servers:
        if name not in databases:
            yield (
                "E005",
                f"SERVERS names {name!r}, which is not in DATABASES.",
                f"Known: {', '.join(sorted(databases))}.",
            )
            continue
        if found := kind(name):
            yield (
                "E006",
                f"The database {name!r} is {found}, not PostgreSQL.",
                "Name PostgreSQL databases in DEFERRED_SESSIONS['SERVERS'].",
            )
        elif not databases[name].get("AUTOCOMMIT", True):
            yield (
                "E007",
                f"AUTOCOMMIT is off for the database {name!r}, so nobody commits what is flushed.",
                "Leave it on, or give the sessions an alias of their own in SERVERS.",
            )
        place = tuple(str(databases[name].get(part) or "") for part in PLACE)
        other = places.setdefault(place, name)
        if other != name:
            yield (
                "E025",
                f"SERVERS names {other!r} and {name!r}, which are the same database.",
                "Name each database once; two copies in one place are none.",
            )
    homes = len(weights_of(servers))
    if copies > homes:
        yield (
            "E024",
            f"COPIES is {copies}, but SERVERS names {homes}.",
            "Each copy needs a server of its own: add servers, or lower COPIES.",
        )


def fleet_problems(
    names: tuple[str, ...], databases: Databases, *, has_agent: bool
) -> Iterator[tuple[str, str, str]]:
    """Yield what is wrong only where there are several servers, as code, message and hint."""
    if not has_agent:
        yield (
            "E041",
            "SERVERS names several servers, but AGENT is off.",
            "Only agents find out that a server is away, and who takes over. Leave AGENT on.",
        )
    for name in names:
        options = databases.get(name, {}).get("OPTIONS", {})
        if name in databases and "connect_timeout" not in options:
            yield (
                "W042",
                f"DATABASES[{name!r}] has no connect_timeout: who connects waits for minutes.",
                "Set its OPTIONS to {'connect_timeout': 2}.",
            )


def _is_name(value: object) -> bool:
    return isinstance(value, str) and value != ""


def _is_weight(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < math.inf
