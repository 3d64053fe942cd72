"""A session's dictionary whose nested values are copied when somebody asks for them.

Made by `payload` for each request. Most requests look at a few keys, and copying all the
others costs more than everything else that a load does. Invariant: no request ever gets
hold of a value that another one can change; what was not asked for still is `Packed`, which
cannot be changed.
"""

from __future__ import annotations

import marshal
from collections.abc import Callable, ItemsView, Iterator, ValuesView
from typing import Any, Final

_VERSION: Final = 2  # of marshal: no references and no interning, so equal values are equal bytes
_loaded: Final = marshal.loads
_get: Final = dict.get
_item: Final = dict.__getitem__  # `super()` takes twice as long
_set: Final = dict.__setitem__


class Packed(bytes):
    """A nested value, marshalled. Exact (`==` is not: 1 == True), and fast to compare."""

    __slots__ = ()


def packed(value: Any) -> Packed | None:
    """Return `value`, of plain types, packed; None if it is nested too deep, or not plain."""
    try:
        return Packed(marshal.dumps(value, _VERSION))
    except ValueError:
        return None


class LazySession(dict[str, Any]):
    """A dictionary that unpacks what is asked for; for all others it is a plain one.

    `dict.values(session)` and the like, called on the class, show what is still packed.
    """

    __slots__ = ()
    __hash__ = None

    def __getitem__(self, key: str) -> Any:
        value = _item(self, key)
        if type(value) is Packed:
            value = _loaded(value)
            _set(self, key, value)
        return value

    def get(self, key: str, default: Any = None) -> Any:
        """Do what a dictionary does."""
        value = _get(self, key, default)
        if type(value) is Packed:
            value = _loaded(value)
            _set(self, key, value)
        return value

    def setdefault(self, key: str, default: Any = None) -> Any:
        """Do what a dictionary does."""
        if key in self:
            return self[key]
        _set(self, key, default)
        return default

    def pop(self, key: str, *default: Any) -> Any:
        """Do what a dictionary does."""
        value = super().pop(key, *default)
        return _loaded(value) if type(value) is Packed else value

    def popitem(self) -> tuple[str, Any]:
        """Do what a dictionary does."""
        key, value = super().popitem()
        return key, _loaded(value) if type(value) is Packed else value

    # What hands out all values has them all unpacked first.

    def unpacked(self) -> LazySession:
        """Return this dictionary, with nothing packed left."""
        for key, value in super().items():
            if type(value) is Packed:
                _set(self, key, _loaded(value))  # an existing key: the iteration goes on
        return self

    def values(self) -> ValuesView[Any]:  # type: ignore[override]
        """Do what a dictionary does."""
        return dict.values(self.unpacked())

    def items(self) -> ItemsView[str, Any]:  # type: ignore[override]
        """Do what a dictionary does."""
        return dict.items(self.unpacked())

    def copy(self) -> dict[str, Any]:
        """Return a plain dictionary with the same values."""
        return dict(dict.items(self.unpacked()))

    def __iter__(self) -> Iterator[str]:
        # Its mere presence keeps `dict(session)` and `{**session}` from copying what is
        # packed: they then ask for each value.
        return super().__iter__()

    def __eq__(self, other: object) -> bool:
        return dict.__eq__(self.unpacked(), _plain(other)) is True

    def __ne__(self, other: object) -> bool:
        return not self == other

    def __or__(self, other: Any) -> Any:
        return self.copy() | _plain(other)

    def __ror__(self, other: Any) -> Any:
        return other | self.copy()

    def __repr__(self) -> str:
        return dict.__repr__(self.unpacked())

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[dict[str, Any]]]:
        return dict, (self.copy(),)

    def __reduce_ex__(self, _: Any) -> tuple[Callable[..., Any], tuple[dict[str, Any]]]:
        return self.__reduce__()


def _plain(other: Any) -> Any:
    return other.unpacked() if isinstance(other, LazySession) else other
