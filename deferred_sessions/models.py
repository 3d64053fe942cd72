"""The tables that people look at: sessions, nodes, and writes that were refused.

Read by people, the admin and Django's own tools; the package itself goes through
`servers.sql`. Invariant: no index stands on a column that slides with every write,
so that a flush is a HOT update that touches no index.

The table has one column more, `expire_day`, which PostgreSQL keeps (migration 0002). As
a field here it would make Django's checks connect to the database.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from django.contrib.sessions.base_session import AbstractBaseSession
from django.db import models
from django.db.models.functions import Now
from django.utils.translation import gettext_lazy as _

if TYPE_CHECKING:
    from deferred_sessions.backend import SessionStore


class Session(AbstractBaseSession):
    """One session; `get_decoded()` returns its dictionary as of the last flush."""

    # The first three are Django's, here again for what we change in them: the order of
    # bytes needs no second index for LIKE, and the expiry has no index at all.
    session_key = models.CharField(
        _("session key"), max_length=40, primary_key=True, db_collation="C"
    )
    session_data = models.TextField(_("session data"))
    expire_date = models.DateTimeField(_("expire date"))
    version = models.BigIntegerField(
        _("version"), default=1, db_default=1, help_text=_("Grows with each change.")
    )
    fence = models.BigIntegerField(
        _("fence"),
        default=0,
        db_default=0,
        help_text=_("Grows when another node may write; older writers are refused."),
    )
    owner = models.TextField(
        _("owner"), null=True, editable=False, help_text=_("The node that may change it.")
    )
    user_id = models.CharField(
        _("user id"), max_length=255, null=True, help_text=_("Who is logged in, if anybody.")
    )
    created_at = models.DateTimeField(_("created at"), db_default=Now())
    written_at = models.DateTimeField(_("written at"), db_default=Now())

    class Meta(AbstractBaseSession.Meta):
        """Names, and which databases have the table at all."""

        abstract = False
        required_db_vendor = "postgresql"
        db_table = "deferred_sessions_session"

    @classmethod
    def get_session_store_class(cls) -> type[SessionStore]:
        """Return the engine that decodes `session_data`."""
        from deferred_sessions.backend import SessionStore  # noqa: PLC0415 - circular

        return SessionStore


class Node(models.Model):
    """One incarnation of a host's memory, and when it was last heard of."""

    node = models.TextField(_("node"), primary_key=True, db_collation="C")
    beat = models.BigIntegerField(_("heartbeats"), db_default=0)
    started_at = models.DateTimeField(_("started at"), db_default=Now())
    beat_at = models.DateTimeField(_("last heartbeat"), db_default=Now())
    died_at = models.DateTimeField(_("found dead at"), null=True)
    traits = models.JSONField(_("traits"), db_default={})

    class Meta:
        """Names, and which databases have the table at all."""

        required_db_vendor = "postgresql"
        db_table = "deferred_sessions_node"
        verbose_name = _("node")
        verbose_name_plural = _("nodes")

    def __str__(self) -> str:
        """Return the name of the node."""
        return self.node.partition("#")[0]


class RefusedWrite(models.Model):
    """What a node wanted to write after its session had passed to another."""

    session_key = models.CharField(_("session key"), max_length=40)
    node = models.TextField(_("node"))
    fence = models.BigIntegerField(_("fence"))
    version = models.BigIntegerField(_("version"))
    changed_keys = models.JSONField(_("changed keys"))
    session_data = models.TextField(_("session data"))
    owner = models.TextField(_("owner"))
    owner_fence = models.BigIntegerField(_("fence of the owner"))
    refused_at = models.DateTimeField(_("refused at"), db_default=Now())

    class Meta:
        """Names, and which databases have the table at all."""

        required_db_vendor = "postgresql"
        db_table = "deferred_sessions_refused_write"
        verbose_name = _("refused write")
        verbose_name_plural = _("refused writes")

    def __str__(self) -> str:
        """Return what was refused; not the session key, which is a secret."""
        return f"version {self.version} of a session, by {self.node.partition('#')[0]}"
