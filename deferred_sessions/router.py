"""Keeps the tables of sessions on the session servers, and others away from there.

    DATABASE_ROUTERS = ["deferred_sessions.router.SessionRouter"]

Called by Django for each query of a model and each step of a migration; needed where
`SERVERS` names another database than "default". Invariant: it has no say about other models
in a database that the project uses for other things, too, so that routers may be combined:
whatever a router before this one says, stands.
"""

from __future__ import annotations

from typing import Any, Final

from django.core.exceptions import ImproperlyConfigured
from django.db import DEFAULT_DB_ALIAS
from django.db.models import Model

from deferred_sessions.conf import get_settings

APP: Final = "deferred_sessions"


class SessionRouter:
    """Says which database our models are in, and what is made in a session server."""

    def db_for_read(self, model: type[Model], **_: Any) -> str | None:
        """Return the first session server for our models."""
        return next(iter(_servers()), None) if _is_ours(model) else None

    def db_for_write(self, model: type[Model], **_: Any) -> str | None:
        """Return the first session server for our models."""
        return self.db_for_read(model)

    def allow_migrate(self, db: str, app_label: str, **_: Any) -> bool | None:
        """Allow our tables on the session servers only, and no others on those.

        "default" is never kept for the sessions alone, also when it holds them.
        """
        servers = _servers()
        if app_label == APP:
            return db in servers if servers else None
        return False if db in servers and db != DEFAULT_DB_ALIAS else None


def _servers() -> tuple[str, ...]:
    """Return the session servers; none if the settings have problems.

    Last those that are to be emptied. Django asks while it runs the checks, which will tell
    of the problems.
    """
    try:
        settings = get_settings()
    except ImproperlyConfigured:
        return ()
    return tuple(sorted(settings.servers, key=lambda name: name not in settings.weights))


def _is_ours(model: type[Model]) -> bool:
    return model._meta.app_label == APP  # noqa: SLF001 - public, whatever its name
