"""The session engine: `SESSION_ENGINE = "deferred_sessions.backend"`.

Django builds a `SessionStore` for each request. Here are Django's semantics and
nothing else: what a session is, when it is loaded, what its errors mean. Where it is
kept is the business of `tiers`. Invariant: `__init__` does no I/O, and the async half
of each operation stores exactly what the sync half stores.

On a hit in memory the async half never leaves the event loop, and the sync half may
be used in async code, because no database is involved.
"""

from __future__ import annotations

import time
from contextlib import suppress
from typing import Any, Final

from asgiref.sync import sync_to_async
from django.contrib.sessions.backends.base import (
    VALID_KEY_CHARS,
    CreateError,
)
from django.core.management.base import CommandError
from django.utils.crypto import get_random_string
from django.utils.functional import cached_property

from deferred_sessions.deferred_session import (
    KEY_LENGTH,
    TROUBLE,
    DeferredSession,
    as_django_says,
    is_valid,
)
from deferred_sessions.exceptions import (
    RowRefusedError,
    ServerUnavailableError,
)
from deferred_sessions.memory.cache import Entry
from deferred_sessions.payload import Serializer, Snapshot
from deferred_sessions.runtime import Runtime, get_runtime
from deferred_sessions.saving import Memory
from deferred_sessions.servers.rows import USER_KEY, as_text
from deferred_sessions.session_lock import SessionLock

NOT_CREATED: Final = (
    "PostgreSQL inserts no session under any key. Is there a trigger or a rule on the table?"
)
CREATE_ATTEMPTS: Final = 10  # a random key is never taken that often


class NotClearedError(CommandError, ServerUnavailableError):
    """PostgreSQL is away; said by `manage.py clearsessions` without a traceback."""


class SessionStore(DeferredSession):
    """A visitor's session, deferred.

    The class must be called `SessionStore`: Django derives the salt of the signature
    from the name, and rows stay readable by `django.contrib.sessions.backends.db`.
    """

    saved_already: tuple[Exception | None] | None = None
    """What became of a save that was awaited already: `save` raises that, or does nothing.

    For middleware that has awaited `asave` and then calls code that calls `save`.
    """

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
            SessionBusy: `LOCKING` is "exclusive", and another request has the session.
        """
        runtime, key, now = get_runtime(), self._session_key, time.time()
        if not is_valid(key):
            return self._adopt(None, runtime)
        try:
            if runtime.busy.is_exclusive and not self.is_read_only:
                runtime.busy.take(key)
            loaded = runtime.tiers.recall(key, now)
            if loaded is Memory.UNKNOWN:
                loaded = runtime.tiers.fetch(key, now)
        except TROUBLE as error:
            self.trouble = error
            raise
        return self._adopt(loaded, runtime)

    async def aload(self) -> dict[str, Any]:
        """Do what `load` does."""
        runtime, key, now = get_runtime(), self._session_key, time.time()
        if not is_valid(key):
            return self._adopt(None, runtime)
        try:
            if runtime.busy.is_exclusive and not self.is_read_only:
                await runtime.busy.atake(key)
            loaded = runtime.tiers.recall(key, now)
            if loaded is Memory.UNKNOWN:
                loaded = await sync_to_async(runtime.tiers.fetch)(key, now)
        except TROUBLE as error:
            self.trouble = error
            raise
        return self._adopt(loaded, runtime)

    def exists(self, session_key: str | None) -> bool:
        """Tell whether there is a live session of this key.

        Raises:
            ServerUnavailableError: Not in memory, and PostgreSQL cannot be asked.
        """
        if not is_valid(session_key):
            return False
        tiers, now = get_runtime().tiers, time.time()
        known = tiers.exists(session_key, now)
        return tiers.exists_in_server(session_key, now) if known is None else known

    async def aexists(self, session_key: str | None) -> bool:
        """Do what `exists` does."""
        if not is_valid(session_key):
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
            ReadOnlySessionError: The view had promised not to.
        """
        if self.saved_already is not None:
            if self.saved_already[0] is not None:
                raise self.saved_already[0]
            return
        if self.session_key is None:
            self.create()
            return
        if must_create:
            self._insert(self._get_session(no_load=True))  # type: ignore[attr-defined]
            return
        if "_session_cache" not in self.__dict__:
            self._get_session()  # type: ignore[attr-defined]
        saving = self.save_in_memory()
        if saving is not None:
            self.finish(saving)

    async def asave(self, must_create: bool = False) -> None:
        """Do what `save` does."""
        if self.session_key is None:
            await self.acreate()
            return
        session = await self._aget_session(no_load=must_create)  # type: ignore[attr-defined]
        if must_create:
            await sync_to_async(self._insert)(session)
            return
        saving = self.save_in_memory()
        if saving is not None:
            await self.afinish(saving)

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

    def persist(self) -> None:
        """Save the session, and have it in PostgreSQL when this returns.

        Inside a transaction of the application it is there when that commits.

        Raises:
            UpdateError: The session was deleted since it was loaded.
            ServerUnavailableError, RowRefusedError: PostgreSQL does not have it; memory has.
        """
        self.save()
        with as_django_says():
            get_runtime().tiers.persist(str(self.session_key), time.time())

    async def apersist(self) -> None:
        """Do what `persist` does."""
        await self.asave()
        with as_django_says():
            await sync_to_async(get_runtime().tiers.persist)(str(self.session_key), time.time())

    def lock(self, *names: str, timeout: float | None = None) -> SessionLock:
        """Return what gives a `with` block these keys of the session to itself.

        Without names it is the whole session. No thread, task or process of the host that
        locks any of them goes on meanwhile; `timeout` is `LOCK_TIMEOUT` seconds unless
        given. On entry the session is brought up to date, on exit it is saved. Threads may
        nest locks on portions; the whole session must be locked before its portions.

        Raises (in the `with` statement):
            TypeError: A name is not a string. (Raised at once.)
            LockTimeoutError: Somebody else held it for too long; says who.
            LockOrderError: The whole session after portions of it.
            UpdateError: The session was deleted.
        """
        runtime = get_runtime()
        if not all(isinstance(name, str) for name in names):
            raise TypeError(f"Names of session keys are strings, unlike {names!r}.")
        wait = runtime.settings.lock_timeout if timeout is None else timeout
        return SessionLock(self, runtime.claims, frozenset(names), wait)

    def cycle_key(self) -> None:
        """Go on under another key, with what overlapping requests saved under this one."""
        self._get_session()  # type: ignore[attr-defined]
        self._catch_up()
        key, base = self._session_key, self._base
        self.create()
        if is_valid(key) and self._leave(key, base):
            self.save()

    async def acycle_key(self) -> None:
        """Do what `cycle_key` does."""
        await self._aget_session()  # type: ignore[attr-defined]
        await sync_to_async(self._catch_up)()
        key, base = self._session_key, self._base
        await self.acreate()
        if is_valid(key) and await sync_to_async(self._leave)(key, base):
            await self.asave()

    def delete(self, session_key: str | None = None) -> None:
        """Delete the session everywhere; it stays deleted even if PostgreSQL is away."""
        key = self.session_key if session_key is None else session_key
        if is_valid(key):
            get_runtime().tiers.delete(key, time.time())

    async def adelete(self, session_key: str | None = None) -> None:
        """Do what `delete` does."""
        await sync_to_async(self.delete)(session_key)

    @classmethod
    def clear_expired(cls) -> None:
        """Delete expired sessions, after those that live on in memory were written.

        Raises:
            ServerUnavailableError: PostgreSQL is away; the rest stays for the next time. As
                Django's `clearsessions` calls this, it is a `CommandError` as well.
        """
        try:
            get_runtime().flusher.clear_expired(time.time())
        except ServerUnavailableError as error:
            raise NotClearedError(f"Expired sessions could not be deleted now: {error}") from error

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

    def _insert(self, session: dict[str, Any]) -> None:
        """Create the session under its key, or raise CreateError."""
        key, runtime, now = self._session_key, get_runtime(), time.time()
        if not is_valid(key):
            raise ValueError("A session key must be 8 to 40 characters of 0-9, A-Z, a-z, _ and -.")
        snapshot = runtime.codec.encode(session)
        created = runtime.tiers.create(
            key,
            snapshot,
            as_text(session.get(USER_KEY) or ""),
            expires_at=self._expires_at(session, now),
            now=now,
        )
        if created is None:
            raise CreateError
        self._base = created

    def _get_new_session_key(self) -> str:
        """Return a random key; whether it is taken shows when it is inserted."""
        return get_random_string(KEY_LENGTH, VALID_KEY_CHARS)

    async def _aget_new_session_key(self) -> str:
        return self._get_new_session_key()
