"""Keeps the tables of sessions on the session servers, and others away from there.

    DATABASE_ROUTERS = ["deferred_sessions.router.SessionRouter"]

Called by Django for each query of a model and each step of a migration; needed where
`SERVERS` names another database than "default". Invariant: it has no say about other models
in a database that the project uses for other things, too, so that routers may be combined:
whatever a router before this one says, stands.
"""

from __future__ import annotations

from typing import Any, Final

from django.db import DEFAULT_DB_ALIAS
from django.db.models import Model

from deferred_sessions.conf import get_settings

APP: Final = "deferred_sessions"


class SessionRouter:
    """Says which database our models are in, and what is made in a session server."""

    def db_for_read(self, model: type[Model], **_: Any) -> str | None:
        """Return the first session server for our models."""
        return get_settings().server if _is_ours(model) else None

    def db_for_write(self, model: type[Model], **_: Any) -> str | None:
        """Return the first session server for our models."""
        return get_settings().server if _is_ours(model) else None

    def allow_migrate(self, db: str, app_label: str, **_: Any) -> bool | None:
        """Allow our tables on the session servers only, and no others on those.

        "default" is never kept for the sessions alone, also when it holds them.
        """
        is_session_server = db in get_settings().weights
        if app_label == APP:
            return is_session_server
        return False if is_session_server and db != DEFAULT_DB_ALIAS else None


def _is_ours(model: type[Model]) -> bool:
    return model._meta.app_label == APP  # noqa: SLF001 - public, whatever its name
