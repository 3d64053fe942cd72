"""The tables that people look at: sessions, nodes, and writes that were refused.

Read by people, the admin and Django's own tools; the package itself goes through
`servers.sql`. Invariant: no index stands on a column that slides with every write,
so that a flush is a HOT update that touches no index.

The table has one column more, `expire_day`, which PostgreSQL keeps (migration 0002). As
a field here it would make Django's checks connect to the database.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from datetime import datetime
from functools import reduce
from operator import or_
from typing import TYPE_CHECKING, Any, ClassVar, Self

from django.contrib.sessions.base_session import AbstractBaseSession, BaseSessionManager
from django.db import models
from django.db.models.functions import Now
from django.utils.translation import gettext_lazy as _

from deferred_sessions.exceptions import ServerUnavailableError
from deferred_sessions.handles import beginning_of, handle_of, shortened
from deferred_sessions.runtime import get_runtime
from deferred_sessions.user_sessions import end_sessions, user_id_of, write_sessions_of

if TYPE_CHECKING:
    from deferred_sessions.backend import SessionStore


class SessionQuerySet(models.QuerySet["Session"]):
    """Sessions as PostgreSQL has them, for people and their tools."""

    def for_user(self, user: Any) -> Self:
        """Return the live sessions of `user`, a user or an id.

        What this host's memory has of them, and PostgreSQL lacks, is written first: so
        they are as they are now, also those that began a moment ago. (What other hosts
        have not written may lag behind; that never is who is logged in.)

        Raises:
            ServerUnavailableError: PostgreSQL is away.
        """
        user_id, now = user_id_of(user), time.time()
        if not user_id:
            return self.none()
        known = type(self)(self.model, using=self.db).filter(user_id=user_id)
        write_sessions_of(user_id, known.values_list("pk", flat=True), now)
        return self.filter(user_id=user_id, expire_date__gt=Now())

    def revoke(self) -> int:
        """End these sessions at once, on all hosts; return how many there were.

        Unlike `delete` it needs no agent to take effect on this host, and while PostgreSQL
        goes away meanwhile, memory remembers.
        """
        return end_sessions(self.order_by().values_list("pk", flat=True), time.time())

    def by_handles(self, handles: Iterable[str]) -> Self:
        """Return those sessions that `handles` stand for, see `Session.handle`."""
        wanted = {handle: beginning_of(handle) for handle in handles}
        beginnings = [models.Q(pk__startswith=b) for b in set(wanted.values()) if b is not None]
        if not beginnings:
            return self.none()
        keys = self.filter(reduce(or_, beginnings)).order_by().values_list("pk", flat=True)
        return self.filter(pk__in=[key for key in keys if handle_of(key) in wanted])

    def by_handle(self, handle: str) -> Session | None:
        """Return the session that `handle` stands for; None if it is gone."""
        return self.by_handles([handle]).first()


class SessionManager(BaseSessionManager.from_queryset(SessionQuerySet)):  # type: ignore[misc]
    """`Session.objects`: what `SessionQuerySet` does, and what Django's manager does."""

    def get_queryset(self) -> SessionQuerySet:
        """Return the sessions of the database that has them, whatever routers say."""
        sessions: SessionQuerySet = super().get_queryset()
        return sessions if self._db else sessions.using(get_runtime().server.alias)

    def of_user(self, user: Any) -> list[Session]:
        """Return the live sessions of `user`, on whichever session server they are.

        What `for_user` is for a single server.

        Raises:
            ServerUnavailableError: A server is away that is not known to be out.
        """
        found: dict[str, Session] = {}
        for alias in self._places():
            for session in self.using(alias).for_user(user):
                known = found.get(session.pk)
                if known is None or known.position < session.position:
                    found[session.pk] = session
        return list(found.values())

    def on_any_server(self, handle: str) -> Session | None:
        """Return the session that `handle` stands for, on whichever server it is."""
        found = (self.using(alias).by_handle(handle) for alias in self._places())
        return next(filter(None, found), None)

    def revoke_all(self, user: Any, keep: str | None = None) -> int:
        """Log `user` out everywhere, but for the session of the key `keep`; return how often.

        For a change of password, a lost phone, or "log out everywhere else":

            Session.objects.revoke_all(request.user, keep=request.session.session_key)

        Raises:
            ServerUnavailableError: PostgreSQL is away, so nobody knows which they are; or one of
                several servers is out that may have more. Then those of the others have ended.
        """
        keys = {
            key
            for alias in self._places()
            for key in self.using(alias).for_user(user).values_list("pk", flat=True)
        }
        ended = end_sessions(sorted(keys - {keep}), time.time())
        if not get_runtime().fleet.has_all():
            raise ServerUnavailableError(
                f"{ended} sessions were ended, but a session server is out, and may have others: "
                "repeat that when it is back."
            )
        return ended

    @staticmethod
    def _places() -> list[str]:
        """Return the servers that may have sessions, and can be asked."""
        fleet = get_runtime().fleet
        return [server.alias for server in (*fleet.live(), *fleet.leaving())]


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

    objects: ClassVar[SessionManager] = SessionManager()

    class Meta(AbstractBaseSession.Meta):
        """Names, and which databases have the table at all."""

        abstract = False
        required_db_vendor = "postgresql"
        db_table = "deferred_sessions_session"
        permissions = (("view_session_data", "Can view what is in sessions"),)
        indexes = (
            # HOT updates stay: who is logged in does not change when a session is written.
            models.Index(
                fields=["user_id"],
                name="deferred_sessions_user",
                condition=models.Q(user_id__isnull=False),
            ),
        )

    def __str__(self) -> str:
        return shortened(self.session_key)  # the key itself is a secret

    @property
    def handle(self) -> str:
        """What may stand for the session in pages and addresses; see `by_handle`."""
        return handle_of(self.session_key)

    @property
    def position(self) -> tuple[int, int, datetime]:
        """What is higher the later a copy of the session is."""
        return self.fence, self.version, self.expire_date

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
