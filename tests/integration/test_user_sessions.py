"""A user's sessions: found and ended, in memory, in PostgreSQL, and on other hosts."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from django.contrib.auth import SESSION_KEY
from django.contrib.auth.models import AnonymousUser, User
from django.test import Client as Browser
from django.test import override_settings

from deferred_sessions.backend import SessionStore
from deferred_sessions.client import KEY as CLIENT_KEY
from deferred_sessions.handles import handle_of
from deferred_sessions.models import Session
from deferred_sessions.runtime import Runtime
from deferred_sessions.statistics import Counter
from tests.integration.conftest import Outage, change, created, row

pytestmark = pytest.mark.django_db(transaction=True)


@pytest.fixture
def ann() -> User:
    return User.objects.create_user("ann", password="corner-shop")


def of(user: User, **values: Any) -> SessionStore:
    return created(**{SESSION_KEY: str(user.pk), **values})


def keys(sessions: Any) -> set[str]:
    return {session.session_key for session in sessions}


def test_the_sessions_of_a_user(ann: User, runtime: Runtime) -> None:
    ben = User.objects.create_user("ben")
    mine = {str(of(ann).session_key) for _ in range(3)}
    of(ben), created(a=1)
    assert keys(Session.objects.for_user(ann)) == mine
    assert keys(Session.objects.for_user(ann.pk)) == mine
    assert keys(Session.objects.for_user(str(ann.pk)).exclude(pk=min(mine))) == mine - {min(mine)}
    assert not Session.objects.for_user(AnonymousUser())
    assert not Session.objects.for_user(User())


def test_sessions_that_were_never_written_are_among_them(
    tune: Callable[..., Runtime], ann: User
) -> None:
    tune(WRITE_ON_CREATE=False, WRITE_THROUGH_KEYS=())
    session = of(ann)
    assert row(session.session_key) is None
    (found,) = Session.objects.for_user(ann)
    assert found.get_decoded() == {SESSION_KEY: str(ann.pk)}


def test_memory_knows_better_whose_a_session_is(tune: Callable[..., Runtime], ann: User) -> None:
    tune(WRITE_THROUGH_KEYS=())
    ben = User.objects.create_user("ben")
    session = of(ann)
    change(session, **{SESSION_KEY: str(ben.pk)})
    assert not Session.objects.for_user(ann)
    assert keys(Session.objects.for_user(ben)) == {session.session_key}


def test_an_expired_session_is_not_among_them(ann: User, runtime: Runtime) -> None:
    session = of(ann)
    session.set_expiry(1)
    session.save()
    deadline = time.monotonic() + 20
    while Session.objects.for_user(ann):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_revoking_all_but_one(
    ann: User, runtime: Runtime, caplog: pytest.LogCaptureFixture
) -> None:
    kept, others = of(ann), [of(ann, n=n) for n in range(3)]
    change(others[0], n=9)  # not flushed
    with caplog.at_level(logging.INFO, "deferred_sessions"):
        assert Session.objects.revoke_all(ann, keep=kept.session_key) == 3
    for session in others:
        assert SessionStore(session.session_key).load() == {}
        assert row(session.session_key) is None
    assert SessionStore(kept.session_key).load()
    assert "3 sessions were revoked" in caplog.text
    assert not any(str(session.session_key) in caplog.text for session in [kept, *others])
    assert Session.objects.revoke_all(ann) == 1


def test_a_session_that_was_never_written_is_revoked(
    tune: Callable[..., Runtime], ann: User
) -> None:
    runtime = tune(WRITE_ON_CREATE=False, WRITE_THROUGH_KEYS=())
    session = of(ann)
    assert Session.objects.revoke_all(ann) == 1
    assert SessionStore(session.session_key).load() == {}
    runtime.flusher.flush_once(time.time(), everything=True)
    assert row(session.session_key) is None


def test_revoking_reaches_another_host(
    ann: User, tune: Callable[..., Runtime], tmp_path: Path
) -> None:
    there = tmp_path / "there"
    with override_settings(DEFERRED_SESSIONS={"DIRECTORY": str(there), "STORE_SIZE": 16 << 20}):
        from deferred_sessions.runtime import get_runtime

        get_runtime().revocations.read_once(time.time())
        session = of(ann)
        change(session, cart=1)
    assert Session.objects.revoke_all(ann) == 1
    with override_settings(DEFERRED_SESSIONS={"DIRECTORY": str(there), "STORE_SIZE": 16 << 20}):
        assert get_runtime().agent.read_revocations_once(time.time()) == 1
        assert SessionStore(session.session_key).load() == {}


def test_a_deletion_that_waits_is_not_shown(ann: User, outage: Outage, runtime: Runtime) -> None:
    session = of(ann)
    outage.begin()
    session.delete()
    outage.end()
    assert row(session.session_key)
    assert not Session.objects.for_user(ann)


def test_a_handle_finds_its_session(runtime: Runtime) -> None:
    sessions = [created(n=n) for n in range(20)]
    known = Session.objects.get(pk=sessions[7].session_key)
    assert Session.objects.by_handle(known.handle) == known
    assert Session.objects.by_handle("aaaa." + "0" * 32) is None
    assert Session.objects.by_handle(known.session_key) is None
    assert Session.objects.by_handle("") is None
    sessions[7].delete()
    assert Session.objects.by_handle(known.handle) is None


def test_a_session_is_shown_without_its_key(runtime: Runtime) -> None:
    session = Session.objects.get(pk=created(a=1).session_key)
    for text in (str(session), repr(session), f"{session}", session.handle):
        assert session.session_key[:5] not in text


def test_flushing_some(runtime: Runtime) -> None:
    first, second = change(created(n=0), n=1), change(created(n=0), n=1)
    report = runtime.flusher.flush_sessions([str(first.session_key), "unknown0"], time.time())
    assert (report.rows, report.by) == (1, "request")
    assert (row(first.session_key), row(second.session_key)) == ({"n": 1}, {"n": 0})


def test_the_page_of_the_shop_ends_only_ones_own(ann: User, runtime: Runtime) -> None:
    ben = User.objects.create_user("ben")
    browsers = [Browser() for _ in range(3)]
    for browser, user in zip(browsers, (ann, ann, ben), strict=True):
        browser.force_login(user)
    handles = [handle_of(browser.cookies["sessionid"].value) for browser in browsers]
    html = browsers[0].get("/devices/").content.decode()
    assert handles[1] in html
    assert handles[2] not in html
    for handle in handles[1:]:
        assert browsers[0].post(f"/devices/{handle}/").status_code == 302
    assert "/login/" in browsers[1].get("/devices/")["Location"]
    assert browsers[2].get("/devices/").status_code == 200
    assert browsers[0].get("/devices/elsewhere/").status_code == 405


def test_the_client_is_recorded_only_where_a_session_is_saved_anyway(
    tune: Callable[..., Runtime],
) -> None:
    runtime = tune(RECORD_CLIENT=True)
    browser = Browser(HTTP_USER_AGENT="Tester/1.0", REMOTE_ADDR="192.0.2.7")
    browser.get("/probe/count/")
    key = browser.cookies["sessionid"].value
    assert SessionStore(key)[CLIENT_KEY] == "192.0.2.7 Tester/1.0"

    updates = runtime.counters.totals()[Counter.UPDATES]
    browser.get("/probe/read/", REMOTE_ADDR="192.0.2.8")
    assert SessionStore(key)[CLIENT_KEY] == "192.0.2.7 Tester/1.0"
    assert runtime.counters.totals()[Counter.UPDATES] == updates
    browser.get("/probe/acount/", REMOTE_ADDR="192.0.2.9")
    assert SessionStore(key)[CLIENT_KEY] == "192.0.2.9 Tester/1.0"
    assert runtime.counters.totals()[Counter.UPDATES] == updates + 1


def test_a_client_that_moves_costs_no_write_even_if_each_request_saves(
    tune: Callable[..., Runtime], settings: Any
) -> None:
    settings.SESSION_SAVE_EVERY_REQUEST = True
    runtime = tune(RECORD_CLIENT=True)
    browser = Browser(REMOTE_ADDR="192.0.2.7")
    browser.get("/probe/count/")
    updates = runtime.counters.totals()[Counter.UPDATES]
    browser.get("/probe/read/", REMOTE_ADDR="192.0.2.8")
    assert runtime.counters.totals()[Counter.TOUCHES] >= 1
    assert runtime.counters.totals()[Counter.UPDATES] == updates


def test_by_default_nothing_is_recorded(runtime: Runtime) -> None:
    browser = Browser(HTTP_USER_AGENT="Tester/1.0")
    browser.get("/probe/count/")
    assert dict(SessionStore(browser.cookies["sessionid"].value).items()) == {"count": 1}


def test_nobody_without_a_session_gets_one_by_it(tune: Callable[..., Runtime]) -> None:
    runtime = tune(RECORD_CLIENT=True)
    browser = Browser()
    browser.get("/probe/read/")
    browser.post("/probe/logout/")
    assert not browser.cookies
    assert runtime.store.status().records == 0
