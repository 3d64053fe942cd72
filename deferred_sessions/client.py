"""Which address and which browser a session was used from, if that is to be recorded.

Called by the middleware with `RECORD_CLIENT`, and by pages that show it. It stands in the
session itself, under a key of ours. Invariant: it is written only along with a change of the
session, so it never costs a write of its own; and nothing of it is trusted.
"""

from __future__ import annotations

from collections.abc import Mapping
from ipaddress import ip_address
from typing import Any, Final, NamedTuple

KEY: Final = "_client"  # in the session; begins with "_", as those of Django do
MAX_AGENT: Final = 200  # characters


class Client(NamedTuple):
    """Where a session was used from."""

    address: str
    """An IPv4 or IPv6 address; "" if it is not known."""
    agent: str
    """What the browser says it is; "" if it says nothing."""

    @classmethod
    def of(cls, session: Mapping[str, Any]) -> Client | None:
        """Return what stands in `session`; None if nothing does."""
        text = session.get(KEY)
        if not isinstance(text, str):
            return None
        address, _, agent = text.partition(" ")
        return cls(address if address != "-" else "", agent)

    def text(self) -> str:
        """Return it as it stands in a session: one string, which costs a load nothing."""
        return f"{self.address or '-'} {self.agent}"


def client_of(headers: Mapping[str, Any], trusted_proxies: int) -> Client:
    """Return who sent a request, from its WSGI `headers` (`request.META`).

    Every proxy appends who it heard the request from to X-Forwarded-For. The last
    `trusted_proxies` entries were made by proxies of the site's own; what stands before
    them anybody can invent.
    """
    address = str(headers.get("REMOTE_ADDR", ""))
    if trusted_proxies:
        forwarded = str(headers.get("HTTP_X_FORWARDED_FOR", "")).split(",")
        if len(forwarded) >= trusted_proxies:
            address = forwarded[-trusted_proxies]
    agent = str(headers.get("HTTP_USER_AGENT", ""))
    printable = "".join(character for character in agent if character.isprintable())
    return Client(_address(address.strip()), printable[:MAX_AGENT].strip())


def _address(text: str) -> str:
    """Return `text` if it is an address, without a port; else nothing."""
    if text.startswith("["):
        text = text[1:].partition("]")[0]
    elif text.count(":") == 1:
        text = text.partition(":")[0]
    try:
        return str(ip_address(text))
    except ValueError:
        return ""
