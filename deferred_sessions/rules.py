"""What each setting may be, and how to say what it must be.

Read by `conf`. Pure. Invariant: every setting has a rule; a value that passes its rule can be
used as it is.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from deferred_sessions.topology import is_servers

LOCKING: Final = ("merge", "exclusive", "last-write-wins")
MAX_BATCH_SIZE: Final = 10_000
MIN_STORE_SIZE: Final = 4 << 20
MAX_STORE_SIZE: Final = 64 << 30
MIN_JOURNAL_SIZE: Final = 1 << 20
MAX_SYNC_INTERVAL: Final = 60
MAX_INTERVAL: Final = 86_400  # seconds
MAX_PROXIES: Final = 10


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_whole(value: object, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _is_word(value: object, pattern: str) -> bool:
    return value is None or (
        isinstance(value, str) and re.fullmatch(pattern, value, re.ASCII) is not None
    )


def _is_names(value: object) -> bool:
    return isinstance(value, list | tuple) and all(isinstance(name, str) for name in value)


_SWITCH = (lambda value: isinstance(value, bool), "True or False")
_COUNT = (
    lambda value: value is None or _is_whole(value, 2),
    "None or a whole number of at least 2",
)
_PLACE = (
    lambda value: (
        value is None
        or (isinstance(value, str | Path) and Path(value).is_absolute() and "\0" not in str(value))
    ),
    "None or an absolute path",
)
RULES: Final[Mapping[str, tuple[Any, str]]] = {
    "FLUSH_INTERVAL": (
        lambda value: _is_number(value) and 0 < value <= MAX_INTERVAL,
        "a positive number of seconds, such as 60.0, and at most a day",
    ),
    "FLUSH_AFTER_UPDATES": _COUNT,
    "FLUSH_AFTER_REQUESTS": _COUNT,
    "FLUSH_AT_REQUEST_END": _SWITCH,
    "WRITE_ON_CREATE": _SWITCH,
    "WRITE_THROUGH_KEYS": (_is_names, "a list of session keys, such as ['_auth_user_id']"),
    "LOCKING": (
        lambda value: value in LOCKING,
        "'merge', 'exclusive' or 'last-write-wins'",
    ),
    "LOCK_TIMEOUT": (
        lambda value: _is_number(value) and 0 <= value <= MAX_INTERVAL,
        "a number of seconds, such as 10.0",
    ),
    "AGENT": _SWITCH,
    "CREATE_WHEN_DOWN": _SWITCH,
    "BATCH_SIZE": (
        lambda value: _is_whole(value, 1) and value <= MAX_BATCH_SIZE,
        f"a whole number from 1 to {MAX_BATCH_SIZE}",
    ),
    "DIRECTORY": _PLACE,
    "STORE_SIZE": (
        lambda value: _is_whole(value, MIN_STORE_SIZE) and value <= MAX_STORE_SIZE,
        f"a whole number of bytes, from {MIN_STORE_SIZE} (4 MiB) to {MAX_STORE_SIZE} (64 GiB)",
    ),
    "JOURNAL_DIRECTORY": _PLACE,
    "JOURNAL_SIZE": (
        lambda value: _is_whole(value, MIN_JOURNAL_SIZE) and value <= MAX_STORE_SIZE,
        f"a whole number of bytes, from {MIN_JOURNAL_SIZE} (1 MiB) to {MAX_STORE_SIZE} (64 GiB)",
    ),
    "JOURNAL_AGE": (
        lambda value: _is_number(value) and 0 < value <= MAX_INTERVAL,
        "a positive number of seconds, such as 300.0, and at most a day",
    ),
    "SYNC_INTERVAL": (
        lambda value: _is_number(value) and 0 <= value <= MAX_SYNC_INTERVAL,
        f"a number of seconds, such as 0.1, from 0 to {MAX_SYNC_INTERVAL}",
    ),
    "HEARTBEAT_INTERVAL": (
        lambda value: _is_number(value) and 0 < value <= MAX_INTERVAL,
        "a positive number of seconds, such as 1.0",
    ),
    "NODE_TIMEOUT": (
        lambda value: _is_number(value) and 0 < value <= MAX_INTERVAL,
        "a positive number of seconds, such as 10.0",
    ),
    "LISTEN": (
        lambda value: value is None or isinstance(value, str),
        "None or a database alias, such as 'direct'",
    ),
    "CACHE_SIZE": (lambda value: _is_whole(value, 0), "a whole number of sessions, 0 or more"),
    "NODE": (
        lambda value: _is_word(value, r"[A-Za-z0-9][A-Za-z0-9_.-]{0,39}"),
        "None or up to 40 letters, digits, dots, hyphens and underscores, such as 'web1'",
    ),
    "RECORD_CLIENT": _SWITCH,
    "TRUSTED_PROXIES": (
        lambda value: _is_whole(value, 0) and value <= MAX_PROXIES,
        f"the number of proxies, from 0 to {MAX_PROXIES}",
    ),
    "NODE_COOKIE": (
        lambda value: _is_word(value, r"[A-Za-z][A-Za-z0-9_]{0,63}"),
        "None or up to 64 letters, digits and underscores, such as 'sessionnode'",
    ),
    "IMPORT_ENGINE": (
        lambda value: _is_word(value, r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*"),
        "None or an engine, such as 'django.contrib.sessions.backends.db'",
    ),
    "SERVERS": (
        is_servers,
        "a list of different database aliases, such as ['default'], or a dictionary with weights",
    ),
    "SERVER_TIMEOUT": (
        lambda value: value is None or (_is_number(value) and 0 < value <= MAX_INTERVAL),
        "None or a positive number of seconds, such as 5.0",
    ),
    "COPIES": (lambda value: _is_whole(value, 1), "a whole number of copies, 1 or more"),
}
