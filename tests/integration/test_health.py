"""The health URL: what it says, and that it asks nobody."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from django.core.management import CommandError, call_command
from django.db import connection
from django.test import AsyncClient, Client

from deferred_sessions.backend import SessionStore
from deferred_sessions.exceptions import ServerUnavailableError
from deferred_sessions.runtime import Runtime
from tests.integration.conftest import Outage, created, dirty, forget

pytestmark = pytest.mark.django_db(transaction=True)


def health(path: str = "/healthz") -> tuple[int, dict[str, Any]]:
    response = Client().get(path)
    assert response["Cache-Control"] == "no-store"
    assert not response.cookies
    return response.status_code, response.json()


def run(*words: str) -> str:
    output = StringIO()
    call_command("sessionproxy", *words, stdout=output)
    return output.getvalue()


def test_all_is_well(runtime: Runtime, tune: Callable[..., Runtime]) -> None:
    tune(NODE="web1")
    connection.close()
    created(n=1)
    assert health() == (
        200,
        {
            "status": "ok",
            "node": "web1",
            "draining": False,
            "troubles": [],
            "postgresql": "reachable",
            "flushed_ago": None,
            "sessions": 1,
            "dirty": 0,
            "oldest_change_age": 0.0,
            "store_used": pytest.approx(0.0, abs=0.1),
            "journal_unsynced": None,
        },
    )


def test_a_node_that_has_just_started() -> None:
    """The first check makes the store, so that the first visitor need not wait for it."""
    status, content = health()
    assert (status, content["status"], content["postgresql"]) == (200, "ok", "unknown")


def test_it_asks_nobody(runtime: Runtime) -> None:
    dirty(3)
    connection.close()
    assert health()[1]["dirty"] == 3
    assert connection.connection is None


def test_postgresql_is_away(runtime: Runtime, outage: Outage) -> None:
    """Known sessions are served, so the director must go on sending their visitors."""
    session, unknown = created(n=1), created(n=2)
    outage.begin()
    forget(runtime)
    with pytest.raises(ServerUnavailableError):
        SessionStore(unknown.session_key).load()
    status, content = health()
    assert (status, content["status"], content["postgresql"]) == (200, "degraded", "away")
    assert content["troubles"] == ["postgresql"]
    assert connection.connection is None

    outage.end()
    assert SessionStore(session.session_key).load() == {"n": 1}
    status, content = health()
    assert (status, content["status"], content["postgresql"]) == (200, "ok", "reachable")


def test_what_a_flush_finds_out_others_know(runtime: Runtime, outage: Outage) -> None:
    """Another process flushes; this one has not tried to connect since."""
    dirty(1)
    runtime.flusher.flush_once(time.time(), everything=True)
    assert health()[1]["postgresql"] == "reachable"
    dirty(1)
    outage.begin()
    runtime.flusher.flush_once(time.time(), everything=True)
    runtime.server.breaker._seen_at = None
    runtime.server.breaker._failures = 0
    assert health()[1]["postgresql"] == "away"
    outage.end()
    runtime.flusher.flush_once(time.time(), everything=True)
    assert health()[1]["postgresql"] == "reachable"


def test_nobody_flushes(tune: Callable[..., Runtime], monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = tune(FLUSH_INTERVAL=10.0)
    dirty(1)
    now = time.time()
    assert runtime.condition.read(now + 19).troubles == []
    late = runtime.condition.read(now + 21)
    assert late.troubles == ["flush"]
    assert late.oldest_change_age == pytest.approx(21, abs=1)

    runtime.flusher.flush_once(now + 21)
    assert runtime.condition.read(now + 500).troubles == []  # there is nothing to write
    assert runtime.condition.read(now + 500).flushed_ago == pytest.approx(479, abs=1)


def test_many_dirty_sessions_are_not_counted_by_every_check(
    runtime: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    dirty(3)
    looks = []
    oldest_change = runtime.store.oldest_change
    monkeypatch.setattr(
        type(runtime.store), "oldest_change", lambda _: looks.append(1) or oldest_change()
    )
    monkeypatch.setattr("deferred_sessions.condition.REST", 1e9)
    for _ in range(10):
        assert runtime.condition.read(time.time() + 5).oldest_change_age >= 5
    assert len(looks) == 1


def test_the_journal(tune: Callable[..., Runtime], tmp_path: Path) -> None:
    runtime = tune(JOURNAL_DIRECTORY=str(tmp_path / "journal"), SYNC_INTERVAL=10.0)
    dirty(1)
    assert health()[1]["journal_unsynced"] > 0
    assert health()[1]["troubles"] == []
    assert runtime.condition.read(time.time() + 30).troubles == ["journal"]

    assert runtime.store.journal is not None
    runtime.store.journal.sync(time.time())
    assert health()[1]["journal_unsynced"] == 0
    assert runtime.condition.read(time.time() + 30).troubles == []


def test_a_node_is_drained(runtime: Runtime, caplog: pytest.LogCaptureFixture) -> None:
    """503 for who knows no better; 404 for HAProxy, to which 503 would mean a dead node."""
    session = created(count=1)
    assert "no new visitors" in run("drain")
    with caplog.at_level(logging.WARNING):
        assert health()[0] == 503
        assert health("/healthz?draining=404")[0] == 404
        assert health("/healthz?draining=200")[0] == 503
        assert health()[1]["status"] == "draining"
    assert caplog.text == ""  # or there would be an error, and a mail, every two seconds

    client = Client()
    client.cookies["sessionid"] = str(session.session_key)
    assert client.get("/probe/count/").json()["value"] == 2

    since = runtime.condition.draining_since()
    run("drain")
    assert runtime.condition.draining_since() == since
    run("resume")
    assert (health()[0], health("/healthz?draining=404")[0]) == (200, 200)


def test_an_unusable_store(
    tune: Callable[..., Runtime], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "link").symlink_to(tmp_path)
    tune(DIRECTORY=str(tmp_path / "link"), NODE="web1")
    assert health() == (503, {"status": "unusable", "node": "web1"})
    assert health("/healthz?draining=404")[0] == 503
    assert "cannot serve sessions" in caplog.text


def test_no_store_is_made_to_drain_a_node(directory: Path) -> None:
    for action in ("drain", "resume"):
        with pytest.raises(CommandError, match="no sessions in memory"):
            run(action)
    assert not directory.exists()


def test_no_secret_is_told(runtime: Runtime, settings: Any) -> None:
    session = created(n=1, secret="do not tell")
    text = Client().get("/healthz").content.decode()
    for secret in (session.session_key, "do not tell", settings.SECRET_KEY):
        assert secret not in text
    assert str(connection.settings_dict["HOST"]) not in text
    assert str(runtime.store.directory) not in text


def test_it_is_only_read(runtime: Runtime) -> None:
    assert Client().post("/healthz").status_code == 405
    assert Client().head("/healthz").status_code == 200


def test_it_needs_no_login(settings: Any) -> None:
    settings.MIDDLEWARE = [
        *settings.MIDDLEWARE,
        "django.contrib.auth.middleware.LoginRequiredMiddleware",
    ]
    assert health()[0] == 200


def test_another_engine(settings: Any) -> None:
    settings.SESSION_ENGINE = "django.contrib.sessions.backends.signed_cookies"
    assert health() == (200, {"status": "not in use"})


def test_under_asgi(runtime: Runtime) -> None:
    from asgiref.sync import async_to_sync

    response = async_to_sync(AsyncClient().get)("/healthz")
    assert json.loads(response.content)["status"] == "ok"
