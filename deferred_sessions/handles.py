"""Names for sessions that may be shown: whoever has the key of a session has the session.

Used by pages that list sessions. Invariant: from what is made here nobody gets back to the
key, not even with many of them; only PostgreSQL and memory know keys, and cookies.
"""

from __future__ import annotations

from typing import Final

from django.utils.crypto import salted_hmac

SHOWN: Final = 4  # characters of a key that pages show; 21 of its 165 bits
SEARCHED: Final = 8  # characters that a search may go by: more would be a way to guess keys
SALT: Final = "deferred_sessions.handles"
DIGITS: Final = 32  # of the keyed digest, hexadecimal


def shortened(key: str) -> str:
    """Return the beginning of `key`, for people: enough to tell a few sessions apart."""
    return f"{key[:SHOWN]}…"


def handle_of(key: str) -> str:
    """Return what stands for `key` in addresses and forms.

    The beginning of the key, by which its row is found, and a digest with SECRET_KEY, by
    which it is told from the others that begin like it.
    """
    digest = salted_hmac(SALT, key, algorithm="sha256").hexdigest()
    return f"{key[:SHOWN]}.{digest[:DIGITS]}"


def beginning_of(handle: str) -> str | None:
    """Return how the key of `handle` begins; None if it is no handle."""
    beginning, dot, digest = handle.partition(".")
    return beginning if dot and len(beginning) == SHOWN and len(digest) == DIGITS else None
