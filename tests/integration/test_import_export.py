"""`importsessions` and `exportsessions`: all sessions of a site, there and back."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from importlib import import_module
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from django.contrib.sessions.models import Session as OldRow
from django.core.cache import caches
from django.core.management import CommandError, call_command
from django.db import connection

from deferred_sessions.adoption import Adoption
from deferred_sessions.backend import SessionStore
from deferred_sessions.exporting import Exporter
from deferred_sessions.management import progress
from deferred_sessions.models import Session
from deferred_sessions.runtime import Runtime, get_runtime
from testproject.brokers import redis
from tests.integration.conftest import Outage, change, created

pytestmark = pytest.mark.django_db(transaction=True)

DJANGO = "django.contrib.sessions.backends"


def run(*arguments: str) -> str:
    out = StringIO()
    call_command(*arguments, stdout=out)
    return out.getvalue()


@pytest.fixture(autouse=True)
def _empty(transactional_db: None) -> None:
    """Forget what other tests took over and deleted."""
    with connection.cursor() as cursor:
        cursor.execute("DELETE FROM deferred_sessions_adopted")
        cursor.execute("DELETE FROM deferred_sessions_revocation")


@pytest.fixture
def in_redis(settings: Any, tmp_path: Path) -> Iterator[None]:
    with redis(tmp_path / "redis") as url:
        backend = "django.core.cache.backends.redis.RedisCache"
        settings.CACHES = {
            "default": {"BACKEND": backend, "LOCATION": url, "KEY_PREFIX": "shop*[1]"},
            "other": {"BACKEND": backend, "LOCATION": url, "KEY_PREFIX": "shopxx1"},
        }
        yield
        for cache in caches.all():
            cache.close()


def sessions_of(engine: str, count: int) -> dict[str, dict[str, Any]]:
    """Create so many sessions of `engine`; return what is in each."""
    store: Any = import_module(f"{DJANGO}.{engine}").SessionStore
    if hasattr(store, "_storage_path"):
        del store._storage_path
    found = {}
    for number in range(count):
        session = store()
        session["n"], session["_auth_user_id"] = number, str(number)
        session.save()
        found[session.session_key] = dict(session.items())
    return found


def here() -> dict[str, dict[str, Any]]:
    return {row.pk: row.get_decoded() for row in Session.objects.all()}


def there() -> dict[str, dict[str, Any]]:
    return {row.pk: row.get_decoded() for row in OldRow.objects.all()}


@pytest.mark.parametrize("engine", ["db", "cached_db", "file"])
def test_all_sessions_are_taken_over(engine: str, settings: Any, tmp_path: Path) -> None:
    settings.SESSION_FILE_PATH = str(tmp_path)
    old = sessions_of(engine, 25)
    (tmp_path / "sessionid").write_text("")
    (tmp_path / "somebody-elses").write_text("")

    out = run("importsessions", "--engine", f"{DJANGO}.{engine}", "--batch", "10")

    assert out.startswith("25 sessions taken over in ")
    assert here() == old
    assert set(Session.objects.values_list("user_id", flat=True)) == set(map(str, range(25)))


def test_all_sessions_in_redis_are_taken_over(in_redis: None) -> None:
    """And nothing else that is there."""
    old = sessions_of("cache", 25)
    caches["default"].set("other", 1)
    caches["other"].set("django.contrib.sessions.cacheabcdefghij", {"n": 1})

    assert run("importsessions", "--engine", f"{DJANGO}.cache").startswith("25 sessions")
    assert here() == old


def test_what_cannot_be_listed_says_what_else_there_is() -> None:
    with pytest.raises(CommandError, match="cannot be listed. Set .*IMPORT_ENGINE"):
        run("importsessions", "--engine", f"{DJANGO}.cache")


def test_an_import_that_is_interrupted_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is here is left alone: it may have been changed, or deleted, meanwhile."""
    old = sessions_of("db", 25)
    batches = get_runtime() and Adoption.take_over_all

    def interrupted(self: Adoption, now: float, batch: int) -> Iterator[tuple[int, int]]:
        for number, done in enumerate(batches(self, now, batch)):
            if number == 2:
                raise KeyboardInterrupt
            yield done

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Adoption, "take_over_all", interrupted)
        run("importsessions", "--engine", f"{DJANGO}.db", "--batch", "5")
    came = sorted(here())
    assert 10 <= len(came) < 25
    change(SessionStore(came[0]), cart=1).persist()
    SessionStore().delete(came[1])

    out = run("importsessions", "--engine", f"{DJANGO}.db", "--batch", "5")

    assert out.startswith(f"{25 - len(came)} sessions taken over")
    assert set(here()) == set(old) - {came[1]}
    assert here()[came[0]] == {**old[came[0]], "cart": 1}
    assert run("importsessions", "--engine", f"{DJANGO}.db").startswith("0 sessions taken over")


def test_the_import_leaves_alone_what_has_expired_or_is_empty() -> None:
    keys = list(sessions_of("db", 3))
    OldRow.objects.filter(pk=keys[0]).update(expire_date="2020-01-01T00:00Z")
    OldRow.objects.filter(pk=keys[1]).update(session_data="damaged")

    out = run("importsessions", "--engine", f"{DJANGO}.db")

    assert out.startswith("1 sessions taken over")
    assert "2 were here before, have expired, or are empty" in out
    assert set(here()) == {keys[2]}


def test_the_import_of_the_engine_in_the_settings(tune: Callable[..., Runtime]) -> None:
    with pytest.raises(CommandError, match="Name the engine that the site used before"):
        run("importsessions")
    tune(IMPORT_ENGINE=f"{DJANGO}.db")
    old = sessions_of("db", 1)
    run("importsessions")
    assert here() == old


def test_mistakes_are_told() -> None:
    for arguments in (("--engine", "no.such.engine"), ("--engine", f"{DJANGO}.db", "--batch", "0")):
        for command in ("importsessions", "exportsessions"):
            with pytest.raises(CommandError, match="no session engine|--batch needs"):
                run(command, *arguments)
    with pytest.raises(CommandError, match="does not keep its sessions in a table"):
        run("exportsessions", "--engine", f"{DJANGO}.cache")
    with pytest.raises(CommandError, match="--since needs a date"):
        run("exportsessions", "--since", "yesterday")


def test_postgresql_is_away(outage: Outage) -> None:
    created(n=1)
    outage.begin()
    with pytest.raises(CommandError, match="could not count sessions: OperationalError"):
        run("importsessions", "--engine", f"{DJANGO}.db")
    with pytest.raises(CommandError, match="PostgreSQL"):
        run("exportsessions")


# Back


@pytest.fixture(params=["in one database", "in two databases"])
def layout(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Where the two tables are, as far as the export can tell."""
    if request.param == "in two databases":
        monkeypatch.setattr("deferred_sessions.exporting._place", lambda alias: (object(),))
    return str(request.param)


@pytest.mark.usefixtures("layout")
def test_all_sessions_go_back() -> None:
    """Also what PostgreSQL did not have yet; Django's own engine reads it."""
    sessions = [created(n=number) for number in range(25)]
    change(sessions[0], n="in memory")

    out = run("exportsessions", "--batch", "10")

    assert out.startswith("25 sessions copied in ")
    assert "25 of them new or changed; 0 deleted" in out
    assert there() == here()
    store: Any = import_module(f"{DJANGO}.db").SessionStore
    assert store(sessions[0].session_key)["n"] == "in memory"
    for row in OldRow.objects.all():
        assert row.expire_date == Session.objects.get(pk=row.pk).expire_date


@pytest.mark.usefixtures("layout")
def test_an_export_that_is_begun_again_writes_what_differs(monkeypatch: pytest.MonkeyPatch) -> None:
    sessions = [created(n=number) for number in range(25)]
    real = Exporter.copy

    def interrupted(self: Exporter, *arguments: Any) -> Iterator[Any]:
        yield next(real(self, *arguments))
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Exporter, "copy", interrupted)
        run("exportsessions", "--batch", "10")
    assert OldRow.objects.count() == 10
    change(sessions[0], n="new")

    out = run("exportsessions", "--batch", "10")

    written = 15 if str(sessions[0].session_key) not in sorted(here())[:10] else 16
    assert f"{written} of them new or changed" in out
    assert there() == here()


@pytest.mark.usefixtures("layout")
def test_the_second_export_of_a_deploy() -> None:
    """It brings what changed here, takes what was deleted here, and leaves alone the rest."""
    changed, left, deleted = (created(n=number) for number in range(3))
    Session.objects.update(written_at="2020-01-01T00:00Z")
    since = run("exportsessions").split("--since ")[1].strip()
    store: Any = import_module(f"{DJANGO}.db").SessionStore
    theirs = store(left.session_key)
    theirs["n"] = "changed by the other engine"
    theirs.save()
    change(changed, n="changed here")
    SessionStore().delete(deleted.session_key)

    out = run("exportsessions", "--since", since)

    assert "1 sessions copied" in out
    assert "1 deleted" in out
    assert there() == {
        changed.session_key: {"n": "changed here"},
        left.session_key: {"n": "changed by the other engine"},
    }


def test_what_a_cache_had_before_is_dropped() -> None:
    """`cached_db` would not look at the row else."""
    key = next(iter(sessions_of("cached_db", 1)))
    run("importsessions", "--engine", f"{DJANGO}.cached_db")
    change(SessionStore(key), n="changed here")

    run("exportsessions", "--engine", f"{DJANGO}.cached_db")

    store: Any = import_module(f"{DJANGO}.cached_db").SessionStore
    assert store(key)["n"] == "changed here"


def test_what_has_expired_stays() -> None:
    key = created(n=1).session_key
    Session.objects.filter(pk=key).update(expire_date="2020-01-01T00:00Z")
    get_runtime().revocations.read_once(time.time())
    run("exportsessions")
    assert there() == {}


# The bar


def test_a_bar_is_shown_to_whoever_watches(monkeypatch: pytest.MonkeyPatch) -> None:
    sessions_of("db", 3)
    errors = StringIO()
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    monkeypatch.setattr(progress, "PAUSE", 0.0)
    call_command(
        "importsessions",
        "--engine",
        f"{DJANGO}.db",
        "--batch",
        "1",
        stdout=StringIO(),
        stderr=errors,
    )
    assert "33%  1\r" in errors.getvalue()
    assert f"[{'#' * 40}] 100%  3\r" in errors.getvalue()


def test_a_bar_without_a_total_is_a_number() -> None:
    assert progress.bar(1234, None) == "1,234"
