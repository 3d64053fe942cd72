"""How the session of one request is saved in memory, merged with others, and brought up to date.

The base of `backend.SessionStore`, which adds what Django expects; `session_lock` uses it,
too. Invariant: what `save_in_memory` returned nothing for is saved; otherwise what it
returned must be finished.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, Final, TypeGuard

from asgiref.sync import sync_to_async
from django.contrib.sessions.backends.base import SessionBase, UpdateError

from deferred_sessions.client import KEY as CLIENT_KEY
from deferred_sessions.client import Client
from deferred_sessions.exceptions import (
    ReadOnlySessionError,
    ServerUnavailableError,
    SessionBusy,
    SessionDeletedError,
)
from deferred_sessions.memory.cache import Entry
from deferred_sessions.payload import Snapshot
from deferred_sessions.record import SessionRecord
from deferred_sessions.runtime import Runtime, get_runtime
from deferred_sessions.saving import Rest, Saving, has_moved_on
from deferred_sessions.servers.rows import USER_KEY, as_text

VALID_KEY: Final = re.compile(r"[0-9A-Za-z_-]{8,40}").fullmatch
"""What may reach a tier at all. A cookie can hold anything; Django's own keys are 32
characters of a-z0-9, the rest leaves room for keys that other engines have made."""

KEY_LENGTH: Final = 32
EXPIRY_KEY: Final = "_session_expiry"
TROUBLE: Final = (ServerUnavailableError, SessionBusy)
_get: Final = dict.get  # of what is never nested, and so never packed: see `lazy_session`


class DeferredSession(SessionBase):
    """A session that this request has loaded, or is about to create."""

    is_read_only = False
    """Set by `@read_only_session`: it does not wait for others and cannot be saved."""
    trouble: Exception | None = None
    """Why the session could not be loaded, for the middleware."""
    _base: Entry[Snapshot] | None = None
    """The session as it was last loaded or saved."""
    _session_cache: dict[str, Any]
    """The session as the request has it now; Django makes it with the first access."""

    def save_in_memory(self, *, merging: bool = False) -> Saving | None:
        """Save for the processes of this host, merging where requests overlap.

        With `merging` also where `LOCKING` says that the last write wins.

        Returns what is left to do, if anything. Encodes first, so that a failure changes
        nothing.
        """
        runtime, now = get_runtime(), time.time()
        merging = merging or runtime.overlap.is_merging
        try:
            saved = self._remember(runtime, now, merging=merging)
            while not isinstance(saved, Entry):
                if saved.rest is not Rest.MERGE:
                    return saved
                saved = self._merge_and_remember(saved, runtime, now)
        except SessionDeletedError as error:
            raise UpdateError(str(error)) from error
        self._base = saved
        return None

    def finish(self, saving: Saving) -> None:
        """Do what memory alone could not."""
        left: Saving | None = saving
        while left is not None:
            with as_django_says():
                left = self._settled(get_runtime().tiers.settle(left, time.time()))

    async def afinish(self, saving: Saving) -> None:
        """Do what `finish` does."""
        left: Saving | None = saving
        while left is not None:
            with as_django_says():
                settle = sync_to_async(get_runtime().tiers.settle)
                left = self._settled(await settle(left, time.time()))

    def _settled(self, result: Entry[Snapshot] | Saving) -> Saving | None:
        """Take note of what has been saved, or merge and save anew."""
        if isinstance(result, Entry):
            self._base = result
            return None
        saved = self._merge_and_remember(result, get_runtime(), time.time())
        return self._settled(saved) if isinstance(saved, Entry) else saved

    def _remember(self, runtime: Runtime, now: float, *, merging: bool) -> Entry[Snapshot] | Saving:
        """Save in memory once; return the session as saved, or what is left to do."""
        if self.is_read_only:
            raise ReadOnlySessionError("A view with @read_only_session cannot save its session.")
        key, base, session = self._session_key, self._base, self._session_cache
        if base is not None and key is not None:  # then it was checked when it was loaded
            # If the last write wins, it is one only if something has really changed.
            watched = runtime.urgent_keys if merging else None
            snapshot, changed = base.snapshot.changed_to(session, watched)
            is_urgent = not runtime.urgent_keys.isdisjoint(changed)
        elif is_valid(key):
            snapshot, is_urgent, changed = runtime.codec.encode(session), True, session
        else:
            raise UpdateError("There is no such session.")
        user_id = _get(session, USER_KEY)
        return runtime.tiers.remember(
            key,
            snapshot,
            as_text(user_id) if user_id else "",
            self._expires_at(session, now),
            now,
            is_urgent=is_urgent,
            base=base if merging or not changed else None,
        )

    def _merge_and_remember(
        self, saving: Saving, runtime: Runtime, now: float
    ) -> Entry[Snapshot] | Saving:
        """Merge with the request that was faster, and try again."""
        if saving.record is not None:
            self._take_over(saving.record)
        return self._remember(runtime, now, merging=saving.base is not None)

    def _catch_up(self) -> None:
        """Merge with what others have saved of the session, before its key is given up."""
        runtime, key = get_runtime(), self._session_key
        if key is None or self._base is None or not runtime.overlap.is_merging:
            return
        with suppress(SessionDeletedError, ServerUnavailableError):  # then this is all there is
            self._take_over(runtime.tiers.newest(key, time.time()))

    def _leave(self, key: str, base: Entry[Snapshot] | None) -> bool:
        """Delete the session under its old `key`; return whether that brought news.

        Somebody may have saved it there while the new one was created.
        """
        runtime = get_runtime()
        left = runtime.tiers.delete(key, time.time())
        if left is None or left.is_tombstone or base is None or not runtime.overlap.is_merging:
            return False
        if not has_moved_on(left, base):
            return False
        runtime.overlap.merge_into(self._session_cache, base.snapshot, left)
        return True

    def get_expiry_age(self, **kwargs: Any) -> Any:
        """Do what Django's does, which looks at the clock even if nothing was set."""
        if not kwargs and not self.get(EXPIRY_KEY):
            return self.get_session_cookie_age()
        return super().get_expiry_age(**kwargs)

    def note_client(self, client: Client) -> None:
        """Have it in the session where this request came from, if that is news.

        Only in a session that is saved anyway.
        """
        if self.modified and not self.is_empty() and "_session_cache" in self.__dict__:
            text = client.text()
            if self._session_cache.get(CLIENT_KEY) != text:
                self._session_cache[CLIENT_KEY] = text

    # Locks

    def key_to_lock(self) -> str:
        """Return the key of the session; creates it if it is new."""
        self._get_session()  # type: ignore[attr-defined]
        if self.session_key is None:
            self.create()
        return str(self.session_key)

    async def akey_to_lock(self) -> str:
        """Do what `key_to_lock` does."""
        await self._aget_session()  # type: ignore[attr-defined]
        if self.session_key is None:
            await self.acreate()
        return str(self.session_key)

    def renew(self) -> None:
        """Take over what others have saved since the session was loaded."""
        with as_django_says():
            self._take_over(get_runtime().tiers.newest(str(self.session_key), time.time()))

    async def arenew(self) -> None:
        """Do what `renew` does."""
        tiers, key, now = get_runtime().tiers, str(self.session_key), time.time()
        with as_django_says():
            record = tiers.known_record(key, now)
            self._take_over(record or await sync_to_async(tiers.newest)(key, now))

    def _take_over(self, record: SessionRecord) -> None:
        base = self._base
        if base is not None and has_moved_on(record, base):
            overlap = get_runtime().overlap
            self._base = overlap.merge_into(self._session_cache, base.snapshot, record)

    def _expires_at(self, session: dict[str, Any], now: float) -> float:
        expiry = _get(session, EXPIRY_KEY)
        if not expiry:
            return now + self.get_session_cookie_age()
        expires_at: float = self.get_expiry_date(expiry=expiry).timestamp()
        return expires_at


@contextmanager
def as_django_says() -> Iterator[None]:
    """Say it with Django's own error if the session was deleted."""
    try:
        yield
    except SessionDeletedError as error:
        raise UpdateError(str(error)) from error


def is_valid(key: str | None) -> TypeGuard[str]:
    """Tell whether `key` can be the key of a session at all."""
    return key is not None and VALID_KEY(key) is not None
