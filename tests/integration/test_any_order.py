"""Two requests do anything to sessions in any order; a plain dictionary tells what is right."""

from __future__ import annotations

import time
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any, ClassVar

import pytest
from django.contrib.sessions.backends.base import UpdateError
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test

from deferred_sessions.backend import SessionStore
from deferred_sessions.models import Session
from deferred_sessions.runtime import get_runtime, reset_runtime
from tests.integration.conftest import row

REQUESTS = st.integers(0, 1)
NAMES = st.sampled_from("abc")
VALUES = st.one_of(st.integers(2, 9), st.text(max_size=3), st.lists(st.integers(2, 9), max_size=2))
GONE = object()


@dataclass
class Request:
    """One request, and what it should have in hand."""

    store: SessionStore = field(default_factory=SessionStore)
    base: dict[str, Any] = field(default_factory=dict)
    mine: dict[str, Any] = field(default_factory=dict)


def merged(request: Request, theirs: dict[str, Any]) -> dict[str, Any]:
    """Return what a save should make of the session: by name, written without our code."""
    names = {*request.base, *request.mine, *theirs}
    result = {}
    for name in names:
        mine = request.mine.get(name, GONE)
        value = theirs.get(name, GONE) if mine == request.base.get(name, GONE) else mine
        if value is not GONE:
            result[name] = value
    return result


class Sessions(RuleBasedStateMachine):
    """What users and operators do."""

    behind_our_back: ClassVar[bool] = False

    def __init__(self) -> None:
        super().__init__()
        get_runtime().store.clear()
        Session.objects.all().delete()
        get_runtime().revocations.read_once(time.time())
        self.requests = [Request(), Request()]
        self.truth: dict[str, dict[str, Any]] = {}

    @rule(which=REQUESTS)
    def create(self, which: int) -> None:
        request = self.requests[which] = Request()
        request.store.create()
        self.truth[str(request.store.session_key)] = {}

    @rule(which=REQUESTS)
    def load_what_the_other_has(self, which: int) -> None:
        """A second request of the same visitor."""
        other = self.requests[1 - which]
        key = other.store.session_key
        expected = self.truth.get(str(key), {})
        request = Request(SessionStore(key), dict(expected), dict(expected))
        assert dict(request.store.items()) == expected
        assert (request.store.session_key is None) == (str(key) not in self.truth)
        self.requests[which] = request

    @rule(which=REQUESTS, name=NAMES, value=VALUES)
    def set(self, which: int, name: str, value: Any) -> None:
        request = self.requests[which]
        request.store[name] = deepcopy(value)
        request.mine[name] = value

    @rule(which=REQUESTS, name=NAMES)
    def change_inside(self, which: int, name: str) -> None:
        request = self.requests[which]
        if isinstance(request.mine.get(name), list):
            request.store[name].append(7)
            request.mine[name] = [*request.mine[name], 7]

    @rule(which=REQUESTS, name=NAMES)
    def delete_name(self, which: int, name: str) -> None:
        request = self.requests[which]
        request.store.pop(name, None)
        request.mine.pop(name, None)

    @rule(which=REQUESTS)
    def save(self, which: int) -> None:
        request = self.requests[which]
        key = request.store.session_key
        if key is not None and key not in self.truth:
            with pytest.raises(UpdateError):
                request.store.save()
            self.requests[which] = Request()
            return
        request.store.save()
        self._saved(request, {} if key is None else self.truth[key])

    @rule(which=REQUESTS, name=NAMES, value=VALUES)
    def save_under_a_lock(self, which: int, name: str, value: Any) -> None:
        request = self.requests[which]
        key = request.store.session_key
        if key is None or key not in self.truth:
            return
        with request.store.lock(name):
            request.mine = merged(request, self.truth[key])
            request.base = dict(self.truth[key])
            assert dict(request.store.items()) == request.mine
            request.store[name] = deepcopy(value)
            request.mine[name] = value
        self._saved(request, self.truth[key])

    @rule(which=REQUESTS)
    def delete(self, which: int) -> None:
        key = self.requests[which].store.session_key
        self.requests[which].store.flush()
        self.truth.pop(str(key), None)
        self.requests[which] = Request()

    @rule(which=REQUESTS)
    def cycle(self, which: int) -> None:
        request = self.requests[which]
        old = str(request.store.session_key)
        theirs = self.truth.get(old, request.base)
        request.store.cycle_key()
        self.truth.pop(old, None)
        self._saved(request, theirs)

    @rule(everything=st.booleans())
    def flush(self, everything: bool) -> None:
        get_runtime().flusher.flush_once(time.time(), everything=everything)
        if everything:
            assert {key: row(key) for key in self.truth} == self.truth
            assert Session.objects.count() == len(self.truth)

    @rule()
    def evict(self) -> None:
        get_runtime().store.evict(1000)

    @rule()
    def restart(self) -> None:
        """Of the process: what it had in its own memory is gone."""
        reset_runtime()

    @rule(which=REQUESTS)
    def delete_by_sql(self, which: int) -> None:
        key = self.requests[which].store.session_key
        if Session.objects.filter(pk=key).delete()[0]:
            get_runtime().revocations.read_once(time.time())
            self.truth.pop(str(key), None)

    @invariant()
    def everybody_sees_the_same(self) -> None:
        for key, expected in self.truth.items():
            assert SessionStore(key).load() == expected

    @invariant()
    def requests_keep_what_they_have(self) -> None:
        for request in self.requests:
            assert dict(request.store.items()) == request.mine

    def _saved(self, request: Request, theirs: dict[str, Any]) -> None:
        content = merged(request, theirs)
        self.truth[str(request.store.session_key)] = content
        request.base, request.mine = dict(content), dict(content)


@pytest.mark.django_db(transaction=True)
def test_any_order(tune: Callable[..., Any]) -> None:
    """Some hundred sequences of some dozen steps; a failure prints the shortest one."""
    tune(FLUSH_INTERVAL=0.01, STORE_SIZE=4 << 20)
    run_state_machine_as_test(
        Sessions,
        settings=settings(
            max_examples=150,
            stateful_step_count=30,
            deadline=None,
            derandomize=True,
            suppress_health_check=list(HealthCheck),
        ),
    )
