"""Leases on real PostgreSQL: several nodes in turn, in one process."""

from __future__ import annotations

import json
import logging
import random
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from django.core.management import CommandError, call_command
from django.db import connection, transaction
from django.utils import timezone

from deferred_sessions.backend import SessionStore
from deferred_sessions.exceptions import RowLockedError, SessionBusy
from deferred_sessions.memory.counters import Counter
from deferred_sessions.memory.pulse import moment
from deferred_sessions.models import Node, RefusedWrite, Session
from deferred_sessions.runtime import Runtime, get_runtime
from deferred_sessions.servers.leases import Leases
from deferred_sessions.servers.rows import Answer, Columns
from deferred_sessions.servers.server import SessionServer
from deferred_sessions.signals import session_fenced
from tests.integration.conftest import Outage, change, created, record, row, second_connection

pytestmark = pytest.mark.django_db(transaction=True)
NOW = 1_800_000_000.0
KEY = "aaaaaaaa"


@pytest.fixture(autouse=True)
def _empty_queue() -> None:
    with connection.cursor() as cursor:
        cursor.execute("DELETE FROM deferred_sessions_waiter")


def named(name: str) -> Leases:
    return Leases(SessionServer("default", owner=lambda: name))


def insert(owner: str | None, key: str = KEY) -> None:
    Session.objects.create(
        session_key=key, session_data="x", expire_date=timezone.now(), owner=owner
    )


def granted_to(key: str = KEY) -> tuple[str | None, int]:
    found = Session.objects.get(pk=key)
    return found.owner, found.fence


# The functions in the database


def test_c06_a_free_lease_is_granted() -> None:
    """C06: nobody has it; fence + 1."""
    insert(None)
    grant = named("a#1").acquire(KEY)
    assert (grant.answer, grant.owner) == (Answer.GRANTED, "a#1")
    assert grant.row is not None
    assert (grant.row.data, grant.row.fence) == ("x", 1)
    assert granted_to() == ("a#1", 1)


def test_c02_kept_until_asked_for(django_assert_num_queries: Any) -> None:
    """C02: a node's own lease costs a read, and the fence stays."""
    insert("a#1")
    xmin = "SELECT xmin FROM deferred_sessions_session"
    with connection.cursor() as cursor:
        before = cursor.execute(xmin).fetchall()
        with django_assert_num_queries(1):
            assert named("a#1").acquire(KEY).answer is Answer.GRANTED
        assert cursor.execute(xmin).fetchall() == before
    assert granted_to() == ("a#1", 0)


def test_c01_one_node_at_a_time() -> None:
    """C01: the other one is queued, until the first lets go; then the first is."""
    first, second = named("a#1"), named("b#1")
    insert(None)
    assert first.acquire(KEY).answer is Answer.GRANTED
    grant = second.acquire(KEY)
    assert (grant.answer, grant.row, grant.owner) == (Answer.QUEUED, None, "a#1")
    assert first.requested() == {KEY: 1}
    assert first.release({KEY: 1}) == {KEY: True}
    assert granted_to() == ("b#1", 2)
    assert second.requested() == {}
    assert second.acquire(KEY, waits=True).answer is Answer.GRANTED
    assert first.acquire(KEY).answer is Answer.QUEUED
    assert second.requested() == {KEY: 2}


def test_a_lease_that_was_given_a_moment_ago_is_not_asked_back() -> None:
    """Or the waiter would never get to use it."""
    first, second, third = named("a#1"), named("b#1"), named("c#1")
    insert("a#1")
    second.acquire(KEY)
    third.acquire(KEY)
    first.release({KEY: 0})
    assert second.requested() == {}
    second.acquire(KEY, waits=True)
    assert second.requested() == {KEY: 1}


def test_an_old_fence_releases_nothing() -> None:
    """An agent that stopped in the middle comes back to it."""
    insert("a#1")
    Session.objects.update(fence=7)
    assert named("a#1").release({KEY: 6}) == {KEY: False}
    assert named("b#1").release({KEY: 7}) == {KEY: False}
    assert granted_to() == ("a#1", 7)
    assert named("a#1").release({KEY: 7}) == {KEY: True}
    assert granted_to() == (None, 7)


def test_nothing_waits_for_a_session_that_is_gone() -> None:
    insert("a#1")
    second = named("b#1")
    second.acquire(KEY)
    Session.objects.all().delete()
    assert second.acquire(KEY, waits=True).answer is Answer.GONE
    assert waiters() == []


def test_who_is_not_seen_is_passed_over() -> None:
    insert("a#1")
    second, third = named("b#1"), named("c#1")
    second.acquire(KEY)
    third.acquire(KEY)
    age("b#1", 4)
    named("a#1").release({KEY: 0})
    assert granted_to() == ("c#1", 1)
    age("c#1", 61)
    third.beat({})
    assert waiters() == ["b#1"]


def test_a_full_queue() -> None:
    insert("a#1")
    for number in range(100):
        assert named(f"n{number}#1").acquire(KEY).answer is Answer.QUEUED
    assert named("b#1").acquire(KEY).answer is Answer.FULL
    assert named("n7#1").acquire(KEY, waits=True).answer is Answer.QUEUED


def test_an_earlier_incarnation_is_no_other_node() -> None:
    """Its memory is lost: nobody needs to be waited for."""
    insert("a#1")
    assert named("a#2").acquire(KEY).answer is Answer.GRANTED
    assert granted_to() == ("a#2", 1)


def test_an_owner_nobody_has_heard_of_is_watched() -> None:
    """It may be about to register; if it does not, it will be found dead."""
    insert("elsewhere#1")
    assert named("a#1").acquire(KEY).answer is Answer.QUEUED
    assert Node.objects.get().node == "elsewhere#1"
    assert named("a#1").declare_dead("elsewhere#1", 0)
    assert named("a#1").acquire(KEY, waits=True).answer is Answer.GRANTED
    assert granted_to() == ("a#1", 1)


def test_a_heartbeat_saves_a_node() -> None:
    """Its number has moved since it was seen last."""
    first = named("a#1")
    first.beat({}, "join")
    assert not named("b#1").declare_dead("a#1", 7)
    assert first.beat({})[0].beat == 1
    assert not named("b#1").declare_dead("a#1", 0)
    assert named("b#1").declare_dead("a#1", 1)
    assert [beat.is_dead for beat in first.beat({})] == [True]
    assert [beat.is_dead for beat in first.beat({}, "revive")] == [False]


def test_a_held_row_is_not_waited_for_long() -> None:
    insert(None)
    with second_connection() as other, other.transaction():
        other.execute("SELECT * FROM deferred_sessions_session FOR UPDATE")
        with pytest.raises(RowLockedError):
            named("a#1").acquire(KEY)


def test_a_queue_does_not_wait_for_a_flush() -> None:
    """The owner's batch holds the row; to ask for it needs no more than to see it."""
    insert("a#1")
    with second_connection() as other, other.transaction():
        other.execute("UPDATE deferred_sessions_session SET session_data = 'y'")
        assert named("b#1").acquire(KEY).answer is Answer.QUEUED


def test_anything_in_any_order() -> None:
    """Real functions, random steps: one writer per fence, and the queue is served in order."""
    for seed in range(12):
        Session.objects.all().delete()
        Node.objects.all().delete()
        insert(None)
        Random(seed).run(80)


class Random:
    """Three nodes that do anything; remembers what may have been written by whom."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.servers = [SessionServer("default", owner=lambda n=n: f"{n}#1") for n in "abc"]
        self.nodes = [Leases(server) for server in self.servers]
        self.fences: list[int | None] = [None] * 3  # under which each believes to have it
        self.waits = [False] * 3
        self.version = 1
        self.writers: dict[int, str] = {}

    def run(self, steps: int) -> None:
        for _ in range(steps):
            n = self.random.randrange(3)
            step = self.random.choice([self.acquire, self.acquire, self.write, self.release])
            (step if self.random.random() < 0.95 else self.die)(n)

    def acquire(self, n: int) -> None:
        grant = self.nodes[n].acquire(KEY, waits=self.waits[n])
        self.waits[n] = grant.answer is Answer.QUEUED
        if grant.row is not None:
            self.fences[n] = grant.row.fence

    def write(self, n: int) -> None:
        fence, name = self.fences[n], "abc"[n]
        if fence is None:
            return
        self.version += 1
        columns = Columns([KEY], [name], [NOW], [self.version], [fence], [""], [NOW])
        if self.servers[n].update(columns, NOW):
            assert self.writers.setdefault(fence, name) == name
            assert fence == max([fence, *self.writers])
        else:
            assert granted_to()[1] > fence or granted_to()[0] != f"{name}#1"
            self.fences[n] = None

    def release(self, n: int) -> None:
        fence = self.fences[n]
        if fence is not None:
            first = (waiters() or [None])[0]
            if self.nodes[n].release({KEY: fence})[KEY]:
                assert granted_to()[0] == first
            self.fences[n] = None

    def die(self, n: int) -> None:
        """The others find it dead; it finds out only when it writes."""
        self.nodes[n].beat({}, "revive")
        beat = Node.objects.get(pk=f"{'abc'[n]}#1").beat
        assert self.nodes[n].declare_dead(f"{'abc'[n]}#1", beat)
        self.waits[n] = False


def waiters() -> list[str]:
    with connection.cursor() as cursor:
        query = (
            "SELECT node FROM deferred_sessions_waiter WHERE granted_at IS NULL AND node NOT IN "
            "(SELECT node FROM deferred_sessions_node WHERE died_at IS NOT NULL) ORDER BY id"
        )
        return [name for (name,) in cursor.execute(query).fetchall()]


def age(node: str, seconds: int) -> None:
    with connection.cursor() as cursor:
        cursor.execute(
            "UPDATE deferred_sessions_waiter SET seen_at = seen_at - %s * interval '1 s' "
            "WHERE node = %s",
            [seconds, node],
        )


# Whole nodes


@pytest.fixture
def as_node(settings: Any, tmp_path: Path) -> Callable[..., Runtime]:
    """Be another node from now on."""

    def become(name: str, **changes: Any) -> Runtime:
        settings.DEFERRED_SESSIONS = {
            "DIRECTORY": str(tmp_path / name),
            "STORE_SIZE": 16 << 20,
            "NODE": name,
            "LOCK_TIMEOUT": 0.3,
            **changes,
        }
        return get_runtime()

    return become


def let_go(runtime: Runtime) -> bool:
    """Be the agent of that node for a moment."""
    return runtime.handover.release_once(time.time() + 1)


def passed_on(session: SessionStore, as_node: Callable[..., Runtime]) -> Runtime:
    """Have node b ask for what node a has, a let go of it, and b take it in."""
    key = session.session_key or ""
    as_node("b")
    with pytest.raises(SessionBusy):
        SessionStore(key).load()
    get_runtime().leases.acquire(key)  # stands in the queue again: who gave up has left it
    assert not let_go(as_node("a"))
    as_node("b").leases.acquire(key, waits=True)
    return get_runtime()


def test_a_dirty_session_is_written_before_it_goes(as_node: Callable[..., Runtime]) -> None:
    as_node("a")
    session = change(created(n=1), n=2)
    b = passed_on(session, as_node)
    assert row(session.session_key) == {"n": 2}
    assert SessionStore(session.session_key).load() == {"n": 2}
    assert b.store.get(session.session_key or "").fence == 1  # type: ignore[union-attr]
    assert as_node("a").counters.totals()[Counter.HANDED_OVER] == 1


def test_a_request_under_way_gets_it_back_and_merges(as_node: Callable[..., Runtime]) -> None:
    """It had loaded the session before it was handed over."""
    as_node("a")
    session = created(n=1)
    late = SessionStore(session.session_key)
    late["a"] = "late"
    passed_on(session, as_node)
    change(session, b="meanwhile")
    as_node("a").leases.acquire(session.session_key or "")
    let_go(as_node("b"))
    as_node("a")
    late.save()
    assert late.load() == {"n": 1, "a": "late", "b": "meanwhile"}


def test_what_is_in_use_stays(as_node: Callable[..., Runtime]) -> None:
    """A lock on a portion keeps the session here, and newcomers behind who waits elsewhere."""
    a = as_node("a")
    session = created(n=1)
    key = session.session_key or ""
    with session.lock("n"):
        named("b#1").acquire(key)
        assert let_go(a)
        assert a.handover.is_wanted(key)
        session["n"] = 2
        with session.lock("n"):  # its own holder does not wait
            pass
        began = time.monotonic()
        claim = a.claims.hold(key, frozenset({"other"}), "newcomer", 0.05)
        assert time.monotonic() - began >= 0.05
        assert claim is not None
        a.claims.release(claim)
    assert not let_go(a)
    assert not a.handover.is_wanted(key)
    assert granted_to(key) == ("b#1", 1)
    assert row(key) == {"n": 2}


def test_what_was_loaded_just_now_stays_a_moment(as_node: Callable[..., Runtime]) -> None:
    a = as_node("a")
    session = created(n=1)
    named("b#1").acquire(session.session_key or "")
    assert a.handover.release_once(record(a, session).entered_at)
    assert a.store.head(session.session_key or "") is not None
    assert not let_go(a)


def test_the_agent_dies_while_it_gives_up(
    as_node: Callable[..., Runtime], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gone from memory, not yet passed on: nobody takes it in, and the next agent goes on."""
    a = as_node("a")
    session = created(n=1)
    key = session.session_key or ""
    named("b#1").acquire(key)

    def die(*_: object) -> int:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(a.leases, "release", die)
        with pytest.raises(KeyboardInterrupt):
            let_go(a)
    assert a.store.handing_over() == {key: 0}
    with pytest.raises(SessionBusy):
        SessionStore(key).load()
    assert granted_to(key)[0] == a.server.owner()
    a.handover.release_once(time.time(), ask=False)
    assert granted_to(key) == ("b#1", 1)
    assert a.store.handing_over() == {}


def test_a_row_that_was_read_before_is_not_kept(
    as_node: Callable[..., Runtime], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The load was granted the lease that it had; then the agent gave it up."""
    a = as_node("a")
    session = created(n=1)
    key = session.session_key or ""
    a.store.update(key, lambda _: None)
    real = a.leases.acquire

    def slow(key: str, **options: bool) -> Any:
        grant = real(key, **options)
        monkeypatch.undo()
        named("b#1").acquire(key)
        let_go(a)
        return grant

    monkeypatch.setattr(a.leases, "acquire", slow)
    with pytest.raises(SessionBusy):
        SessionStore(key).load()
    assert a.store.head(key) is None


@pytest.mark.parametrize("deadly", [False, True], ids=["unchanged", "changed by others"])
def test_found_dead_with_unsaved_changes(as_node: Callable[..., Runtime], deadly: bool) -> None:
    """Nothing is lost that nobody contradicted; the rest is refused, kept and told."""
    a = as_node("a")
    session = change(created(n=1), mine=True)
    key = session.session_key or ""
    a.membership.beat_once(time.time())
    told: list[dict[str, Any]] = []
    session_fenced.connect(tell := lambda **found: told.append(found))
    kill(a)
    as_node("b")
    assert SessionStore(key).load() == {"n": 1}
    if deadly:
        change(session, n=3)
        get_runtime().flusher.flush_once(time.time(), everything=True)
    named(get_runtime().server.owner()).release({key: granted_to(key)[1]})

    a = as_node("a")
    a.membership.beat_once(time.time())
    expected = {"n": 3} if deadly else {"n": 1, "mine": True}
    assert SessionStore(key).load() == expected
    a.flusher.flush_once(time.time() + 100)
    assert row(key) == expected
    refused = [(w.changed_keys, w.node) for w in RefusedWrite.objects.all()]
    assert refused == ([(["mine", "n"], a.server.owner())] if deadly else [])
    assert [t["keys"] for t in told] == ([["mine", "n"]] if deadly else [])
    assert a.counters.totals()[Counter.FENCED] == deadly
    session_fenced.disconnect(tell)


def kill(runtime: Runtime) -> None:
    """Have that node found dead."""
    node = Node.objects.get(pk=runtime.server.owner())
    assert named("judge#1").declare_dead(node.node, node.beat)


def test_the_flusher_finds_out_by_itself(
    as_node: Callable[..., Runtime], caplog: pytest.LogCaptureFixture
) -> None:
    a = as_node("a")
    session = change(created(n=1), mine=True)
    a.membership.beat_once(time.time())
    kill(a)
    as_node("b")
    change(session, n=3)
    a = as_node("a")
    with caplog.at_level(logging.WARNING):
        report = a.flusher.flush_once(time.time() + 100)
    assert (report.fenced, report.remaining) == (1, 0)
    assert "1 changes of sessions that have passed to another node were refused" in caplog.text
    assert session.session_key not in caplog.text
    assert a.store.get(session.session_key or "") is None
    assert RefusedWrite.objects.count() == 1


def test_a_login_under_an_old_fence_is_an_error(as_node: Callable[..., Runtime]) -> None:
    """What must not wait is not acknowledged if it was refused."""
    a = as_node("a")
    session = created(n=1)
    a.membership.beat_once(time.time())
    again = SessionStore(session.session_key)
    again.load()
    kill(a)
    as_node("b")
    change(session, n=3)
    as_node("a")
    again["_auth_user_id"] = "7"
    with pytest.raises(SessionBusy, match="has passed to another node"):
        again.save()
    with pytest.raises(SessionBusy):
        SessionStore(session.session_key).load()


def test_an_outage_makes_nobody_doubt(
    as_node: Callable[..., Runtime], outage: Outage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No heartbeat gets through, and sessions are served all the same."""
    a = as_node("a")
    session = created(n=1)
    a.membership.beat_once(time.time())
    outage.begin()
    a.pulse.beat(moment() - 60)
    assert SessionStore(session.session_key).load() == {"n": 1}
    change(session, n=2)
    outage.end()


def test_who_woke_up_asks_before_it_serves(as_node: Callable[..., Runtime]) -> None:
    """No heartbeat for too long: the request beats itself, and hears that the node was dead."""
    a = as_node("a")
    session = created(n=1)
    a.membership.beat_once(time.time())
    kill(a)
    as_node("b")
    change(session, n=2)
    get_runtime().flusher.flush_once(time.time(), everything=True)
    named(get_runtime().server.owner()).release({session.session_key or "": 1})
    a = as_node("a")
    a.pulse.beat(moment() - 60)
    assert SessionStore(session.session_key).load() == {"n": 2}


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def watcher(as_node: Callable[..., Runtime]) -> tuple[Any, Clock]:
    """A node that watches another, and its clock."""
    named("other#1").beat({}, "join")
    node, clock = as_node("a", NODE_TIMEOUT=10.0), Clock()
    membership = node.membership.at("default")
    membership._clock = clock
    return membership, clock


def test_found_dead_after_the_timeout(watcher: tuple[Any, Clock]) -> None:
    membership, clock = watcher
    for _ in range(11):
        assert membership.beat_once(NOW) == []
        clock.now += 1.0
    assert membership.beat_once(NOW) == ["other#1"]
    assert membership.beat_once(NOW) == []


def test_a_gap_of_ones_own_kills_nobody(watcher: tuple[Any, Clock]) -> None:
    """PostgreSQL was away, or this node was stopped: the watch begins anew."""
    membership, clock = watcher
    for gap in (9.0, 1.0, 60.0, 1.0, 9.0):
        assert membership.beat_once(NOW) == []
        clock.now += gap
    assert membership.beat_once(NOW) == []


def test_heartbeats_keep_a_node_alive(watcher: tuple[Any, Clock]) -> None:
    membership, clock = watcher
    for _ in range(40):
        named("other#1").beat({})
        assert membership.beat_once(NOW) == []
        clock.now += 1.0


def test_rotated_keys_can_still_be_read(
    as_node: Callable[..., Runtime], settings: Any, caplog: pytest.LogCaptureFixture
) -> None:
    as_node("a").membership.beat_once(NOW)
    settings.SECRET_KEY_FALLBACKS = [settings.SECRET_KEY]
    settings.SECRET_KEY = "new" * 20
    with caplog.at_level(logging.ERROR):
        as_node("b").membership.beat_once(NOW)
        assert caplog.text == ""
        settings.SECRET_KEY_FALLBACKS = []
        as_node("c").membership.beat_once(NOW)
    assert "Node a differs from this one in: SECRET_KEY" in caplog.text
    assert settings.SECRET_KEY not in json.dumps(list(Node.objects.values_list("traits")))


# Transactions of the application


def test_a_lease_outlives_a_rollback(as_node: Callable[..., Runtime]) -> None:
    """Taken beside the transaction; memory relies on it."""
    as_node("a")
    session = created(n=1)
    named(get_runtime().server.owner()).release({session.session_key or "": 0})
    b = as_node("b")
    with transaction.atomic():
        assert SessionStore(session.session_key).load() == {"n": 1}
        transaction.set_rollback(True)
    assert granted_to(session.session_key or "") == (b.server.owner(), 1)
    assert b.store.get(session.session_key or "") is not None


def test_a_row_that_the_transaction_holds_is_read_and_not_kept(
    as_node: Callable[..., Runtime],
) -> None:
    as_node("a")
    session = created(n=1)
    named(get_runtime().server.owner()).release({session.session_key or "": 0})
    b = as_node("b")
    with transaction.atomic():
        Session.objects.select_for_update().get()
        assert SessionStore(session.session_key).load() == {"n": 1}
    assert b.store.get(session.session_key or "") is None
    assert granted_to(session.session_key or "") == (None, 0)


# Commands


def test_c04_a_node_gives_up_by_itself(
    as_node: Callable[..., Runtime], capsys: pytest.CaptureFixture[str]
) -> None:
    """C04: drainsessions; then others need not ask."""
    a = as_node("a")
    sessions = [change(created(n=number), m=number) for number in range(3)]
    a.store.update(sessions[0].session_key or "", lambda r: r)
    call_command("drainsessions")
    assert "3 sessions released" in capsys.readouterr().out
    assert a.store.status().records == 0
    assert set(Session.objects.values_list("owner", flat=True)) == {None}
    as_node("b")
    assert SessionStore(sessions[1].session_key).load() == {"n": 1, "m": 1}


def test_draining_waits_for_requests(as_node: Callable[..., Runtime]) -> None:
    as_node("a")
    session = created(n=1)
    with session.lock("n"), pytest.raises(CommandError, match="1 sessions stay"):
        call_command("drainsessions", "--timeout=0.1")
    done = threading.Event()

    def work() -> None:
        with session.lock("n"):
            done.set()
            time.sleep(0.2)
        connection.close()

    thread = threading.Thread(target=work)
    thread.start()
    done.wait()
    call_command("drainsessions", verbosity=0)
    thread.join()
    assert granted_to(session.session_key or "") == (None, 0)


def test_draining_nothing(as_node: Callable[..., Runtime], capsys: Any) -> None:
    as_node("a")
    call_command("drainsessions")
    assert "has no sessions" in capsys.readouterr().out


def test_draining_during_an_outage(as_node: Callable[..., Runtime], outage: Outage) -> None:
    as_node("a")
    change(created(n=1), n=2)
    outage.begin()
    with pytest.raises(CommandError, match="1 sessions stay dirty"):
        call_command("drainsessions")


def test_nodes_and_refused_writes_are_listed(
    as_node: Callable[..., Runtime], capsys: pytest.CaptureFixture[str]
) -> None:
    a = as_node("a")
    session = change(created(n=1), mine=True)
    a.membership.beat_once(time.time())
    kill(a)
    as_node("b")
    change(session, n=3)
    as_node("a").flusher.flush_once(time.time() + 100)
    call_command("sessionnodes")
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines[1:]] == [["a", "dead"]]
    assert lines[1].split()[-2:] == ["0", "1"]
    call_command("sessionnodes", "--refused")
    listed = capsys.readouterr().out
    assert "by a, fence 0, version 2; b has fence 1; differs in: mine" in listed
    assert session.session_key not in listed
