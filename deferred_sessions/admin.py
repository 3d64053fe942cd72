"""The admin: every session with the state it is in, and the dashboard.

Found by Django's admin if that is installed. Invariant: a session key never leaves the
server. Pages, addresses, forms and log entries have a handle in its place (see `handles`);
so nothing of Django's own pages that would show a primary key is left in use.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Final, cast

from django.contrib import admin, messages
from django.contrib.admin.helpers import ACTION_CHECKBOX_NAME
from django.contrib.admin.models import CHANGE, DELETION, LogEntry
from django.contrib.admin.options import IS_POPUP_VAR, TO_FIELD_VAR
from django.contrib.admin.utils import quote, unquote
from django.contrib.contenttypes.models import ContentType
from django.core.exceptions import PermissionDenied
from django.db.models import Func, IntegerField, QuerySet
from django.http import HttpRequest, HttpResponse, HttpResponseRedirect, JsonResponse
from django.template.response import TemplateResponse
from django.urls import path, reverse
from django.utils.translation import gettext_lazy as _
from django.utils.translation import ngettext

from deferred_sessions import dashboard
from deferred_sessions.exceptions import DeferredSessionsError, ServerUnavailableError
from deferred_sessions.handles import SEARCHED
from deferred_sessions.models import Session, SessionQuerySet
from deferred_sessions.runtime import get_runtime
from deferred_sessions.session_list import (
    LoggedInFilter,
    NodeFilter,
    ServerFilter,
    SessionChangeList,
    SessionColumns,
    StateFilter,
    looks_like_a_key,
    matching,
)
from deferred_sessions.session_page import SessionPage, names_of, pages_of
from deferred_sessions.user_sessions import end_sessions, write_sessions

DATA_PERMISSION: Final = "deferred_sessions.view_session_data"
LOOKUPS: Final = frozenset(
    {"user_id__exact", "created_at__gte", "created_at__lt", "state", "logged_in", "node", "server"}
)
TEMPLATES: Final = "admin/deferred_sessions/session"
STORED_SIZE: Final = Func(
    "session_data", function="OCTET_LENGTH", output_field=IntegerField()
)  # known without reading the data, unlike the number of characters


@admin.register(Session)
class SessionAdmin(SessionColumns, admin.ModelAdmin):  # type: ignore[type-arg]
    """Lists sessions, shows one, writes and ends them."""

    list_filter = (ServerFilter, StateFilter, LoggedInFilter, NodeFilter, "created_at")
    search_fields = ("user_id",)
    search_help_text = _("User name or id; or the first 4 to 8 characters of a key.")
    ordering = ("-written_at",)
    list_per_page = 50
    list_max_show_all = 200
    show_full_result_count = False
    actions = ("flush_now", "revoke", "revoke_all_of_user")
    change_list_template = f"{TEMPLATES}/change_list.html"

    class Media:
        """What the list looks like."""

        css: Final = {"all": ["deferred_sessions/admin.css"]}

    # Addresses and permissions

    def get_urls(self) -> list[Any]:
        """Return the addresses of our pages; Django's for single objects are not among them."""
        wrap: Callable[[Any], Any] = self.admin_site.admin_view
        return [
            path("", wrap(self.changelist_view), name="deferred_sessions_session_changelist"),
            path("dashboard/", wrap(self.dashboard_view), name="deferred_sessions_dashboard"),
            path("figures.json", wrap(self.figures_view), name="deferred_sessions_figures"),
            path(
                "<path:object_id>/change/",
                wrap(self.change_view),
                name="deferred_sessions_session_change",
            ),
        ]

    def has_add_permission(self, request: HttpRequest, *_: Any) -> bool:  # noqa: ARG002
        """Sessions are made by visitors."""
        return False

    def get_actions(self, request: HttpRequest, action_location: Any = None) -> dict[str, Any]:
        """Return our actions; Django's deletion shows primary keys."""
        options = {} if action_location is None else {"action_location": action_location}
        actions: dict[str, Any] = super().get_actions(request, **options)
        return {name: action for name, action in actions.items() if name in self.actions}

    def lookup_allowed(self, lookup: str, value: str, request: Any = None) -> bool:  # noqa: ARG002
        """Allow what our filters and links ask for; any lookup of keys or data would tell them."""
        return lookup in LOOKUPS

    # The list

    def get_queryset(self, request: HttpRequest) -> QuerySet[Session]:
        """Return the rows, without their data unless that is needed."""
        sessions: Any = super().get_queryset(request).annotate(stored_size=STORED_SIZE)
        found: QuerySet[Session] = sessions if _records_client() else sessions.defer("session_data")
        return found

    def get_list_display(self, request: HttpRequest) -> Any:  # noqa: ARG002
        """Return the columns."""
        columns = ["name", "user", "state", "active", "created", "expires", "size", "node"]
        return [*columns, "address", "browser"] if _records_client() else columns

    def get_changelist(self, request: HttpRequest, **_: Any) -> type[SessionChangeList]:  # noqa: ARG002
        """Return the list that looks into memory."""
        return SessionChangeList

    def get_search_results(
        self,
        request: HttpRequest,  # noqa: ARG002
        queryset: QuerySet[Any],
        search_term: str,
    ) -> tuple[QuerySet[Any], bool]:
        """Return the sessions of users like this, or whose key begins like this."""
        for word in search_term.split():
            queryset = queryset.filter(matching(word))
        return queryset, False

    def changelist_view(
        self, request: HttpRequest, extra_context: dict[str, Any] | None = None
    ) -> HttpResponse:
        """Show the list; a search for a whole key is cut, so that it stands in no page."""
        if IS_POPUP_VAR in request.GET or TO_FIELD_VAR in request.GET:
            raise PermissionDenied  # Django's pop-up for foreign keys has primary keys in it
        words = request.GET.get("q", "").split()
        if any(map(looks_like_a_key, words)):
            query = request.GET.copy()
            query["q"] = " ".join(w[:SEARCHED] if looks_like_a_key(w) else w for w in words)
            return HttpResponseRedirect(f"{request.path}?{query.urlencode()}")
        context = {"title": _("Sessions"), **(extra_context or {})}
        return super().changelist_view(request, context)

    # Actions

    def response_action(
        self,
        request: HttpRequest,
        queryset: QuerySet[Any],
        action_location: Any = None,  # noqa: ARG002 - Django's, for its own pages
    ) -> HttpResponse | None:
        """Do an action on the sessions whose handles were selected."""
        names = request.POST.getlist("action")
        index = request.POST.get("index", "0")
        place = int(index) if index.isdecimal() and int(index) < len(names) else 0
        name = names[place] if names else ""
        if name not in self.get_actions(request):
            self.message_user(request, _("No action selected."), messages.WARNING)
            return HttpResponseRedirect(request.get_full_path())
        selected = request.POST.getlist(ACTION_CHECKBOX_NAME)
        if request.POST.get("select_across") != "1":
            queryset = cast("SessionQuerySet", queryset).by_handles(selected)
        answer: HttpResponse | None = getattr(self, name)(request, queryset)
        return answer or HttpResponseRedirect(request.get_full_path())

    @admin.action(permissions=["change"], description=_("Write to PostgreSQL now"))
    def flush_now(self, request: HttpRequest, queryset: QuerySet[Any]) -> None:
        """Write what PostgreSQL lacks of the selected sessions."""
        sessions = list(queryset)
        try:
            report = write_sessions([session.pk for session in sessions], time.time())
        except ServerUnavailableError as error:
            self.message_user(request, str(error), messages.ERROR)
            return
        self._log(request, sessions, CHANGE, "Written to PostgreSQL.")
        text = ngettext("%d session was written.", "%d sessions were written.", report.rows)
        self.message_user(request, text % report.rows, messages.SUCCESS)

    @admin.action(permissions=["delete"], description=_("Revoke: end these sessions now"))
    def revoke(self, request: HttpRequest, queryset: QuerySet[Any]) -> HttpResponse | None:
        """End the selected sessions."""
        return self._confirm_and_end(request, "revoke", list(queryset), queryset)

    @admin.action(permissions=["delete"], description=_("Revoke all sessions of these users"))
    def revoke_all_of_user(self, request: HttpRequest, queryset: QuerySet[Any]) -> Any:
        """End all sessions of the users of the selected sessions, and these."""
        selected = list(queryset)
        sessions = {session.pk: session for session in selected}
        for user_id in {page.user_id for page in pages_of(selected, time.time())} - {""}:
            for session in Session.objects.of_user(user_id):
                sessions.setdefault(session.pk, session)
        return self._confirm_and_end(
            request, "revoke_all_of_user", list(sessions.values()), selected
        )

    def _confirm_and_end(
        self,
        request: HttpRequest,
        action: str,
        sessions: Sequence[Session],
        selected: Iterable[Session],
    ) -> HttpResponse | None:
        """End `sessions` if that was confirmed, else ask."""
        if request.POST.get("confirmed"):
            self._log(request, sessions, DELETION, "Revoked.")
            count = end_sessions([session.pk for session in sessions], time.time())
            text = ngettext("%d session was revoked.", "%d sessions were revoked.", count)
            self.message_user(request, text % count, messages.SUCCESS)
            return None
        own, across = request.session.session_key, request.POST.get("select_across") == "1"
        list_address = _address(self, "deferred_sessions_session_changelist")
        context = {
            **self.admin_site.each_context(request),
            "title": _("Are you sure?"),
            "opts": self.opts,
            "pages": self._named(sessions),
            "action": action,
            "selected": [session.handle for session in selected][: 1 if across else None],
            "select_across": across,
            "return_to": request.get_full_path() if request.path == list_address else list_address,
            "action_checkbox_name": ACTION_CHECKBOX_NAME,
            "is_own_among_them": any(session.pk == own for session in sessions),
        }
        return TemplateResponse(request, f"{TEMPLATES}/revoke.html", context)

    # One session

    def change_view(
        self,
        request: HttpRequest,
        object_id: str,
        form_url: str = "",  # noqa: ARG002
        extra_context: dict[str, Any] | None = None,  # noqa: ARG002
    ) -> HttpResponse:
        """Show a session; do to it what was asked for."""
        if not self.has_view_permission(request):
            raise PermissionDenied
        found = Session.objects.on_any_server(unquote(object_id))
        if found is None:
            self.message_user(request, _("This session is gone."), messages.WARNING)
            return HttpResponseRedirect(_address(self, "deferred_sessions_session_changelist"))
        if request.method == "POST":
            done = self._act_on(request, found)
            return done or HttpResponseRedirect(request.path)
        page = pages_of([found], time.time())[0]
        may_see = request.user.has_perm(DATA_PERMISSION)
        context = {
            **self.admin_site.each_context(request),
            "title": page.name,
            "subtitle": None,
            "opts": self.opts,
            "page": page,
            "user_name": names_of([page.user_id]).get(page.user_id, page.user_id),
            "data": page.data_as_text() if may_see else None,
            "is_own": found.pk == request.session.session_key,
            "may_flush": self.has_change_permission(request),
            "may_revoke": self.has_delete_permission(request),
            "media": self.media,
        }
        return TemplateResponse(request, f"{TEMPLATES}/session.html", context)

    def _act_on(self, request: HttpRequest, session: Session) -> HttpResponse | None:
        """Do to one session what one of the list's actions does."""
        name = request.POST.get("action", "")
        if name not in self.get_actions(request):
            raise PermissionDenied
        sessions = Session.objects.using(session._state.db).filter(pk=session.pk)  # noqa: SLF001
        answer: HttpResponse | None = getattr(self, name)(request, sessions)
        return answer

    # The dashboard

    def dashboard_view(self, request: HttpRequest) -> HttpResponse:
        """Show the frame of the dashboard; its figures come from `figures_view`."""
        if not self.has_view_permission(request):
            raise PermissionDenied
        context = {
            **self.admin_site.each_context(request),
            "title": _("Sessions: dashboard"),
            "opts": self.opts,
            "spans": dashboard.SPANS,
            "default_span": dashboard.DEFAULT_SPAN,
        }
        return TemplateResponse(request, f"{TEMPLATES}/dashboard.html", context)

    def figures_view(self, request: HttpRequest) -> HttpResponse:
        """Answer with the figures; 503 if the store of this host cannot be used."""
        if not self.has_view_permission(request):
            raise PermissionDenied
        span = request.GET.get("span", dashboard.DEFAULT_SPAN)
        try:
            return JsonResponse(dashboard.snapshot(span, time.time()))
        except (DeferredSessionsError, OSError) as error:
            return JsonResponse({"error": str(error)}, status=503)

    # Inside

    def _named(self, sessions: Sequence[Session]) -> list[tuple[SessionPage, str]]:
        pages = pages_of(sessions, time.time())
        names = names_of(page.user_id for page in pages)
        return [(page, names.get(page.user_id, page.user_id)) for page in pages]

    def _log(
        self, request: HttpRequest, sessions: Sequence[Session], flag: int, message: str
    ) -> None:
        """Tell the log of the admin, with handles."""
        content_type, user_id = ContentType.objects.get_for_model(Session), request.user.pk or 0
        LogEntry.objects.bulk_create(
            LogEntry(
                user_id=user_id,
                content_type=content_type,
                object_id=session.handle,
                object_repr=str(session),
                action_flag=flag,
                change_message=message,
            )
            for session in sessions
        )


def _records_client() -> bool:
    return get_runtime().settings.record_client


def _address(model_admin: SessionAdmin, name: str, *arguments: str) -> str:
    site = model_admin.admin_site.name
    return reverse(f"admin:{name}", args=[quote(a) for a in arguments], current_app=site)
