"""Settings: one dictionary, read once, checked in one place.

    DEFERRED_SESSIONS = {"FLUSH_INTERVAL": 30.0, "FLUSH_AFTER_UPDATES": 10}

This is the only reader of `django.conf.settings` in the package. `manage.py check`
reports what `problems` finds and `get_settings` refuses to start on it, so both agree
by construction.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Final, NamedTuple, cast

from django.conf import settings as django_settings
from django.core import mail
from django.core.exceptions import ImproperlyConfigured
from django.core.signals import setting_changed
from django.db import DEFAULT_DB_ALIAS, connections
from django.utils.module_loading import import_string

from deferred_sessions.policy import Policy

NAME: Final = "DEFERRED_SESSIONS"
ENGINE: Final = "deferred_sessions.backend"
MIN_STORE_SIZE: Final = 4 << 20
MAX_STORE_SIZE: Final = 64 << 30
MIDDLEWARE: Final = "deferred_sessions.middleware.SessionMiddleware"
LOCKING: Final = ("merge", "exclusive", "last-write-wins")
MIN_JOURNAL_SIZE: Final = 1 << 20
MAX_SYNC_INTERVAL: Final = 60
MAX_BATCH_SIZE: Final = 10_000
MAX_INTERVAL: Final = 86_400  # seconds
MAX_PROXIES: Final = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Everything a project may tune; the defaults suit one busy host."""

    flush_interval: float = 60.0
    """Seconds since a session's last write to PostgreSQL after which it is written again."""
    flush_after_updates: int | None = 50
    """Updates since then after which it is written; None = no such threshold."""
    flush_after_requests: int | None = None
    """Requests since then after which it is written; None = no such threshold."""
    flush_at_request_end: bool = False
    """Also write a session that is due at the end of a request that used it."""
    write_on_create: bool = True
    """Insert a new session into PostgreSQL at once."""
    write_through_keys: tuple[str, ...] = (
        "_auth_user_id",
        "_auth_user_backend",
        "_auth_user_hash",
        "_session_expiry",
    )
    """Keys whose change is written at once: login, logout, expiry."""
    locking: str = "merge"
    """What happens when requests of one visitor overlap: one of `LOCKING`."""
    lock_timeout: float = 10.0
    """Seconds to wait for a session, or a portion of it, that somebody else holds."""
    agent: bool = True
    """Have the web processes elect one that does the node's background duties."""
    create_when_down: bool = True
    """Keep new sessions in memory while PostgreSQL is away; off: creating one fails."""
    batch_size: int = 250
    """Sessions per transaction of the flusher."""
    directory: Path | None = None
    """Where the host store lives; None = a private directory in shared memory."""
    store_size: int = 256 << 20
    """Bytes of the host store."""
    journal_directory: Path | None = None
    """Where the logs are from which memory is rebuilt after a crash of the host; None = none."""
    journal_size: int = 64 << 20
    """Bytes after which the log is swapped; four times that is the most it takes."""
    journal_age: float = 300.0
    """Seconds after which it is swapped at the latest."""
    sync_interval: float = 0.1
    """Seconds of changes that a crash of the host may cost; 0 = each save waits for the disk."""
    cache_size: int = 10_000
    """Decoded sessions each process keeps."""
    record_client: bool = False
    """Have the middleware note address and browser in sessions that are saved."""
    trusted_proxies: int = 0
    """Proxies of the site's own in front of it, which tell whom they heard a request from."""
    servers: tuple[str, ...] = (DEFAULT_DB_ALIAS,)
    """The database alias that holds the sessions; exactly one in this version."""

    @property
    def policy(self) -> Policy:
        """The thresholds in the form that the core uses."""
        return Policy(self.flush_interval, self.flush_after_updates, self.flush_after_requests)

    @property
    def server(self) -> str:
        """The database alias of the session server."""
        return self.servers[0]


class Problem(NamedTuple):
    """One reason not to start; `code` becomes the id of a system check."""

    code: str
    message: str
    hint: str


def problems(raw: object) -> Iterator[Problem]:
    """Yield what is wrong with `raw`, the value of `settings.DEFERRED_SESSIONS`."""
    if not isinstance(raw, Mapping):
        yield Problem("E001", f"{NAME} must be a dictionary.", f"It is {raw!r}.")
        return
    known = sorted(field.name.upper() for field in fields(Settings))
    for key in raw:
        if key not in known:
            yield Problem("E002", f"{NAME}[{key!r}] is unknown.", f"Known: {', '.join(known)}.")
    for key, (is_valid, wanted) in _RULES.items():
        if key in raw and not is_valid(raw[key]):
            yield Problem("E003", f"{NAME}[{key!r}] is {raw[key]!r}.", f"It must be {wanted}.")


def relations() -> Iterator[Problem]:
    """Yield what is wrong between our settings and Django's; `problems` must be empty."""
    settings = get_settings()
    age = django_settings.SESSION_COOKIE_AGE
    if age < 2 * settings.flush_interval:
        yield Problem(
            "E004",
            f"SESSION_COOKIE_AGE ({age} s) is less than twice FLUSH_INTERVAL "
            f"({settings.flush_interval:g} s).",
            "A session could expire in PostgreSQL while it is in use: lower FLUSH_INTERVAL.",
        )
    alias = settings.server
    if alias not in django_settings.DATABASES:
        yield Problem(
            "E005",
            f"{NAME}['SERVERS'] names {alias!r}, which is not in DATABASES.",
            f"Known: {', '.join(sorted(django_settings.DATABASES))}.",
        )
    elif connections[alias].vendor != "postgresql":
        yield Problem(
            "E006",
            f"The database {alias!r} is {connections[alias].display_name}, not PostgreSQL.",
            "Name a PostgreSQL database in DEFERRED_SESSIONS['SERVERS'].",
        )
    elif not connections[alias].settings_dict.get("AUTOCOMMIT", True):
        yield Problem(
            "E007",
            f"AUTOCOMMIT is off for the database {alias!r}, so nobody commits what is flushed.",
            "Leave it on, or give the sessions an alias of their own in SERVERS.",
        )
    if settings.locking == "exclusive" and MIDDLEWARE not in django_settings.MIDDLEWARE:
        yield Problem(
            "E008",
            f"LOCKING is 'exclusive', but MIDDLEWARE lacks {MIDDLEWARE!r}.",
            "It gives a session back when its request ends. Put it in the place of Django's.",
        )
    if not is_in_use():
        yield Problem(
            "W001",
            f"SESSION_ENGINE is {django_settings.SESSION_ENGINE!r}, so deferred_sessions "
            "is installed but not used.",
            f"Set SESSION_ENGINE = {ENGINE!r}.",
        )


def raw_settings() -> object:
    """Return the value of `settings.DEFERRED_SESSIONS` as the project wrote it."""
    return getattr(django_settings, NAME, {})


@functools.cache
def get_settings() -> Settings:
    """Return the settings of this process.

    Raises:
        ImproperlyConfigured: At least one problem; the message lists all of them.
    """
    raw = raw_settings()
    if found := [f"{problem.message} {problem.hint}" for problem in problems(raw)]:
        raise ImproperlyConfigured(" ".join(found))
    values = {key.lower(): value for key, value in cast("dict[str, Any]", raw).items()}
    for name in ("directory", "journal_directory"):
        if values.get(name) is not None:
            values[name] = Path(values[name])
    for name in ("servers", "write_through_keys"):
        if name in values:
            values[name] = tuple(values[name])
    return Settings(**values)


def is_in_use() -> bool:
    """Tell whether this project's sessions are ours: installed, and named as the engine."""
    return bool(django_settings.SESSION_ENGINE == ENGINE)


def saves_every_request() -> bool:
    """Tell whether a session is saved at the end of each request that has one."""
    return bool(django_settings.SESSION_SAVE_EVERY_REQUEST)


def session_serializer() -> Any:
    """Return the class that SESSION_SERIALIZER names."""
    return import_string(django_settings.SESSION_SERIALIZER)


def store_identity() -> str:
    """Return which project and database a host store belongs to.

    Not the secret key, which may be rotated, nor a path, which may change with each
    release: neither may part a project from its unflushed sessions.
    """
    database = connections[get_settings().server].settings_dict
    place = "/".join(str(database.get(part) or "") for part in ("HOST", "PORT", "NAME"))
    return f"{project()}@{place}"


@functools.cache
def project() -> str:
    """Return the name of the project: its ROOT_URLCONF when Django started.

    Tests change that setting, but are still the same project.
    """
    return str(django_settings.ROOT_URLCONF)


def is_under_test() -> bool:
    """Tell whether Django's test environment is set up, which puts an outbox into `mail`."""
    return hasattr(mail, "outbox")


def _forget(*, setting: str, **_: object) -> None:
    if setting == NAME:
        get_settings.cache_clear()


setting_changed.connect(_forget, dispatch_uid="deferred_sessions.conf")


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_whole(value: object, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


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
_RULES: Final[Mapping[str, tuple[Any, str]]] = {
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
    "CACHE_SIZE": (lambda value: _is_whole(value, 0), "a whole number of sessions, 0 or more"),
    "RECORD_CLIENT": _SWITCH,
    "TRUSTED_PROXIES": (
        lambda value: _is_whole(value, 0) and value <= MAX_PROXIES,
        f"the number of proxies, from 0 to {MAX_PROXIES}",
    ),
    "SERVERS": (
        lambda value: _is_names(value) and len(value) == 1,
        "a list with one database alias, such as ['default']",
    ),
}
