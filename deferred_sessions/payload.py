"""Between a session dictionary and its payload, the bytes that memory keeps.

Called by `backend` and `tiers`. A `Snapshot` is a session as it was at one payload;
processes keep snapshots in their cache and share them between requests. Invariants: a
snapshot is never handed out, only copies of it; and what a codec encodes decodes to
exactly what SESSION_SERIALIZER would have made.

Sessions are small changes to the same few keys, again and again. So for Django's own
JSON serializer a save encodes only the keys that changed, and a load copies without
decoding. Scalars are immutable and may be shared; nested values are kept and compared
packed (see `lazy_session`). Packed values never leave the process's memory.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Collection, Iterable, Mapping, Sequence
from itertools import compress, repeat
from json.encoder import encode_basestring_ascii
from operator import is_not
from typing import Any, Final, Protocol

from django.contrib.sessions.serializers import JSONSerializer

from deferred_sessions.lazy_session import LazySession, Packed, packed

logger = logging.getLogger(__name__)

Session = dict[str, Any]

_SCALARS: Final = frozenset({str, int, float, bool, type(None)})
_TEXT: Final = frozenset({str})
_MISSING: Final = object()
_UNCHANGEABLE: Final = _SCALARS | {type(_MISSING)}
_NOTHING: Final[Mapping[str, Any]] = {}
_keys: Final = dict.keys  # as they are, also of a `LazySession`
_values: Final = dict.values
_items: Final = dict.items
_value: Final = dict.__getitem__
FEW: Final = 8  # changed keys that are looked for one by one
MANY: Final = 50  # keys from which on it pays to exchange one item in the payload
_encode_value: Final = json.JSONEncoder(separators=(",", ":")).encode


class Serializer(Protocol):
    """What SESSION_SERIALIZER names."""

    def dumps(self, obj: Any) -> bytes:
        """Return `obj` as bytes."""

    def loads(self, data: bytes) -> Any:
        """Return what `dumps` was given."""


class Snapshot(Protocol):
    """A session at one payload. Shared by requests, therefore never changed."""

    payload: bytes

    def copy(self) -> Session:
        """Return a session that belongs to the caller alone."""

    def changed_to(
        self, session: Session, watched: Collection[str] | None = None
    ) -> tuple[Snapshot, Iterable[str]]:
        """Return the snapshot of `session`, and the keys in which the two differ.

        With `watched` only those of them are certain; of others there may be too many.
        Returns this snapshot itself if `session` is exactly as it is here. Raises
        whatever the serializer raises; nothing is changed then.
        """


class Codec(Protocol):
    """Makes snapshots."""

    def decode(self, payload: bytes) -> Snapshot:
        """Return the snapshot of `payload`; of an empty session if it is unreadable."""

    def encode(self, session: Session) -> Snapshot:
        """Return the snapshot of `session`; raises whatever the serializer raises."""

    def text(self, value: Any) -> object:
        """Return what `value` looks like when it is stored, to tell values apart."""


def codec_for(serializer: type[Serializer]) -> Codec:
    """Return the codec for the class that SESSION_SERIALIZER names."""
    return JsonCodec() if serializer is JSONSerializer else SerializerCodec(serializer)


class SerializerCodec:
    """Encodes and decodes with any serializer, as a whole."""

    def __init__(self, serializer: type[Serializer]) -> None:
        self._serializer = serializer

    def decode(self, payload: bytes) -> Snapshot:
        """See `Codec`."""
        return _SerializerSnapshot(payload, self._serializer)

    def encode(self, session: Session) -> Snapshot:
        """See `Codec`."""
        return _SerializerSnapshot(self._serializer().dumps(session), self._serializer)

    def text(self, value: Any) -> object:
        """See `Codec`."""
        return self._serializer().dumps({"": value})


class _SerializerSnapshot:
    """Decodes for each copy: nothing is known about what the serializer makes."""

    __slots__ = ("_serializer", "payload")

    def __init__(self, payload: bytes, serializer: type[Serializer]) -> None:
        self.payload = payload
        self._serializer = serializer

    def copy(self) -> Session:
        return _readable(self._serializer, self.payload)

    def changed_to(
        self,
        session: Session,
        watched: Collection[str] | None = None,  # noqa: ARG002 - nothing to gain from it
    ) -> tuple[Snapshot, Iterable[str]]:
        payload = self._serializer().dumps(session)
        if payload == self.payload:
            return self, ()
        return _SerializerSnapshot(payload, self._serializer), _different(self.copy(), session)


class JsonCodec:
    """Does what Django's JSONSerializer does, key by key where that is faster."""

    def decode(self, payload: bytes) -> Snapshot:
        """See `Codec`."""
        return _JsonSnapshot(payload)

    def encode(self, session: Session) -> Snapshot:
        """See `Codec`."""
        return _JsonSnapshot(_encoded(session), is_own=True)

    def text(self, value: Any) -> object:
        """See `Codec`."""
        return _encode_value(value)


class _JsonSnapshot:
    """A session taken apart by key, as soon as that pays.

    What another process saved is used once, more often than not, before it saves again: so
    the first copy is the decoded session itself, and a save then encodes all of it.
    """

    __slots__ = ("_first", "_is_flat", "_names", "_texts", "_values", "is_own", "payload")

    def __init__(
        self,
        payload: bytes,
        texts: Sequence[str] = (),
        names: Sequence[str] = (),
        values: Session | None = None,
        *,
        is_flat: bool = True,
        is_own: bool = False,
    ) -> None:
        self.payload = payload
        self.is_own = is_own
        """This process made the payload, so it may well make the next one, too."""
        self._first: Session | None = None
        """What the first copy of another process's session had at first. Its nested values
        are that request's: good for nothing here."""
        self._texts = texts
        """The text of all items as it stands in the payload, in order, if known."""
        self._names = names
        """All keys, in order, as soon as there are values."""
        self._values = values
        """All keys, in order; scalars are shared, others are packed."""
        self._is_flat = is_flat
        """Nothing is packed."""

    def copy(self) -> Session:
        if self._values is None and self._first is None and not self.is_own:
            session = _readable(JSONSerializer, self.payload)
            self._first = session.copy()
            return session
        try:
            values = self._values or self._take_apart()
        except _TooDeepError:
            return _readable(JSONSerializer, self.payload)
        return values.copy() if self._is_flat else LazySession(values)

    def changed_to(
        self, session: Session, watched: Collection[str] | None = None
    ) -> tuple[Snapshot, Iterable[str]]:
        first = self._first  # another thread may take the session apart meanwhile
        if self._values is None and first is not None:
            return self._changed_at_first(first, session, watched)
        try:
            values = self._values or self._take_apart()
        except _TooDeepError:
            return _SerializerSnapshot(self.payload, JSONSerializer).changed_to(session)
        names = [*_keys(session)]
        has_same_keys = names == self._names
        if has_same_keys:
            changed = _changed_keys(session, values, names)
            if not changed:
                return self, ()
        else:
            changed = _with_removed(_new_keys(session, values), session, values)
        try:
            if has_same_keys and self._texts:
                return self._changed_in(session, values, changed), changed
            # Taking a payload apart pays only for a session that this process goes on writing;
            # and a key that is no string becomes one in JSON.
            if self.is_own and _TEXT.issuperset(map(type, names)):
                return self._rewritten(session, values, frozenset(changed)), changed
        except _TooDeepError:
            pass
        return _JsonSnapshot(_encoded(session), is_own=True), changed

    def _changed_in(self, session: Session, values: Session, changed: list[str]) -> _JsonSnapshot:
        """Return the snapshot of `session`, which has the same keys as `values`."""
        names, texts, kept, is_flat = self._names, [*self._texts], {**values}, self._is_flat
        places = {key: place for place, key in enumerate(names)} if len(changed) > FEW else {}
        payload = None
        for key in changed:
            value = session[key]
            text = _fragment(key, value)
            place = places[key] if places else names.index(key)
            if len(changed) == 1 and len(names) > MANY:
                payload = _spliced(self.payload, texts, place, text)
            texts[place] = text
            if type(value) not in _SCALARS:
                value = _decoded(text)
                is_flat = is_flat and type(value) is not Packed
            kept[key] = value
        payload = payload or _joined(texts)
        return _JsonSnapshot(payload, texts, names, kept, is_flat=is_flat, is_own=True)

    def _rewritten(
        self, session: Session, values: Session, changed: frozenset[str]
    ) -> _JsonSnapshot:
        """Return the snapshot of `session`, which has other keys, or whose texts are not known."""
        known = dict(zip(self._names, self._texts, strict=True)) if self._texts else {}
        texts: list[str] = []
        kept: Session = {}
        for key in _keys(session):
            is_old, value = key not in changed, _value(session, key)
            texts.append(known[key] if is_old and known else _fragment(key, session[key]))
            if is_old:
                kept[key] = values[key]
            else:
                kept[key] = value if type(value) in _SCALARS else _decoded(texts[-1])
        is_flat = Packed not in map(type, kept.values())
        names = [*kept]
        return _JsonSnapshot(_joined(texts), texts, names, kept, is_flat=is_flat, is_own=True)

    def _changed_at_first(
        self, first: Session, session: Session, watched: Collection[str] | None
    ) -> tuple[Snapshot, Iterable[str]]:
        """Do what `changed_to` does, for the session that was copied first."""
        payload = _encoded(session)
        if payload == self.payload:
            return self, ()
        if watched is not None and _are_same(watched, first, session):  # at the speed of C
            others = (first.keys() | session.keys()).difference(watched)
            return _JsonSnapshot(payload, is_own=True), others
        changed, old = [], None
        for key, value in _items(session):
            if type(value) in _SCALARS:
                before = first.get(key, _MISSING)
                if value is before or not _is_other(value, before):
                    continue
            elif watched is None or key in watched:
                old = old or _readable(JSONSerializer, self.payload)
                if key in old and _encode_value(old[key]) == _encode_value(value):
                    continue
            changed.append(key)
        return _JsonSnapshot(payload, is_own=True), _with_removed(changed, session, first)

    def _take_apart(self) -> Session:
        if self._values is None:
            values = _readable(JSONSerializer, self.payload)
            kept = {key: _in_store(value) for key, value in values.items()}
            self._is_flat = Packed not in map(type, kept.values())
            self._names = [*kept]
            self._values, self._first = kept, None
            return kept
        return self._values


def _encoded(session: Session) -> bytes:
    """Return what Django's JSONSerializer makes of `session`; it builds an encoder each time."""
    return _encode_value(session).encode("latin-1")


def _joined(texts: list[str]) -> bytes:
    """Return the object that has these items."""
    return f"{{{','.join(texts)}}}".encode("latin-1")


def _spliced(payload: bytes, texts: list[str], place: int, text: str) -> bytes:
    """Return `payload`, which has these items, with another one in one place."""
    start = len("{") + sum(map(len, texts[:place])) + place  # and as many commas
    rest = payload[start + len(texts[place]) :]
    return b"".join((payload[:start], text.encode("latin-1"), rest))


def _decoded(text: str) -> Any:
    """Return the value of an item as it will be decoded, such that it can be shared.

    JSON makes lists of tuples, and text of all keys.
    """
    (value,) = json.loads(f"{{{text}}}").values()
    return _in_store(value)


def _in_store(value: Any) -> Any:
    """Return a decoded `value` such that it can be shared: packed, unless it is a scalar."""
    if type(value) in _SCALARS:
        return value
    kept = packed(value)
    if kept is None:
        raise _TooDeepError
    return kept


def _changed_keys(session: Session, values: Session, names: Sequence[str]) -> list[str]:
    """Return those of `names`, the keys of both, whose value is not exactly the one in `values`."""
    suspects = compress(names, map(is_not, _values(session), values.values()))  # at the speed of C
    return [key for key in suspects if _is_other(_value(session, key), values[key])]


def _new_keys(session: Session, values: Session) -> list[str]:
    """Return the keys of `session` whose value is not exactly the one in `values`, if any."""
    suspects = (key for key, value in _items(session) if value is not values.get(key, _MISSING))
    return [key for key in suspects if _is_other(_value(session, key), values.get(key, _MISSING))]


def _is_other(new: Any, old: Any) -> bool:
    """Tell whether `new` would be stored as something else than `old`, as it is stored."""
    if type(old) is Packed:
        return (new if type(new) is Packed else packed(new)) != old
    return type(new) is not type(old) or type(new) is float or bool(new != old)


class _TooDeepError(Exception):
    """A value is nested deeper than marshal goes, though JSON does."""


def _are_same(names: Iterable[str], old: Session, new: Session) -> bool:
    """Tell whether both have the very same scalars under these names, or nothing."""
    values = [*map(new.get, names, repeat(_MISSING))]
    if any(map(is_not, values, map(old.get, names, repeat(_MISSING)))):
        return False
    return _UNCHANGEABLE.issuperset(map(type, values))


def _with_removed(changed: list[str], session: Session, values: Session) -> list[str]:
    return [*changed, *(key for key in values if key not in session)]


def _different(old: Session, new: Session) -> Iterable[str]:
    """Return the keys whose values are not equal, or that only one of both has."""
    keys = {**old, **new}
    return [key for key in keys if _differ(old.get(key, _MISSING), new.get(key, _MISSING))]


def _differ(old: Any, new: Any) -> bool:
    try:
        return bool(old != new)
    except Exception:  # noqa: BLE001 - an array, for one, answers with an array
        return True


def _fragment(key: str, value: Any) -> str:
    """Return the JSON text of one item of an object."""
    text = repr(value) if type(value) is int else _encode_value(value)
    return f"{encode_basestring_ascii(key)}:{text}"


def _readable(serializer: type[Serializer], payload: bytes) -> Session:
    """Return the session in `payload`; {} if it cannot be read, as Django does."""
    if not payload:
        return {}
    try:
        session = serializer().loads(payload)
    except Exception:  # a serializer may raise anything
        logger.warning(
            "A session in memory cannot be decoded by %s; it is taken as empty.",
            serializer.__qualname__,
            exc_info=True,
            extra={"action": "session_undecodable"},
        )
        return {}
    return session if isinstance(session, dict) else {}
