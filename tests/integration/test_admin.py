"""The admin: what it shows of sessions, what it does to them, and what it keeps to itself."""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

import pytest
from django.contrib.admin.models import LogEntry
from django.contrib.auth import SESSION_KEY
from django.contrib.auth.models import Permission, User
from django.test import Client as Browser
from django.urls import reverse
from django.utils import timezone

from deferred_sessions.backend import SessionStore
from deferred_sessions.handles import handle_of
from deferred_sessions.models import Node, RefusedWrite, Session
from deferred_sessions.runtime import Runtime
from tests.integration.conftest import Outage, change, created, row

pytestmark = pytest.mark.django_db(transaction=True)

LIST = "/admin/deferred_sessions/session/"
DASHBOARD = f"{LIST}dashboard/"
FIGURES = f"{LIST}figures.json"


class Pages:
    """A browser that remembers all that it was shown."""

    def __init__(self, browser: Browser) -> None:
        self.browser = browser
        self.seen = ""

    def get(self, address: str, **data: Any) -> Any:
        return self._read(self.browser.get(address, data))

    def post(self, address: str, **data: Any) -> Any:
        return self._read(self.browser.post(address, data))

    def text(self, address: str, **data: Any) -> str:
        return str(self.get(address, **data).content.decode())

    def _read(self, response: Any) -> Any:
        self.seen += response.content.decode() + str(response.headers)
        return response


@pytest.fixture
def admin() -> Pages:
    User.objects.create_superuser("admin", "admin@example.com", "corner-shop")
    browser = Browser(HTTP_USER_AGENT="Tester/1.0")
    assert browser.login(username="admin", password="corner-shop")
    return Pages(browser)


@pytest.fixture
def staff() -> Callable[..., Pages]:
    """Log somebody in who has nothing but these permissions."""

    def make(*permissions: str) -> Pages:
        user = User.objects.create_user("staff", password="corner-shop", is_staff=True)
        user.user_permissions.set(Permission.objects.filter(codename__in=permissions))
        browser = Browser()
        assert browser.login(username="staff", password="corner-shop")
        return Pages(browser)

    return make


@pytest.fixture
def ann() -> User:
    return User.objects.create_user("ann", "ann@example.com", "corner-shop")


def page_of(session: SessionStore) -> str:
    return f"{LIST}{handle_of(str(session.session_key)).replace('_', '_5F')}/change/"


def of(user: User, **values: Any) -> SessionStore:
    return created(**{SESSION_KEY: str(user.pk), **values})


def rows_of(html: str) -> dict[str, str]:
    """Return the state of each session in the list, by the beginning of its key."""
    found = re.findall(
        r'class="field-name">.*?>([^<]{4}…).*?<span class="ds-state ds-(\w+)', html, re.DOTALL
    )
    return dict(found)


def test_the_list_shows_sessions_as_memory_has_them(
    admin: Pages, ann: User, runtime: Runtime
) -> None:
    clean, dirty, stored = of(ann), of(ann), of(ann)
    change(dirty, cart="lamp" * 500)
    runtime.store.update(str(stored.session_key), lambda _: None)
    html = admin.text(LIST)
    states = rows_of(html)
    assert states[f"{str(clean.session_key)[:4]}…"] == "clean"
    assert states[f"{str(dirty.session_key)[:4]}…"] == "dirty"
    assert states[f"{str(stored.session_key)[:4]}…"] == "stored"
    assert "ann" in html
    assert "2,0" in html  # the bytes that memory has


def test_a_session_is_being_written_while_the_flusher_is_at_work(
    admin: Pages, runtime: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = change(created(n=0), n=1)
    monkeypatch.setattr(time, "time", lambda clock=time.time: clock() + 61)
    with runtime.flusher._lock.held(wait=True) as is_held:
        assert is_held
        assert rows_of(admin.text(LIST))[f"{str(session.session_key)[:4]}…"] == "writing"
    assert rows_of(admin.text(LIST))[f"{str(session.session_key)[:4]}…"] == "dirty"


def test_a_deletion_that_waits_is_shown(admin: Pages, outage: Outage, runtime: Runtime) -> None:
    session = created(a=1)
    outage.begin()
    session.delete()
    outage.end()
    assert rows_of(admin.text(LIST))[f"{str(session.session_key)[:4]}…"] == "tombstone"
    assert "Deleted in memory" in admin.text(page_of(session))


def test_a_session_that_was_never_written_is_in_the_list(
    tune: Callable[..., Runtime], admin: Pages
) -> None:
    tune(WRITE_ON_CREATE=False)
    session = created(a=1)
    assert row(session.session_key) is None
    assert f"{str(session.session_key)[:4]}…" in rows_of(admin.text(LIST))


def test_search_by_user_and_by_the_beginning_of_a_key(
    admin: Pages, ann: User, tune: Callable[..., Runtime]
) -> None:
    tune(WRITE_THROUGH_KEYS=())
    mine, other = of(ann), created(a=1)
    late = change(created(a=1), **{SESSION_KEY: str(ann.pk)})  # PostgreSQL does not know yet
    beginnings = {f"{str(s.session_key)[:4]}…" for s in (mine, late)}
    for term in ("ann", "AN", str(ann.pk)):
        assert set(rows_of(admin.text(LIST, q=term))) >= beginnings
        assert f"{str(other.session_key)[:4]}…" not in rows_of(admin.text(LIST, q=term))
    key = str(other.session_key)
    assert set(rows_of(admin.text(LIST, q=key[:6]))) == {f"{key[:4]}…"}
    assert rows_of(admin.text(LIST, q=key[:3])) == {}
    assert set(rows_of(admin.text(LIST, q=key[:8] + "zzzz"))) == {f"{key[:4]}…"}


def test_whoever_searches_for_a_whole_key_does_not_see_it_again(admin: Pages) -> None:
    key = str(created(a=1).session_key)
    response = admin.get(LIST, q=key)
    assert response.status_code == 302
    assert response["Location"] == f"{LIST}?q={key[:8]}"
    assert set(rows_of(admin.text(response["Location"]))) == {f"{key[:4]}…"}
    assert key not in admin.seen


@pytest.mark.parametrize(
    "query", ["session_key__startswith=a", "session_data__contains=a", "pk=a", "owner__contains=a"]
)
def test_no_lookup_tells_what_pages_do_not(admin: Pages, query: str) -> None:
    assert admin.get(f"{LIST}?{query}").status_code == 400


@pytest.mark.parametrize("query", ["_popup=1", "_to_field=session_key", "_popup=1&_to_field=pk"])
def test_there_is_no_popup_because_it_would_have_keys_in_it(admin: Pages, query: str) -> None:
    key = str(created(a=1).session_key)
    assert admin.get(f"{LIST}?{query}").status_code == 403
    assert key[:9] not in admin.seen


def test_filters(admin: Pages, ann: User, runtime: Runtime) -> None:
    mine, nobody = of(ann), change(created(a=1), a=2)
    ours, theirs = (f"{str(s.session_key)[:4]}…" for s in (mine, nobody))
    assert set(rows_of(admin.text(LIST, logged_in="no"))) == {theirs}
    assert ours in rows_of(admin.text(LIST, logged_in="yes"))
    assert set(rows_of(admin.text(LIST, state="dirty"))) == {theirs}
    assert {ours, theirs} <= set(rows_of(admin.text(LIST, state="live")))
    assert rows_of(admin.text(LIST, state="expired")) == {}
    assert {ours, theirs} <= set(rows_of(admin.text(LIST, node="here")))
    assert rows_of(admin.text(LIST, node="elsewhere")) == {}
    assert set(rows_of(admin.text(LIST, user_id__exact=str(ann.pk)))) == {ours}
    assert {ours, theirs} <= set(
        rows_of(admin.text(LIST, created_at__gte="2020-01-01 00:00:00+00:00"))
    )


def test_the_client_is_shown_where_it_is_recorded(
    tune: Callable[..., Runtime], admin: Pages
) -> None:
    assert "Tester/1.0" not in admin.text(LIST)
    tune(RECORD_CLIENT=True)
    Browser(HTTP_USER_AGENT="Visitor/2.0", REMOTE_ADDR="192.0.2.7").get("/probe/count/")
    html = admin.text(LIST)
    assert "Visitor/2.0" in html
    assert "192.0.2.7" in html


def test_a_session_with_its_data(admin: Pages, ann: User) -> None:
    session = of(ann, cart={"lamp": 2}, _auth_user_hash="0123456789abcdef", _csrftoken="s3cr3t")
    change(session, note="in memory only", myself=str(session.session_key))
    html = admin.text(page_of(session))
    assert "in memory only" in html
    assert "lamp" in html
    assert "0123456789abcdef" not in html
    assert "s3cr3t" not in html
    assert str(session.session_key) not in html


def test_flush_now(admin: Pages) -> None:
    session, other = change(created(n=0), n=1), change(created(n=0), n=1)
    response = admin.post(
        LIST, action="flush_now", index=0, _selected_action=handle_of(str(session.session_key))
    )
    assert response.status_code == 302
    assert "1 session was written" in admin.text(LIST)
    assert (row(session.session_key), row(other.session_key)) == ({"n": 1}, {"n": 0})
    assert admin.post(page_of(other), action="flush_now").status_code == 302
    assert row(other.session_key) == {"n": 1}


def test_revoking_asks_first(admin: Pages) -> None:
    sessions = [created(n=n) for n in range(3)]
    handles = [handle_of(str(session.session_key)) for session in sessions[:2]]
    asked = admin.post(LIST, action="revoke", index=0, _selected_action=handles)
    assert "These 2 sessions end at once" in asked.content.decode()
    assert handles[0] in asked.content.decode()
    assert all(SessionStore(session.session_key).load() for session in sessions)
    admin.post(LIST, action="revoke", confirmed=1, _selected_action=handles)
    assert [SessionStore(session.session_key).load() for session in sessions] == [{}, {}, {"n": 2}]
    assert Session.objects.count() == 2  # the admin's own is the other
    entry = LogEntry.objects.latest("pk")
    assert (entry.object_repr[4:], entry.change_message) == ("…", "Revoked.")
    assert {entry.object_id for entry in LogEntry.objects.all()} == set(handles)


def test_revoking_all_of_a_user(admin: Pages, ann: User) -> None:
    mine, other = [of(ann, n=n) for n in range(3)], created(a=1)
    asked = admin.post(page_of(mine[0]), action="revoke_all_of_user").content.decode()
    assert "These 3 sessions" in asked
    assert f'action="{LIST}"' in asked
    late = of(ann)
    handle = handle_of(str(mine[0].session_key))
    admin.post(LIST, action="revoke_all_of_user", confirmed=1, _selected_action=handle)
    for session in (*mine, late):
        assert SessionStore(session.session_key).load() == {}
    assert SessionStore(other.session_key).load()


def test_all_that_a_search_finds_can_be_revoked(admin: Pages, ann: User) -> None:
    mine, other = [of(ann) for _ in range(3)], created(a=1)
    handle = handle_of(str(mine[0].session_key))
    data = {"action": "revoke", "index": 0, "select_across": 1, "_selected_action": handle}
    asked = admin.post(f"{LIST}?q=ann", **data).content.decode()
    assert "These 3 sessions" in asked
    assert f'action="{LIST}?q=ann"' in asked
    admin.post(f"{LIST}?q=ann", **data, confirmed=1)
    assert not any(SessionStore(session.session_key).load() for session in mine)
    assert SessionStore(other.session_key).load()


def test_who_revokes_the_own_session_is_told(admin: Pages) -> None:
    own = SessionStore(admin.browser.cookies["sessionid"].value)
    assert "(you)" in admin.text(LIST)
    assert "Your own is among them" in admin.post(page_of(own), action="revoke").content.decode()
    assert "you are using now" in admin.text(page_of(own))


def test_who_revokes_the_own_session_is_logged_out(admin: Pages) -> None:
    handle = handle_of(admin.browser.cookies["sessionid"].value)
    done = admin.post(LIST, action="revoke", confirmed=1, _selected_action=handle)
    assert done.status_code == 302
    assert "/admin/login/" in admin.get(LIST)["Location"]


def test_users_with_odd_ids_have_a_link(admin: Pages) -> None:
    created(**{SESSION_KEY: "a&b=c#<d>"})
    assert '<a href="?user_id__exact=a%26b%3Dc%23%3Cd%3E">a&amp;b=c#&lt;d&gt;</a>' in admin.text(
        LIST
    )


def test_a_session_that_is_gone(admin: Pages) -> None:
    session = created(a=1)
    session.delete()
    response = admin.get(page_of(session))
    assert (response.status_code, response["Location"]) == (302, LIST)


def test_staff_without_the_permission_see_nothing(staff: Callable[..., Pages]) -> None:
    session, pages = created(secret="treasure"), staff()
    for address in (LIST, DASHBOARD, FIGURES, page_of(session)):
        response = pages.get(address)
        assert response.status_code == 403, address
        for action in ("revoke", "flush_now"):
            pages.post(address, action=action, confirmed=1, _selected_action="x", index=0)
    assert "treasure" not in pages.seen
    assert str(session)[:5] not in pages.seen
    assert SessionStore(session.session_key).load()


def test_who_is_not_logged_in_is_sent_to_the_login() -> None:
    for address in (LIST, DASHBOARD, FIGURES):
        assert "/admin/login/" in Browser().get(address)["Location"]


def test_who_may_look_may_neither_see_data_nor_do_anything(staff: Callable[..., Pages]) -> None:
    session, pages = change(created(n=0), secret="treasure"), staff("view_session")
    handle = handle_of(str(session.session_key))
    assert rows_of(pages.text(LIST))
    html = pages.text(page_of(session))
    assert "treasure" not in html
    assert "<button" not in html.partition('id="content-main"')[2].partition("</div>")[0]
    for action in ("revoke", "flush_now", "revoke_all_of_user"):
        pages.post(LIST, action=action, index=0, confirmed=1, _selected_action=handle)
        assert pages.post(page_of(session), action=action, confirmed=1).status_code == 403
    assert SessionStore(session.session_key).load()
    assert row(session.session_key) == {"n": 0}


def test_data_has_a_permission_of_its_own(staff: Callable[..., Pages]) -> None:
    session, pages = created(secret="treasure"), staff("view_session", "view_session_data")
    assert "treasure" in pages.text(page_of(session))


def test_nothing_of_djangos_own_pages_is_left(admin: Pages) -> None:
    key = str(created(a=1).session_key)
    for address in (f"{key}/delete/", f"{key}/history/", "add/"):
        assert admin.get(LIST + address).status_code == 404
    assert admin.get(f"{LIST}{key}/change/").status_code == 302
    assert "delete_selected" not in admin.text(LIST)


def test_the_dashboard_has_its_figures(admin: Pages, runtime: Runtime) -> None:
    change(created(n=0), n=1)
    html = admin.text(DASHBOARD)
    assert reverse("admin:deferred_sessions_figures") in html
    assert "<script>" not in html.partition('id="content-main"')[2]
    figures = admin.get(FIGURES, span="1h").json()
    assert figures["now"]["dirty"] == 1
    assert figures["counters"]["UPDATES"] >= 1
    assert figures["notices"][0]["level"] == "warning"  # nobody has flushed yet
    assert figures["refused"] == 0
    assert [node["is_here"] for node in figures["nodes"]] == [True]
    assert admin.get(FIGURES, span="nonsense").status_code == 200


def test_the_dashboard_knows_the_other_nodes(admin: Pages) -> None:
    """Who is alive, who is not, and what was refused."""
    Node.objects.create(node="web2#1")
    Node.objects.create(node="web3#1", died_at=timezone.now())
    Node.objects.create(node="old#1", beat_at=timezone.now() - timedelta(days=2))
    refused = {"fence": 1, "version": 1, "changed_keys": [], "owner": "web2#1", "owner_fence": 2}
    RefusedWrite.objects.create(session_key="k", node="web3#1", session_data="", **refused)
    figures = admin.get(FIGURES).json()
    found = [(node["name"], node["is_alive"]) for node in figures["nodes"][1:]]
    assert found == [("web2", True), ("web3", False)]
    assert figures["refused"] == 1


def test_the_dashboard_turns_red_when_the_poller_is_dead(admin: Pages, runtime: Runtime) -> None:
    now = time.time()
    runtime.flusher.flush_once(now)
    assert admin.get(FIGURES).json()["notices"][0]["level"] == "ok"
    runtime.flusher.flush_once(now - 121)
    figures = admin.get(FIGURES).json()
    assert figures["now"]["is_poller_dead"]
    assert [(n["level"], n["title"]) for n in figures["notices"]] == [("error", "No poller")]


def test_the_dashboard_says_what_the_last_flush_said(
    admin: Pages, outage: Outage, runtime: Runtime
) -> None:
    change(created(n=0), n=1)
    outage.begin()
    runtime.flusher.flush_once(time.time(), everything=True)
    outage.end()
    titles = [notice["title"] for notice in admin.get(FIGURES).json()["notices"]]
    assert titles == ["The last flush failed"]


def test_looking_keeps_samples_where_no_agent_does(admin: Pages, runtime: Runtime) -> None:
    assert admin.get(FIGURES).json()["series"]["at"] == []
    created(a=1)
    runtime.statistics._sampled = -1
    assert len(runtime.statistics.history(60, time.time())) == 1


@pytest.fixture
def everything_logged(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    with caplog.at_level(logging.DEBUG, "deferred_sessions"), caplog.at_level(logging.INFO):
        yield caplog


def test_no_page_and_no_log_has_a_key(
    admin: Pages, ann: User, everything_logged: pytest.LogCaptureFixture, runtime: Runtime
) -> None:
    sessions = [change(of(ann, n=n), n=n + 1) for n in range(5)]
    handles = [handle_of(str(session.session_key)) for session in sessions]
    keys = [str(session.session_key) for session in sessions]
    for address in (LIST, f"{LIST}?o=1.2", f"{LIST}?state=dirty", f"{LIST}?q={keys[0][:8]}"):
        admin.get(address)
    for session in sessions:
        admin.get(page_of(session))
    for action in ("flush_now", "revoke", "revoke_all_of_user"):
        admin.post(LIST, action=action, index=0, _selected_action=handles[:2])
        admin.post(page_of(sessions[2]), action=action)
    admin.post(LIST, action="revoke", confirmed=1, _selected_action=handles[0])
    admin.post(LIST, action="revoke_all_of_user", confirmed=1, _selected_action=handles[1])
    for address in (LIST, DASHBOARD, FIGURES, "/admin/"):
        admin.get(address)
    runtime.flusher.flush_once(time.time(), everything=True)

    keys.append(str(admin.browser.cookies["sessionid"].value))
    log = everything_logged.text + "".join(str(vars(r)) for r in everything_logged.records)
    entries = "".join(str(list(LogEntry.objects.values_list())))
    for key in keys:
        for text in (admin.seen, log, entries):
            assert key[:9] not in text
    assert "sessions_revoked_here" in log
