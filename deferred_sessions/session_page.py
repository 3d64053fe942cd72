"""A session as the admin shows it: the row, and over it what this host's memory has.

Called by `admin`. Invariant: where memory has the session, memory is what is shown; and
nothing here contains a session key that a template could show by mistake.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from enum import Enum
from typing import Any, Final

from django.contrib.auth import get_user_model
from django.core.exceptions import ValidationError
from django.utils.functional import cached_property
from django.utils.translation import gettext_lazy as _

from deferred_sessions.client import Client
from deferred_sessions.handles import shortened
from deferred_sessions.models import Session
from deferred_sessions.record import SessionRecord
from deferred_sessions.runtime import get_runtime

HIDDEN: Final = frozenset({"_auth_user_hash", "_csrftoken", "_password_reset_token"})
"""Keys whose values would let somebody do more than look."""


class State(Enum):
    """How memory and PostgreSQL stand to each other; the value is a class of CSS."""

    STORED = "stored"
    CLEAN = "clean"
    DIRTY = "dirty"
    BEING_WRITTEN = "writing"
    TOMBSTONE = "tombstone"
    EXPIRED = "expired"

    @property
    def label(self) -> str:
        """What people read."""
        return str(_LABELS[self])

    @property
    def meaning(self) -> str:
        """What it means, in a sentence."""
        return str(_MEANINGS[self])


_LABELS: Final = {
    State.STORED: _("stored"),
    State.CLEAN: _("clean"),
    State.DIRTY: _("dirty"),
    State.BEING_WRITTEN: _("being written"),
    State.TOMBSTONE: _("tombstone"),
    State.EXPIRED: _("expired"),
}
_MEANINGS: Final = {
    State.STORED: _("In PostgreSQL, not in the memory of this host."),
    State.CLEAN: _("In memory, and PostgreSQL has all of it."),
    State.DIRTY: _("Changed in memory; PostgreSQL will have it with the next flush."),
    State.BEING_WRITTEN: _("Changed in memory; a flusher is at work on it."),
    State.TOMBSTONE: _("Deleted in memory; PostgreSQL will follow."),
    State.EXPIRED: _("Nobody can use it any more; clearsessions will remove it."),
}


class SessionPage:
    """One session to be shown."""

    def __init__(
        self, session: Session, record: SessionRecord | None, now: float, *, is_flushing: bool
    ) -> None:
        self.handle = session.handle
        self.name = str(session)
        self.record = record
        self._session = session
        self._now = now
        self._is_flushing = is_flushing

    @property
    def state(self) -> State:
        """How memory and PostgreSQL stand to each other."""
        record = self.record
        if record is not None and record.is_tombstone:
            return State.TOMBSTONE
        if self.expires_at.timestamp() <= self._now:
            return State.EXPIRED
        if record is None:
            return State.STORED
        if not record.is_dirty:
            return State.CLEAN
        is_due = self._is_flushing and record.due_at <= self._now
        return State.BEING_WRITTEN if is_due else State.DIRTY

    @property
    def user_id(self) -> str:
        """Who is logged in; "" for nobody."""
        return self.record.user_id if self.record is not None else self._session.user_id or ""

    @property
    def created_at(self) -> datetime:
        """When it was created."""
        return self._session.created_at if self.record is None else _time(self.record.created_at)

    @property
    def expires_at(self) -> datetime:
        """When it expires if nobody uses it."""
        return self._session.expire_date if self.record is None else _time(self.record.expires_at)

    @property
    def active_at(self) -> datetime:
        """The last use that is known of, to about ten minutes for mere reading."""
        if self.record is None:
            return self._session.written_at
        record = self.record
        return _time(max(record.used_at, record.written_at, record.changed_at))

    @property
    def due_at(self) -> datetime | None:
        """From when on the flusher may write it; None if there is nothing to write."""
        return _time(self.record.due_at) if self.record is not None and self.record.due_at else None

    @property
    def size(self) -> int:
        """Bytes of the payload in memory, or of the signed text in the row."""
        if self.record is not None:
            return len(self.record.payload)
        size = getattr(self._session, "stored_size", None)
        return len(self._session.session_data) if size is None else int(size)

    @property
    def node(self) -> str:
        """The node that wrote it last, without the incarnation of its store."""
        return (self._session.owner or "").partition("#")[0]

    @property
    def is_in_memory(self) -> bool:
        """This host has it in memory."""
        return self.record is not None

    @property
    def row(self) -> Session:
        """The row, for versions and times of PostgreSQL."""
        return self._session

    @property
    def client(self) -> Client | None:
        """Where it was used from, if that was recorded."""
        return Client.of(self.data)

    @cached_property
    def data(self) -> Mapping[str, Any]:
        """The session itself, decoded."""
        if self.record is None:
            return self._session.get_decoded()
        return get_runtime().codec.decode(self.record.payload).copy()

    def data_as_text(self) -> str:
        """Return the session for people who may see it, but for what they may not use."""
        shown = {key: "(hidden)" if key in HIDDEN else value for key, value in self.data.items()}
        text = json.dumps(shown, indent=2, default=repr, ensure_ascii=False)
        key = self._session.session_key
        return text.replace(key, shortened(key))


def pages_of(sessions: Iterable[Session], now: float) -> list[SessionPage]:
    """Return what to show of `sessions`, with what memory has of them."""
    runtime = get_runtime()
    if not runtime.store.exists():
        return [SessionPage(session, None, now, is_flushing=False) for session in sessions]
    is_flushing = runtime.flusher.is_running()
    return [
        SessionPage(session, runtime.store.get(session.pk), now, is_flushing=is_flushing)
        for session in sessions
    ]


def names_of(user_ids: Iterable[str]) -> dict[str, str]:
    """Return the names of users by their id as sessions have it; unknown ones are left out."""
    model = get_user_model()
    field = model._meta.pk  # noqa: SLF001 - public, whatever its name says
    known = []
    for user_id in {user_id for user_id in user_ids if user_id}:
        try:
            known.append(field.to_python(user_id))
        except ValidationError:
            continue
    users = model._default_manager.filter(pk__in=known)  # noqa: SLF001
    return {field.value_to_string(user): user.get_username() for user in users}


def users_like(word: str, limit: int = 100) -> Sequence[str]:
    """Return the ids of users whose name contains `word`."""
    model = get_user_model()
    users = model._default_manager.filter(**{f"{model.USERNAME_FIELD}__icontains": word})  # noqa: SLF001
    return [model._meta.pk.value_to_string(user) for user in users[:limit]]  # noqa: SLF001


def _time(seconds: float) -> datetime:
    return datetime.fromtimestamp(min(seconds, 253402300799), tz=UTC)
