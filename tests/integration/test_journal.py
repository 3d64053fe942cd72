"""The journal under the engine: what a site gets back, and when logs are swapped and reset."""

from __future__ import annotations

import asyncio
import json
import shutil
import threading
import time
from collections.abc import Callable
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from django.core.management import CommandError, call_command

from deferred_sessions import agent
from deferred_sessions.backend import SessionStore
from deferred_sessions.management.commands import sessionstats
from deferred_sessions.memory.journal import Journal
from deferred_sessions.memory.log_file import HEADER_SIZE, Header
from deferred_sessions.models import Session
from deferred_sessions.runtime import Runtime, get_runtime, reset_runtime
from deferred_sessions.servers.listener import Listeners
from tests.integration.conftest import Outage, change, created, record, row
from tests.processes.conftest import wait_until

pytestmark = pytest.mark.django_db(transaction=True)
Call = Callable[..., Any]


@pytest.fixture
def journaled(tune: Callable[..., Runtime], tmp_path: Path) -> Callable[..., Runtime]:
    def make(**settings: Any) -> Runtime:
        directory = str(tmp_path / "journal")
        return tune(JOURNAL_DIRECTORY=directory, JOURNAL_SIZE=1 << 20, **settings)

    return make


def journal() -> Journal:
    found = get_runtime().store.journal
    assert found is not None
    return found


def lose_power(directory: Path) -> Runtime:
    """All processes end, and shared memory is gone."""
    reset_runtime()
    shutil.rmtree(directory)
    return get_runtime()


def test_d08_memory_log_and_database(journaled: Callable[..., Runtime], directory: Path) -> None:
    """D01, D08: log -> memory -> PostgreSQL; what was acknowledged is there, and lands."""
    journaled()
    changed, deleted = created(n=0), created(n=0)
    change(changed, n=1)
    change(deleted, n=1)
    runtime = lose_power(directory)

    assert SessionStore(changed.session_key).load() == {"n": 1}
    SessionStore(deleted.session_key).delete()
    runtime = lose_power(directory)
    assert SessionStore(changed.session_key).load() == {"n": 1}
    assert SessionStore(deleted.session_key).load() == {}
    report = runtime.flusher.flush_once(time.time())
    assert (report.failure, report.remaining) == ("", 0)
    assert row(changed.session_key) == {"n": 1}
    assert row(deleted.session_key) is None


def test_what_postgresql_has_already_is_not_void(
    journaled: Callable[..., Runtime], directory: Path
) -> None:
    """Flushed just before the crash: the same state, written by another incarnation."""
    runtime = journaled()
    session = created(n=0)
    change(session, n=1)
    runtime.flusher.flush_once(time.time(), everything=True)
    runtime = lose_power(directory)
    report = runtime.flusher.flush_once(time.time())

    assert (report.repeated, report.superseded, report.remaining) == (1, 0, 0)
    assert SessionStore(session.session_key).load() == {"n": 1}


def test_an_old_record_never_overwrites_a_newer_row(
    journaled: Callable[..., Runtime], directory: Path
) -> None:
    """The log lost its end; PostgreSQL had it."""
    runtime = journaled()
    session = created(n=0)
    change(session, n=1)
    journal().sync(time.time())
    log = directory.parent / "journal" / f"log.{journal().position()[0] & 1}"
    synced = log.read_bytes()
    change(session, n=2)
    runtime.flusher.flush_once(time.time(), everything=True)
    reset_runtime()
    log.write_bytes(synced)
    runtime = lose_power(directory)

    runtime.flusher.flush_once(time.time())
    assert row(session.session_key) == {"n": 2}
    assert SessionStore(session.session_key).load() == {"n": 2}


def test_a_logout_while_postgresql_is_away_survives_a_crash(
    journaled: Callable[..., Runtime], directory: Path, outage: Outage
) -> None:
    journaled()
    session = created(_auth_user_id="7")
    outage.begin()
    SessionStore(session.session_key).delete()
    created_meanwhile = created(n=1)
    outage.end()  # its address is part of the identity of a store
    runtime = lose_power(directory)
    assert SessionStore(session.session_key).load() == {}
    runtime.flusher.flush_once(time.time())
    assert row(session.session_key) is None
    assert row(created_meanwhile.session_key) == {"n": 1}


def test_d05_a_retired_log_is_reset_when_all_is_written(
    journaled: Callable[..., Runtime],
) -> None:
    """D04, D05: swapped by age; what stands in the way of the next swap is flushed."""
    runtime = journaled(JOURNAL_AGE=30.0)
    keeper, now = runtime.flusher.journal, time.time()
    session = created(n=0)
    change(session, n=1)
    keeper.keep_once(now)
    assert journal().position()[0] == 1
    keeper.keep_once(now + 31)
    assert journal().position() == (2, HEADER_SIZE)
    assert journal().retired() > HEADER_SIZE
    keeper.keep_once(now + 40)
    assert journal().retired() > HEADER_SIZE  # not in PostgreSQL yet

    again = SessionStore(session.session_key)
    again["n"] = 2
    again.save()
    keeper.keep_once(now + 62)
    assert row(session.session_key) == {"n": 2}
    assert journal().position()[0] == 3
    keeper.keep_once(now + 63)
    assert journal().retired() == 0 or not record(runtime, session).is_dirty


def test_d04_a_log_is_swapped_by_its_size(journaled: Callable[..., Runtime]) -> None:
    runtime = journaled()
    session = created(text="")
    for number in range(30):
        change(session, text=f"{number % 10}" * 50_000)
    assert journal().is_large()
    runtime.flusher.flush_once(time.time(), everything=True)
    assert journal().position() == (2, HEADER_SIZE)
    runtime.flusher.journal.keep_once(time.time())
    assert journal().retired() == 0


def test_postgresql_is_away_and_the_journal_is_full(
    journaled: Callable[..., Runtime], outage: Outage
) -> None:
    """The log grows up to its bound; then a save is an error, and changes nothing."""
    runtime = journaled()
    session = created(text="")
    outage.begin()
    saved = ""
    with pytest.raises(Exception, match="PostgreSQL"):
        for number in range(1000):
            text = f"{number % 10}" * 50_000
            change(session, text=text)
            saved = text
    assert SessionStore(session.session_key).load() == {"text": saved}
    outage.end()
    runtime.flusher.flush_once(time.time(), everything=True)
    assert row(session.session_key) == {"text": saved}
    change(session, text="short")
    assert SessionStore(session.session_key).load() == {"text": "short"}


def test_a_save_is_on_disk_when_it_returns(
    journaled: Callable[..., Runtime], call: Call, outage: Outage
) -> None:
    """SYNC_INTERVAL 0: save, create and delete, sync and async."""
    journaled(SYNC_INTERVAL=0)
    session = created(n=0)
    session["n"] = 1
    call(session, "save")
    assert journal().unsynced() == 0
    outage.begin()
    new = SessionStore()
    new["n"] = 1
    call(new, "save")
    assert journal().unsynced() == 0
    call(session, "delete")
    assert journal().unsynced() == 0
    with new.lock("n"):
        new["n"] = 2
    assert journal().unsynced() == 0
    assert SessionStore(new.session_key).load() == {"n": 2}


def test_waiting_for_the_disk_leaves_the_event_loop(
    journaled: Callable[..., Runtime], monkeypatch: pytest.MonkeyPatch
) -> None:
    journaled(SYNC_INTERVAL=0)
    session = created(n=0)
    threads: list[bool] = []
    real = Journal.wait

    def wait(self: Journal, now: float) -> None:
        try:
            asyncio.get_running_loop()
            threads.append(False)
        except RuntimeError:
            threads.append(True)
        real(self, now)

    monkeypatch.setattr(Journal, "wait", wait)

    async def work() -> None:
        again = SessionStore(session.session_key)
        await again.aset("n", 1)
        await again.asave()

    asyncio.run(work())
    assert threads == [True]


def test_a_saver_syncs_if_nobody_else_does(
    journaled: Callable[..., Runtime], monkeypatch: pytest.MonkeyPatch
) -> None:
    """No agent, no poller: at most a second or two of updates are at stake."""
    journaled()
    session = created(n=0)
    change(session, n=1)
    assert journal().unsynced() > 0
    monkeypatch.setattr(Journal, "is_behind", lambda *_: True)
    change(session, n=2)
    assert journal().unsynced() == 0


def test_the_agent_syncs(journaled: Callable[..., Runtime]) -> None:
    runtime = journaled(SYNC_INTERVAL=0.01)
    session = created(n=0)
    change(session, n=1)
    assert runtime.flusher.journal.interval == 0.01
    runtime.agent.keep_journal_once(time.time())
    assert journal().unsynced() == 0
    runtime.agent.start()
    change(session, n=2)
    deadline = time.monotonic() + 30
    while journal().unsynced():
        assert time.monotonic() < deadline
        time.sleep(0.005)
    runtime.agent.stop()


def test_the_agent_syncs_while_postgresql_hangs(
    journaled: Callable[..., Runtime], monkeypatch: pytest.MonkeyPatch
) -> None:
    """D01: what else the agent does, and waits for, takes nothing of the promise."""
    runtime, hangs = journaled(SYNC_INTERVAL=0.01), threading.Event()

    def hang(*_: object) -> set[str]:
        hangs.wait(60)
        return set()

    monkeypatch.setattr(agent, "ROUND", 60.0)
    monkeypatch.setattr(Listeners, "wait", hang)
    session = created(n=0)
    runtime.agent.start()
    try:
        for number in range(1, 4):
            change(session, n=number)
            wait_until(lambda: not journal().unsynced(), what="a sync", seconds=30)
    finally:
        hangs.set()
        runtime.agent.stop()


def test_trouble_with_the_journal_does_not_stop_the_flusher(
    journaled: Callable[..., Runtime], monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    runtime = journaled()
    session = created(n=0)
    change(session, n=1)

    def fail(*_: object) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(Journal, "sync", fail)
    assert runtime.flusher.flush_once(time.time(), everything=True).updated == 1
    assert "The journal is in trouble" in caplog.text
    assert Session.objects.count() == 1


def test_without_a_journal_there_is_nothing_to_keep(runtime: Runtime) -> None:
    runtime.flusher.journal.keep_once(time.time())
    runtime.flusher.journal.sync_once(time.time())
    assert runtime.flusher.journal.interval is None
    runtime.store.swap_journal(Header.new(1, "tests"), time.time())
    runtime.store.reset_journal(1)


# Commands


def run(*arguments: str) -> str:
    out = StringIO()
    call_command(*arguments, stdout=out)
    return out.getvalue()


def test_recoversessions(journaled: Callable[..., Runtime], directory: Path) -> None:
    """First a look, then all of it; and again, which finds nothing to do."""
    journaled()
    session = created(n=0)
    change(session, n=1)
    reset_runtime()
    shutil.rmtree(directory)
    look = run("recoversessions", "--check")
    assert "1 records of 1 sessions" in look
    assert "0 that only say that PostgreSQL has a session." in look
    assert not directory.exists()

    out = run("recoversessions")
    assert "1 sessions were in the journal" in out
    assert "1 rows were written, 0 are left." in out
    assert row(session.session_key) == {"n": 1}
    assert "Memory is intact" in run("recoversessions")
    assert "Memory is intact" in run("recoversessions", "--check")


def test_recoversessions_that_cannot_write(
    journaled: Callable[..., Runtime], outage: Outage
) -> None:
    journaled()
    change(created(n=0), n=1)
    outage.begin()
    with pytest.raises(CommandError, match="stay dirty"):
        run("recoversessions")


def test_recoversessions_without_a_journal(runtime: Runtime) -> None:
    with pytest.raises(CommandError, match="JOURNAL_DIRECTORY"):
        run("recoversessions")


def test_recoversessions_tells_of_other_logs(
    journaled: Callable[..., Runtime], tmp_path: Path
) -> None:
    (tmp_path / "journal").mkdir(mode=0o700)
    (tmp_path / "journal" / "log.0").write_bytes(b"something else")
    journaled()
    assert "is not a log of sessions" in run("recoversessions", "--check")


def test_d03_sessionstats(journaled: Callable[..., Runtime]) -> None:
    journaled()
    created(_auth_user_id="7")
    change(created(n=0), text="x" * 5000)
    figures = json.loads(run("sessionstats", "--json"))
    assert (figures["sessions"], figures["dirty"], figures["logged_in"]) == (2, 1, 1)
    assert figures["sessions_of_users"] == {"7": 1}
    assert figures["sizes"]["< 16 KiB"] == 1
    assert figures["space"]["allocated"] == 16 << 20
    assert figures["journal"]["unsynced_bytes"] > 5000

    out = run("sessionstats")
    assert "2 sessions, 1 of 1 users" in out
    assert "journal: log 1," in out
    assert "< 16 KiB          1 ####################" in out


def test_sessionstats_of_a_host_without_sessions(runtime: Runtime) -> None:
    with pytest.raises(CommandError, match="no sessions in memory"):
        run("sessionstats")
    assert not runtime.store.exists()


def test_sessionstats_shows_how_far_it_is(
    runtime: Runtime, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    created(n=1)
    created(n=2)
    monkeypatch.setattr(sessionstats, "STEP", 1)
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    run("sessionstats")
    assert "[####################                    ]  50%" in capsys.readouterr().err


def test_a_recovered_session_is_not_served_in_place_of_a_later_row(
    journaled: Callable[..., Runtime], directory: Path, call: Call
) -> None:
    """Written through after the last sync, say a login; the first load asks PostgreSQL."""
    journaled()
    session = created(n=0)
    change(session, n=1)
    journal().sync(time.time())
    log = directory.parent / "journal" / f"log.{journal().position()[0] & 1}"
    synced = log.read_bytes()
    change(session, _auth_user_id="7")
    reset_runtime()
    log.write_bytes(synced)
    runtime = lose_power(directory)

    again = SessionStore(session.session_key)
    assert call(again, "load") == {"n": 1, "_auth_user_id": "7"}
    change(session, n=2)
    assert runtime.flusher.flush_once(time.time(), everything=True).updated == 1
    assert row(session.session_key) == {"n": 2, "_auth_user_id": "7"}


def test_a_recovered_session_is_served_while_postgresql_is_away(
    journaled: Callable[..., Runtime], directory: Path, outage: Outage, call: Call
) -> None:
    journaled()
    session = created(n=0)
    change(session, n=1)
    lose_power(directory)
    SessionStore().exists("x" * 32)  # the store is open
    outage.begin()
    assert call(SessionStore(session.session_key), "load") == {"n": 1}
    outage.end()
    assert call(SessionStore(session.session_key), "load") == {"n": 1}
