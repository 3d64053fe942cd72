"""What a configuration is made from: the nodes, and how visitors and checks get there.

Called by `manage.py sessionproxy`. Invariant: whatever a `Plan` holds can stand in a
configuration file as it is; what could end a word, a line or a block there is refused.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from ipaddress import IPv6Address
from typing import Final

MOST_NODES: Final = 50  # for nginx, the configuration grows with their square
MAX_PORT: Final = 65_535
NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,39}", re.ASCII)
COOKIE: Final = re.compile(r"[A-Za-z][A-Za-z0-9_]{0,63}", re.ASCII)
PATH: Final = re.compile(
    r"/[A-Za-z0-9/_.~-]{1,200}", re.ASCII
)  # not "/": visitors get no answer there
HOST: Final = re.compile(r"[A-Za-z0-9]([A-Za-z0-9.-]{0,251}[A-Za-z0-9])?", re.ASCII)


class PlanError(ValueError):
    """A configuration cannot be made of this; the message says what is wrong."""


@dataclass(frozen=True, slots=True)
class Node:
    """A host with web processes, as the director knows it."""

    name: str
    """Short and public: it stands in the visitors' cookies."""
    address: str
    """HOST:PORT; an IPv6 address in brackets."""

    @classmethod
    def parse(cls, text: str) -> Node:
        """Return the node of `NAME=HOST:PORT`.

        Raises:
            PlanError: It is not of that form.
        """
        name, equals, address = text.partition("=")
        if not equals:
            raise PlanError(f"{text!r} is not a node; write NAME=HOST:PORT, as in web1=10.0.0.1:80")
        if not NAME.fullmatch(name):
            raise PlanError(
                f"{name!r} is not a name for a node: up to 40 letters, digits, dots, hyphens and "
                "underscores; it will be seen by visitors."
            )
        return cls(name, parse_address(address))


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """All that a configuration says about one site."""

    nodes: tuple[Node, ...]
    listen: str
    """HOST:PORT where visitors come in; the host may be `*`."""
    health_path: str
    cookie: str
    """The name of the cookie that says which node a visitor belongs to."""
    host: str
    """The Host header of the checks: Django refuses those it does not know."""
    draining: frozenset[str] = frozenset()
    """Names of nodes that get no new visitors."""
    secure: bool = False
    """The visitors come by HTTPS alone, so the cookie is not to be sent otherwise."""


def make_plan(
    *,
    nodes: Iterable[str],
    listen: str,
    health_path: str,
    cookie: str,
    host: str,
    draining: Iterable[str] = (),
    secure: bool = False,
    taken: Iterable[str] = (),
) -> Plan:
    """Return the plan that these words of the command line ask for.

    A node is `NAME=HOST:PORT`; `taken` are cookies that the site uses for something else.

    Raises:
        PlanError: Something does not make sense.
    """
    found = tuple(map(Node.parse, nodes))
    _check_nodes(found)
    drained = frozenset(draining)
    if unknown := drained - {node.name for node in found}:
        raise PlanError(f"There is no node called {', '.join(sorted(unknown))} to drain.")
    if found and drained == {node.name for node in found}:
        raise PlanError("All nodes are to be drained: nobody would be left for new visitors.")
    _check(PATH, health_path, "is not a path for the health check, such as /healthz")
    _check(COOKIE, cookie, "is not a name for a cookie: letters, digits and underscores")
    _check(HOST, host, "is not a host name")
    if cookie.lower() in {name.lower() for name in taken}:
        raise PlanError(f"The site uses the cookie {cookie!r} for something else.")
    return Plan(
        nodes=found,
        listen=parse_address(listen, is_bound=True),
        health_path=health_path,
        cookie=cookie,
        host=host,
        draining=drained,
        secure=secure,
    )


def parse_address(text: str, *, is_bound: bool = False) -> str:
    """Return `HOST:PORT` if that is what `text` is.

    With `is_bound` it may also be `PORT`, `:PORT` or `*:PORT`, for all addresses of the host.

    Raises:
        PlanError: It is not.
    """
    host, _, port = text.rpartition(":")
    if not re.fullmatch(r"[1-9][0-9]{0,4}", port, re.ASCII) or int(port) > MAX_PORT:
        raise PlanError(f"{text!r} has no port from 1 to {MAX_PORT}; write HOST:PORT.")
    if is_bound and host in {"", "*"}:
        return f"*:{port}"
    if not HOST.fullmatch(host) and not _is_bracketed(host):
        raise PlanError(f"{text!r} is not an address; write HOST:PORT, or [::1]:PORT.")
    return f"{host}:{port}"


def _is_bracketed(host: str) -> bool:
    if not (host.startswith("[") and host.endswith("]")) or "%" in host:  # a zone may be anything
        return False
    try:
        IPv6Address(host[1:-1])
    except ValueError:
        return False
    return True


def _check(pattern: re.Pattern[str], value: str, complaint: str) -> None:
    if not pattern.fullmatch(value):
        raise PlanError(f"{value!r} {complaint}.")


def _check_nodes(nodes: tuple[Node, ...]) -> None:
    if not nodes:
        raise PlanError("There is no node; give each as --node NAME=HOST:PORT.")
    if len(nodes) > MOST_NODES:
        raise PlanError(f"{len(nodes)} nodes are more than the {MOST_NODES} that there may be.")
    for what in ("name", "address"):
        values = [getattr(node, what).lower() for node in nodes]
        twice = sorted({value for value in values if values.count(value) > 1})
        if twice:
            raise PlanError(f"Two nodes have the {what} {', '.join(twice)}.")
