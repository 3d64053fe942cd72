"""The list of sessions in the admin: what memory has of its rows, columns, filters, search.

Used by `admin` alone. Invariant: the list leads to sessions by handles, and memory is asked
only about the rows of the page and about what is dirty.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from datetime import datetime
from itertools import islice
from typing import Any, Final
from urllib.parse import urlencode

from django.contrib import messages
from django.contrib.admin import ModelAdmin, SimpleListFilter, display
from django.contrib.admin.helpers import ACTION_CHECKBOX_NAME
from django.contrib.admin.utils import quote
from django.contrib.admin.views.main import ChangeList
from django.db.models import Q, QuerySet
from django.db.models.functions import Now
from django.http import HttpRequest
from django.urls import reverse
from django.utils.formats import date_format
from django.utils.html import format_html
from django.utils.safestring import SafeString
from django.utils.timesince import timesince, timeuntil
from django.utils.timezone import localtime, now
from django.utils.translation import gettext_lazy as _

from deferred_sessions.exceptions import DeferredSessionsError
from deferred_sessions.handles import SEARCHED, SHOWN
from deferred_sessions.record import TOMBSTONE
from deferred_sessions.runtime import get_runtime
from deferred_sessions.session_page import names_of, pages_of, users_like
from deferred_sessions.user_sessions import unsaved_sessions, write_sessions

NOTHING: Final = "-"
MINUTE: Final = 60.0  # seconds
LOOKED_AT: Final = 20_000  # dirty sessions; with more of them the list leaves some to the flusher
LONG: Final = re.compile(r"[0-9A-Za-z_-]{20,40}").fullmatch
_BEGINNING: Final = re.compile(r"[0-9A-Za-z_-]+").fullmatch


class SessionChangeList(ChangeList):
    """A page of the list; each of its sessions has a `page` and a `user_name`."""

    def get_queryset(
        self, request: HttpRequest, exclude_parameters: list[str | None] | None = None
    ) -> QuerySet[Any]:
        """Return the rows, after what PostgreSQL has never had was written."""
        try:
            write_sessions(list(_unknown_to_postgresql()), time.time())
        except DeferredSessionsError as error:
            messages.warning(request, str(error))
        return super().get_queryset(request, exclude_parameters)

    def get_results(self, request: HttpRequest) -> None:
        """Read the page, and what memory has of it."""
        super().get_results(request)
        sessions: list[Any] = list(self.result_list)
        pages = pages_of(sessions, time.time())
        names = names_of(page.user_id for page in pages)
        own = request.session.session_key
        for session, page in zip(sessions, pages, strict=True):
            if session.pk == own:
                page.name += f" ({_('you')})"
            session.page = page
            session.user_name = names.get(page.user_id, page.user_id)
        self.result_list = sessions

    def url_for_result(self, result: Any) -> str:
        """Return the address of a session: by its handle, not by its key."""
        return reverse(
            "admin:deferred_sessions_session_change",
            args=(quote(result.handle),),
            current_app=self.model_admin.admin_site.name,
        )


class SessionColumns:
    """The columns of the list; each gets a session with a `page`."""

    @display(description=_("session"))
    def name(self, session: Any) -> str:
        """Return how the key begins."""
        return str(session.page.name)

    @display(description=_("user"), ordering="user_id")
    def user(self, session: Any) -> str:
        """Return who is logged in, with a link to all of their sessions."""
        if not session.page.user_id:
            return NOTHING
        return format_html(
            '<a href="?{}">{}</a>',
            urlencode({"user_id__exact": session.page.user_id}),
            session.user_name,
        )

    @display(description=_("state"))
    def state(self, session: Any) -> str:
        """Return the state, as a badge."""
        state = session.page.state
        return format_html(
            '<span class="ds-state ds-{}" title="{}">{}</span>',
            state.value,
            state.meaning,
            state.label,
        )

    @display(description=_("last activity"), ordering="written_at")
    def active(self, session: Any) -> str:
        """Return when it was used."""
        return _moment(session.page.active_at, _("%s ago"), timesince)

    @display(description=_("created"), ordering="created_at")
    def created(self, session: Any) -> str:
        """Return when it was created."""
        return _moment(session.page.created_at, _("%s ago"), timesince)

    @display(description=_("expires"), ordering="expire_date")
    def expires(self, session: Any) -> str:
        """Return when it expires."""
        return _moment(session.page.expires_at, _("in %s"), timeuntil)

    @display(description=_("bytes"), ordering="stored_size")
    def size(self, session: Any) -> str:
        """Return how large it is."""
        return f"{session.page.size:,}"

    @display(description=_("written by"), ordering="owner")
    def node(self, session: Any) -> str:
        """Return the node."""
        return session.page.node or NOTHING

    @display(description=_("address"))
    def address(self, session: Any) -> str:
        """Return where it was used from."""
        client = session.page.client
        return client.address if client is not None and client.address else NOTHING

    @display(description=_("browser"))
    def browser(self, session: Any) -> str:
        """Return what the browser says it is."""
        client = session.page.client
        if client is None or not client.agent:
            return NOTHING
        return format_html('<span class="ds-agent" title="{0}">{0}</span>', client.agent)

    def action_checkbox(self, obj: Any) -> SafeString:
        """Return the checkbox of a row, with a handle in it."""
        return format_html(
            '<input type="checkbox" name="{}" value="{}" class="action-select" aria-label="{}">',
            ACTION_CHECKBOX_NAME,
            obj.handle,
            _("Select this session for an action"),
        )


class StateFilter(SimpleListFilter):
    """By what can be told of a session without looking at all of them."""

    title = _("state")
    parameter_name = "state"

    def lookups(self, request: HttpRequest, model_admin: ModelAdmin[Any]) -> Any:  # noqa: ARG002
        """Return the choices."""
        return [
            ("live", _("live")),
            ("expired", _("expired")),
            ("dirty", _("dirty on this host")),
        ]

    def queryset(self, request: HttpRequest, queryset: QuerySet[Any]) -> QuerySet[Any]:  # noqa: ARG002
        """Return the sessions in that state."""
        match self.value():
            case "live":
                return queryset.filter(expire_date__gt=Now())
            case "expired":
                return queryset.filter(expire_date__lte=Now())
            case "dirty":
                dirty = islice(unsaved_sessions(), LOOKED_AT)
                return queryset.filter(pk__in=[each.key for each in dirty])
        return queryset


class LoggedInFilter(SimpleListFilter):
    """By whether somebody is logged in."""

    title = _("logged in")
    parameter_name = "logged_in"

    def lookups(self, request: HttpRequest, model_admin: ModelAdmin[Any]) -> Any:  # noqa: ARG002
        """Return the choices."""
        return [("yes", _("Yes")), ("no", _("No"))]

    def queryset(self, request: HttpRequest, queryset: QuerySet[Any]) -> QuerySet[Any]:  # noqa: ARG002
        """Return the sessions of users, or of visitors."""
        if self.value() in {"yes", "no"}:
            return queryset.filter(user_id__isnull=self.value() == "no")
        return queryset


class NodeFilter(SimpleListFilter):
    """By who wrote them last."""

    title = _("written by")
    parameter_name = "node"

    def lookups(self, request: HttpRequest, model_admin: ModelAdmin[Any]) -> Any:  # noqa: ARG002
        """Return the choices."""
        return [("here", _("this host")), ("elsewhere", _("others"))]

    def queryset(self, request: HttpRequest, queryset: QuerySet[Any]) -> QuerySet[Any]:  # noqa: ARG002
        """Return the sessions that this host wrote last, or did not."""
        runtime = get_runtime()
        if self.value() == "here":
            return queryset.filter(owner=runtime.server.owner())
        if self.value() == "elsewhere":
            return queryset.exclude(owner=runtime.server.owner())
        return queryset


class ServerFilter(SimpleListFilter):
    """By session server, where there are several; the first unless told otherwise."""

    title = _("session server")
    parameter_name = "server"

    def lookups(self, request: HttpRequest, model_admin: ModelAdmin[Any]) -> Any:  # noqa: ARG002
        """Return the choices; none, so that nothing is shown, where there is but one."""
        fleet = get_runtime().fleet
        return [] if fleet.only else [(server.alias, server.alias) for server in fleet.live()]

    def queryset(self, request: HttpRequest, queryset: QuerySet[Any]) -> QuerySet[Any]:  # noqa: ARG002
        """Return the sessions of that server."""
        live = {server.alias for server in get_runtime().fleet.live()}
        return queryset.using(self.value()) if self.value() in live else queryset


def matching(word: str) -> Q:
    """Return what finds the sessions of users like `word`, or whose key begins like it.

    Only `SEARCHED` characters of a key count, and not less than pages show: else whoever may
    see the list could find out keys, one character after the other.
    """
    users = {word, *users_like(word)}
    found = Q(user_id__in=users)
    dirty = islice(unsaved_sessions(), LOOKED_AT)
    if keys := [each.key for each in dirty if each.record.user_id in users]:
        found |= Q(pk__in=keys)
    if len(word) >= SHOWN and _BEGINNING(word):
        found |= Q(pk__startswith=word[:SEARCHED])
    return found


def looks_like_a_key(word: str) -> bool:
    """Tell whether somebody may have searched for a whole key."""
    return LONG(word) is not None


def _unknown_to_postgresql() -> Iterator[str]:
    for dirty in islice(unsaved_sessions(), LOOKED_AT):
        if not dirty.head.stored_version and not dirty.head.flags & TOMBSTONE:
            yield dirty.key


def _moment(at: datetime, form: Any, distance: Callable[..., str]) -> SafeString:
    """Return how far a time is away, with the time itself to be had by pointing at it."""
    is_now = abs((at - now()).total_seconds()) < MINUTE
    return format_html(
        '<span class="ds-moment" title="{}">{}</span>',
        date_format(localtime(at), "DATETIME_FORMAT"),
        _("just now") if is_now else form % distance(at, depth=1),
    )
