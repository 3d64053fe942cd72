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
from hashlib import blake2b
from itertools import starmap
from pathlib import Path
from typing import Any, Final, NamedTuple, cast

from django.conf import settings as django_settings
from django.contrib.sessions.backends.base import SessionBase
from django.core import mail
from django.core.exceptions import ImproperlyConfigured
from django.core.signals import setting_changed
from django.db import DEFAULT_DB_ALIAS, connections
from django.utils.encoding import force_bytes
from django.utils.module_loading import import_string

from deferred_sessions.policy import Policy
from deferred_sessions.rules import RULES
from deferred_sessions.topology import Servers, fleet_problems, server_problems, weights_of

NAME: Final = "DEFERRED_SESSIONS"
ENGINE: Final = "deferred_sessions.backend"
MIDDLEWARE: Final = "deferred_sessions.middleware.SessionMiddleware"
SIGNED_COOKIES: Final = "django.contrib.sessions.backends.signed_cookies"  # has no keys
DJANGOS_MIDDLEWARE: Final = "django.contrib.sessions.middleware.SessionMiddleware"
ROUTER: Final = "deferred_sessions.router.SessionRouter"
SERVER_TIMEOUT: Final = 5.0  # seconds, where there are several servers


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
    """What happens when requests of one visitor overlap: one of `rules.LOCKING`."""
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
    node: str | None = None
    """The public name of this host among those of the site; None = host name and directory."""
    node_cookie: str | None = None
    """The cookie in which the middleware tells visitors that name; None = no cookie."""
    heartbeat_interval: float = 1.0
    """Seconds between heartbeats of this node."""
    node_timeout: float = 6.0
    """Seconds without one after which other nodes take over its sessions."""
    listen: str | None = None
    """An alias of the same database past a pooler, to LISTEN on; None = that of SERVERS."""
    import_engine: str | None = None
    """The engine that the site used before, whose sessions are taken over; None = none."""
    servers: Servers = (DEFAULT_DB_ALIAS,)
    """The database aliases that hold the sessions, perhaps with weights; see `weights`."""
    copies: int = 1
    """On how many of them each session is kept."""
    server_timeout: float | None = None
    """Seconds for a server to answer a statement; None = 5.0 with several, with one no limit."""

    @property
    def policy(self) -> Policy:
        """The thresholds in the form that the core uses."""
        return Policy(self.flush_interval, self.flush_after_updates, self.flush_after_requests)

    @property
    def weights(self) -> dict[str, float]:
        """How much each session server is to hold, by alias; without those to be emptied."""
        return weights_of(self.servers)

    @property
    def emptied(self) -> tuple[str, ...]:
        """The session servers that are to hold nothing any more: their weight is 0."""
        return tuple(name for name in self.servers if name not in self.weights)

    @property
    def server_deadline(self) -> float | None:
        """Seconds after which a session server that does not answer has failed; None: never."""
        if self.server_timeout is None and len(self.servers) > 1:
            return SERVER_TIMEOUT
        return self.server_timeout

    @property
    def server(self) -> str:
        """The database alias of the first session server."""
        return next(iter(self.weights))


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
    for key, (is_valid, wanted) in RULES.items():
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
    yield from starmap(
        Problem,
        server_problems(settings.servers, settings.copies, django_settings.DATABASES, _other_kind),
    )
    if settings.listen is not None and settings.listen not in django_settings.DATABASES:
        yield Problem(
            "E009",
            f"{NAME}['LISTEN'] names {settings.listen!r}, which is not in DATABASES.",
            f"Known: {', '.join(sorted(django_settings.DATABASES))}.",
        )
    if settings.node_timeout < 3 * settings.heartbeat_interval:
        yield Problem(
            "E010",
            f"NODE_TIMEOUT ({settings.node_timeout:g} s) is less than three times "
            f"HEARTBEAT_INTERVAL ({settings.heartbeat_interval:g} s).",
            "A node that is merely slow would lose its sessions: raise NODE_TIMEOUT.",
        )
    if settings.locking == "exclusive" and MIDDLEWARE not in django_settings.MIDDLEWARE:
        yield Problem(
            "E008",
            f"LOCKING is 'exclusive', but MIDDLEWARE lacks {MIDDLEWARE!r}.",
            "It gives a session back when its request ends. Put it in the place of Django's.",
        )
    yield from _node_cookie_relations(settings)
    if settings.import_engine is not None and not _is_other_engine(settings.import_engine):
        yield Problem(
            "E031",
            f"IMPORT_ENGINE is {settings.import_engine!r}, which is not an engine whose sessions "
            "could be taken over.",
            "Name what SESSION_ENGINE was before, such as 'django.contrib.sessions.backends.db'.",
        )
    if not is_in_use():
        yield Problem(
            "W001",
            f"SESSION_ENGINE is {django_settings.SESSION_ENGINE!r}, so deferred_sessions "
            "is installed but not used.",
            f"Set SESSION_ENGINE = {ENGINE!r}.",
        )

    if len(settings.servers) > 1:
        found = fleet_problems(
            tuple(settings.servers), django_settings.DATABASES, has_agent=settings.agent
        )
        yield from starmap(Problem, found)
    if settings.server != DEFAULT_DB_ALIAS and ROUTER not in django_settings.DATABASE_ROUTERS:
        yield Problem(
            "W022",
            f"SERVERS names {settings.server!r}, but DATABASE_ROUTERS lacks {ROUTER!r}.",
            "Without it the model looks for sessions in the default database.",
        )


def _other_kind(alias: str) -> str | None:
    connection = connections[alias]
    return None if connection.vendor == "postgresql" else str(connection.display_name)


def _node_cookie_relations(settings: Settings) -> Iterator[Problem]:
    if settings.node_cookie is None:
        return
    if settings.node is None:
        yield Problem(
            "E021",
            "NODE_COOKIE is set, but NODE is not, so the cookie would have nothing to say.",
            "Give each node its name as in the director's configuration, such as 'web1'.",
        )
    if settings.node_cookie in site().cookies:
        yield Problem(
            "E022",
            f"NODE_COOKIE is {settings.node_cookie!r}, a cookie that Django uses.",
            "Name another one, such as 'sessionnode'.",
        )
    if MIDDLEWARE not in django_settings.MIDDLEWARE:
        yield Problem(
            "E023",
            f"NODE_COOKIE is set, but MIDDLEWARE lacks {MIDDLEWARE!r}, which sets the cookie.",
            "Put it in the place of Django's.",
        )


def _is_other_engine(name: str) -> bool:
    """Tell whether `name` is an engine that keeps sessions, and not this one."""
    try:
        store = session_store(name)
    except ImproperlyConfigured:
        return False
    return name not in (ENGINE, SIGNED_COOKIES) and issubclass(store, SessionBase)


def names_asgi() -> bool:
    """Tell whether the settings say that the site is served by ASGI."""
    return bool(getattr(django_settings, "ASGI_APPLICATION", None))


def has_djangos_middleware() -> bool:
    """Tell whether Django's own middleware saves the sessions."""
    return DJANGOS_MIDDLEWARE in django_settings.MIDDLEWARE


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
        if isinstance(values.get(name), list):
            values[name] = tuple(values[name])
    return Settings(**values)


def is_in_use() -> bool:
    """Tell whether this project's sessions are ours: installed, and named as the engine."""
    return bool(django_settings.SESSION_ENGINE == ENGINE)


def traits() -> dict[str, tuple[str, ...]]:
    """Return in what nodes have to agree to read each other's sessions.

    Of each trait first what this node writes, then what else it can read.
    """
    keys = (django_settings.SECRET_KEY, *django_settings.SECRET_KEY_FALLBACKS)
    digests = (blake2b(force_bytes(key), digest_size=6, person=b"ds-traits") for key in keys)
    return {
        "SESSION_SERIALIZER": (django_settings.SESSION_SERIALIZER,),
        "SECRET_KEY": tuple(digest.hexdigest() for digest in digests),
    }


def saves_every_request() -> bool:
    """Tell whether a session is saved at the end of each request that has one."""
    return bool(django_settings.SESSION_SAVE_EVERY_REQUEST)


class Site(NamedTuple):
    """What Django's settings say about how the site is reached."""

    host: str
    """A name that ALLOWED_HOSTS allows."""
    cookies: tuple[str, ...]
    """The names that are taken."""


def site() -> Site:
    """Return how the site is reached."""
    named = [host.lstrip(".") for host in django_settings.ALLOWED_HOSTS if host.strip(".*")]
    cookies = (
        django_settings.SESSION_COOKIE_NAME,
        django_settings.CSRF_COOKIE_NAME,
        django_settings.LANGUAGE_COOKIE_NAME,
        "messages",
    )
    return Site(named[0] if named else "localhost", cookies)


def cookie_attributes() -> dict[str, Any]:
    """Return how a cookie is set that goes where the session's goes, until the browser ends."""
    return {
        "domain": django_settings.SESSION_COOKIE_DOMAIN,
        "path": django_settings.SESSION_COOKIE_PATH,
        "secure": django_settings.SESSION_COOKIE_SECURE or None,
        "httponly": True,
        "samesite": django_settings.SESSION_COOKIE_SAMESITE,
    }


def session_serializer() -> Any:
    """Return the class that SESSION_SERIALIZER names."""
    return import_string(django_settings.SESSION_SERIALIZER)


def session_store(engine: str) -> type[SessionBase]:
    """Return the class of an engine, as SESSION_ENGINE names it.

    Raises:
        ImproperlyConfigured: There is no such engine.
    """
    try:
        store: type[SessionBase] = import_string(f"{engine}.SessionStore")
    except ImportError as error:
        raise ImproperlyConfigured(f"There is no session engine {engine!r}: {error}") from error
    return store


def longest_life() -> float:
    """Return for how many seconds a session lives that nobody uses, by default."""
    return float(django_settings.SESSION_COOKIE_AGE)


def is_under_test() -> bool:
    """Tell whether Django's test environment is set up, which puts an outbox into `mail`."""
    return hasattr(mail, "outbox")


def _forget(*, setting: str, **_: object) -> None:
    if setting == NAME:
        get_settings.cache_clear()


setting_changed.connect(_forget, dispatch_uid="deferred_sessions.conf")
