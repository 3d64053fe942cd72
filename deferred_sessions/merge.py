"""Three-way merge of session dictionaries: what becomes of changes that overlap.

Called by `tiers` when a session has moved on between its load and its save. The unit is
the top-level key, as in the session's own interface. Invariant: what only one side
changed, deleted or added is kept; nothing that did not conflict is lost.

The idea is that of `diff3` and of version control: both sides are compared with what
they have in common, not with each other.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final, NamedTuple

_MISSING: Final = object()


class Merged(NamedTuple):
    """A session in which the changes of both sides are."""

    session: dict[str, Any]
    conflicts: list[str]
    """Keys that both sides changed, differently; the session has what we made of them."""


def merge(
    base: Mapping[str, Any],
    ours: Mapping[str, Any],
    theirs: Mapping[str, Any],
    *,
    text: Callable[[Any], object],
) -> Merged:
    """Return `theirs` with the changes that lead from `base` to `ours`.

    `text` tells values apart: two are the same if their texts are equal. (`==` does not
    tell 1 from True.) Where both sides changed a key, ours stands: it is the later save.
    The values in the result are those of `ours` and `theirs`, not copies.
    """

    def same(one: Any, other: Any) -> bool:
        if one is _MISSING or other is _MISSING:
            return one is other
        return text(one) == text(other)

    session = dict(theirs)
    conflicts = []
    for key in [*ours, *(key for key in base if key not in ours)]:
        before, mine = base.get(key, _MISSING), ours.get(key, _MISSING)
        if same(before, mine):
            continue
        other = theirs.get(key, _MISSING)
        if not same(before, other) and not same(mine, other):
            conflicts.append(key)
        if mine is _MISSING:
            session.pop(key, None)
        else:
            session[key] = mine
    return Merged(session, conflicts)
