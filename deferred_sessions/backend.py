"""The session engine: `SESSION_ENGINE = "deferred_sessions.backend"`.

Django builds a `SessionStore` for each request. Here are Django's semantics and
nothing else: what a session is, when it is loaded, what its errors mean. Where it is
kept is the business of `tiers`. Invariant: `__init__` does no I/O, and the async half
of each operation stores exactly what the sync half stores.

On a hit in memory the async half never leaves the event loop, and the sync half may
be used in async code, because no database is involved.
"""

from __future__ import annotations

import re
import time
from contextlib import suppress
from typing import Any, Final, TypeGuard

from asgiref.sync import sync_to_async
from django.contrib.sessions.backends.base import (
    VALID_KEY_CHARS,
    CreateError,
    SessionBase,
    UpdateError,
)
from django.utils.crypto import get_random_string
from django.utils.functional import cached_property

from deferred_sessions.exceptions import RowRefusedError, SessionDeletedError
from deferred_sessions.memory.cache import Entry
from deferred_sessions.payload import Serializer, Snapshot
from deferred_sessions.runtime import Runtime, get_runtime
from deferred_sessions.saving import Memory, Rest, Saving

VALID_KEY: Final = re.compile(r"[0-9A-Za-z_-]{8,40}").fullmatch
"""What may reach a tier at all. A cookie can hold anything; Django's own keys are 32
characters of a-z0-9, the rest leaves room for keys that other engines have made."""

USER_KEY: Final = "_auth_user_id"
KEY_LENGTH: Final = 32
MAX_USER_ID: Final = 255  # characters; as wide as the column
NOT_CREATED: Final = (
    "PostgreSQL inserts no session under any key. Is there a trigger or a rule on the table?"
)
CREATE_ATTEMPTS: Final = 10  # a random key is never taken that often


class SessionStore(SessionBase):
    """A visitor's session, deferred.

    The class must be called `SessionStore`: Django derives the salt of the signature
    from the name, and rows stay readable by `django.contrib.sessions.backends.db`.
    """

    _base: Entry[Snapshot] | None = None
    """The session as it was last loaded or saved."""

    def __init__(self, session_key: str | None = None) -> None:
        # All that Django's does, but for the serializer, which it imports for each request.
        self._session_key = session_key
        self.accessed = False
        self.modified = False

    @cached_property
    def serializer(self) -> type[Serializer]:
        """Return the class that SESSION_SERIALIZER names."""
        return get_runtime().serializer

    @classmethod
    def get_model_class(cls) -> type:
        """Return the model of the rows, as the engines that Django ships do."""
        from deferred_sessions.models import Session  # noqa: PLC0415 - needs loaded apps

        return Session

    # Load

    def load(self) -> dict[str, Any]:
        """Return this request's own copy of the session; {} and no key if there is none.

        Raises:
            ServerUnavailableError: Not in memory, and PostgreSQL cannot be asked. An
                empty session would make the middleware delete the visitor's cookie.
        """
        runtime, key, now = get_runtime(), self._session_key, time.time()
        if not _is_valid(key):
            return self._adopt(None, runtime)
        loaded = runtime.tiers.recall(key, now)
        if loaded is Memory.UNKNOWN:
            loaded = runtime.tiers.fetch(key, now)
        return self._adopt(loaded, runtime)

    async def aload(self) -> dict[str, Any]:
        """Do what `load` does."""
        runtime, key, now = get_runtime(), self._session_key, time.time()
        if not _is_valid(key):
            return self._adopt(None, runtime)
        loaded = runtime.tiers.recall(key, now)
        if loaded is Memory.UNKNOWN:
            loaded = await sync_to_async(runtime.tiers.fetch)(key, now)
        return self._adopt(loaded, runtime)

    def exists(self, session_key: str | None) -> bool:
        """Tell whether there is a live session of this key.

        Raises:
            ServerUnavailableError: Not in memory, and PostgreSQL cannot be asked.
        """
        if not _is_valid(session_key):
            return False
        tiers, now = get_runtime().tiers, time.time()
        known = tiers.exists(session_key, now)
        return tiers.exists_in_server(session_key, now) if known is None else known

    async def aexists(self, session_key: str | None) -> bool:
        """Do what `exists` does."""
        if not _is_valid(session_key):
            return False
        tiers, now = get_runtime().tiers, time.time()
        known = tiers.exists(session_key, now)
        if known is None:
            return await sync_to_async(tiers.exists_in_server)(session_key, now)
        return known

    # Save

    def save(self, must_create: bool = False) -> None:
        """Save the session in memory, and in PostgreSQL where it must not wait.

        When it returns, every process of the host sees the change, and only the loss
        of the host can undo it.

        Raises:
            CreateError: `must_create`, and the key is taken.
            UpdateError: The session was deleted since it was loaded.
            ServerUnavailableError: PostgreSQL had to be asked and could not be.
        """
        if self.session_key is None:
            self.create()
            return
        session = self._get_session(no_load=must_create)  # type: ignore[attr-defined]
        if must_create:
            self._insert(session)
            return
        runtime, now = get_runtime(), time.time()
        try:
            saved = self._remember(session, runtime, now)
            while not isinstance(saved, Entry):
                if saved.rest is not Rest.MERGE:
                    saved = runtime.tiers.settle(saved, now)
                else:
                    saved = self._merge_and_remember(saved, session, runtime, now)
        except SessionDeletedError as error:
            raise UpdateError(str(error)) from error
        self._base = saved

    async def asave(self, must_create: bool = False) -> None:
        """Do what `save` does."""
        if self.session_key is None:
            await self.acreate()
            return
        session = await self._aget_session(no_load=must_create)  # type: ignore[attr-defined]
        if must_create:
            await sync_to_async(self._insert)(session)
            return
        runtime, now = get_runtime(), time.time()
        try:
            saved = self._remember(session, runtime, now)
            while not isinstance(saved, Entry):
                if saved.rest is not Rest.MERGE:
                    saved = await sync_to_async(runtime.tiers.settle)(saved, now)
                else:
                    saved = self._merge_and_remember(saved, session, runtime, now)
        except SessionDeletedError as error:
            raise UpdateError(str(error)) from error
        self._base = saved

    def create(self) -> None:
        """Create a session under a new key, in PostgreSQL and in memory.

        Raises:
            RowRefusedError: PostgreSQL takes no session, whatever the key.
            ServerUnavailableError: It is away, and `CREATE_WHEN_DOWN` is off.
        """
        for _ in range(CREATE_ATTEMPTS):
            self._session_key = self._get_new_session_key()
            with suppress(CreateError):
                self.save(must_create=True)
                self.modified = True
                return
        raise RowRefusedError(NOT_CREATED)

    async def acreate(self) -> None:
        """Do what `create` does."""
        for _ in range(CREATE_ATTEMPTS):
            self._session_key = await self._aget_new_session_key()
            with suppress(CreateError):
                await self.asave(must_create=True)
                self.modified = True
                return
        raise RowRefusedError(NOT_CREATED)

    def cycle_key(self) -> None:
        """Go on under another key, with what overlapping requests saved under this one."""
        self._catch_up(self._session)  # type: ignore[attr-defined]
        super().cycle_key()

    async def acycle_key(self) -> None:
        """Do what `cycle_key` does."""
        self._catch_up(await self._aget_session())  # type: ignore[attr-defined]
        await super().acycle_key()

    def delete(self, session_key: str | None = None) -> None:
        """Delete the session everywhere; it stays deleted even if PostgreSQL is away."""
        key = self.session_key if session_key is None else session_key
        if _is_valid(key):
            get_runtime().tiers.delete(key, time.time())

    async def adelete(self, session_key: str | None = None) -> None:
        """Do what `delete` does."""
        await sync_to_async(self.delete)(session_key)

    @classmethod
    def clear_expired(cls) -> None:
        """Delete expired sessions, after those that live on in memory were written."""
        get_runtime().flusher.clear_expired(time.time())

    @classmethod
    async def aclear_expired(cls) -> None:
        """Do what `clear_expired` does."""
        await sync_to_async(cls.clear_expired)()

    # Inside

    def _adopt(self, loaded: Entry[Snapshot] | None, runtime: Runtime) -> dict[str, Any]:
        """Take what was found as this request's session."""
        if loaded is None:
            self._session_key = None
            return {}
        self._base = loaded
        if runtime.request_end.is_needed:
            runtime.request_end.note_use(str(self._session_key))
        return loaded.snapshot.copy()

    def _remember(
        self, session: dict[str, Any], runtime: Runtime, now: float
    ) -> Entry[Snapshot] | Saving:
        """Save in memory; encodes first, so that a failure changes nothing.

        Returns the session as saved, or what is left to do.
        """
        key, base = self._session_key, self._base
        if base is not None and key is not None:  # then it was checked when it was loaded
            snapshot, changed = base.snapshot.changed_to(session)
            is_urgent = not runtime.urgent_keys.isdisjoint(changed)
        elif _is_valid(key):
            snapshot, is_urgent = runtime.codec.encode(session), True
        else:
            raise UpdateError("There is no such session.")
        user_id = session.get(USER_KEY)
        return runtime.tiers.remember(
            key,
            snapshot,
            _as_text(user_id) if user_id else "",
            self._expires_at(session, now),
            now,
            is_urgent=is_urgent,
            base=base if runtime.overlap.is_merging else None,
        )

    def _merge_and_remember(
        self, saving: Saving, session: dict[str, Any], runtime: Runtime, now: float
    ) -> Entry[Snapshot] | Saving:
        """Merge with the request that was faster, and try again."""
        base, record = saving.base, saving.record
        if base is not None and record is not None:
            self._base = runtime.overlap.merge_into(session, base.snapshot, record)
        return self._remember(session, runtime, now)

    def _catch_up(self, session: dict[str, Any]) -> None:
        """Merge `session` with what memory has of it now, before its key is given up."""
        runtime, key, base = get_runtime(), self._session_key, self._base
        if key is None or base is None or not runtime.overlap.is_merging:
            return
        record = runtime.tiers.overlapping(key, base)
        if record is not None:
            self._base = runtime.overlap.merge_into(session, base.snapshot, record)

    def _insert(self, session: dict[str, Any]) -> None:
        """Create the session under its key, or raise CreateError."""
        key, runtime, now = self._session_key, get_runtime(), time.time()
        if not _is_valid(key):
            raise ValueError("A session key must be 8 to 40 characters of 0-9, A-Z, a-z, _ and -.")
        snapshot = runtime.codec.encode(session)
        created = runtime.tiers.create(
            key,
            snapshot,
            _as_text(session.get(USER_KEY) or ""),
            expires_at=self._expires_at(session, now),
            now=now,
        )
        if created is None:
            raise CreateError
        self._base = created

    def _expires_at(self, session: dict[str, Any], now: float) -> float:
        expiry = session.get("_session_expiry")
        if not expiry:
            return now + self.get_session_cookie_age()
        expires_at: float = self.get_expiry_date(expiry=expiry).timestamp()
        return expires_at

    def _get_new_session_key(self) -> str:
        """Return a random key; whether it is taken shows when it is inserted."""
        return get_random_string(KEY_LENGTH, VALID_KEY_CHARS)

    async def _aget_new_session_key(self) -> str:
        return self._get_new_session_key()


def _is_valid(key: str | None) -> TypeGuard[str]:
    return key is not None and VALID_KEY(key) is not None


def _as_text(user_id: object) -> str:
    """Return who is logged in, as far as the column can hold it."""
    text = str(user_id).replace("\0", "")[:MAX_USER_ID]
    return text if text.isascii() else text.encode(errors="replace").decode()
