"""Settings and system checks: what is refused, with which id, and what is understood."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from django.core.checks import run_checks
from django.core.exceptions import ImproperlyConfigured
from django.db import connections

from deferred_sessions.checks import check_settings
from deferred_sessions.conf import ROUTER, get_settings, problems, site
from deferred_sessions.identity import store_identity
from deferred_sessions.runtime import get_runtime


def ids() -> list[str | None]:
    return [message.id for message in check_settings()]


def test_the_defaults_are_right() -> None:
    assert list(problems({})) == []


def test_a06_the_interval_is_configurable(settings: Any) -> None:
    """A06: from seconds to minutes; ten seconds to five minutes is the usual range."""
    for interval in (0.5, 10, 60.0, 300):
        settings.DEFERRED_SESSIONS = {"FLUSH_INTERVAL": interval}
        assert ids() == []
        assert get_settings().policy.interval == interval


def test_the_checks_are_registered(settings: Any) -> None:
    """`manage.py check` finds them by itself."""
    settings.DEFERRED_SESSIONS = {"FLUSH_INTERVALL": 3}

    assert "deferred_sessions.E002" in [message.id for message in run_checks()]


@pytest.mark.parametrize("raw", [None, 3, "x", [("FLUSH_INTERVAL", 3)]])
def test_e001_not_a_dictionary(settings: Any, raw: Any) -> None:
    settings.DEFERRED_SESSIONS = raw

    assert ids() == ["deferred_sessions.E001"]


def test_e002_unknown_key(settings: Any) -> None:
    settings.DEFERRED_SESSIONS = {"flush_interval": 3, "JURNAL_DIRECTORY": "/x"}

    messages = check_settings()
    assert [m.id for m in messages] == ["deferred_sessions.E002"] * 2
    assert "FLUSH_INTERVAL" in str(messages[0].hint)


BAD: dict[str, list[Any]] = {
    "FLUSH_INTERVAL": [0, -1, "60", None, True, float("inf"), float("nan"), 1e308, 10**400],
    "FLUSH_AFTER_UPDATES": [0, 1, -1, 2.0, "2", True],
    "FLUSH_AFTER_REQUESTS": [0, 1, 2.5],
    "FLUSH_AT_REQUEST_END": [1, None, "yes"],
    "WRITE_ON_CREATE": [0],
    "WRITE_THROUGH_KEYS": ["_auth_user_id", None, [1]],
    "LOCKING": ["exclusiv", None, ["merge"]],
    "LOCK_TIMEOUT": [-1, "10", None, True, float("inf"), float("nan")],
    "AGENT": ["no", 1],
    "CREATE_WHEN_DOWN": ["no"],
    "BATCH_SIZE": [0, 10**9, 2.0, None],
    "DIRECTORY": ["relative/path", 3, "", "/dev/shm/nul\0"],
    "STORE_SIZE": [0, 1024, "256M", 1e9, 10**15],
    "JOURNAL_DIRECTORY": ["relative/path", 3, "", "/var/nul\0"],
    "JOURNAL_SIZE": [0, 1024, "64M", 10**15, None],
    "JOURNAL_AGE": [0, -1, "300", None, float("inf")],
    "SYNC_INTERVAL": [-0.1, 61, "0.1", None, True],
    "HEARTBEAT_INTERVAL": [0, "1", None],
    "NODE_TIMEOUT": [0, "10", None, float("inf")],
    "LISTEN": [3, ["default"]],
    "CACHE_SIZE": [-1, None, 1.5],
    "RECORD_CLIENT": [1, "yes", None],
    "TRUSTED_PROXIES": [-1, 11, 1.0, True, None],
    "NODE": ["", "a b", "-a", "é", "x" * 41, 1, "a;b", "a#b", "a\n"],
    "NODE_COOKIE": ["", "a b", "a-b", "1a", "x" * 65, 1, "a\n"],
    "SERVERS": ["default", [], {}, [3], None, ["a", "a"], [""], {"a": 0}, {"a": "1"}, {1: 1.0}],
    "IMPORT_ENGINE": ["", 1, "a b", "a.", ".a", "a\n"],
    "COPIES": [0, -1, 1.0, "2", None, True],
    "SERVER_TIMEOUT": [0, -1, "5", True, float("inf")],
}


@pytest.mark.parametrize(("key", "value"), [(k, v) for k, vs in BAD.items() for v in vs], ids=repr)
def test_e003_bad_value(settings: Any, key: str, value: Any) -> None:
    settings.DEFERRED_SESSIONS = {key: value}

    messages = check_settings()
    assert [m.id for m in messages] == ["deferred_sessions.E003"]
    assert key in messages[0].msg
    assert str(messages[0].hint).startswith("It must be ")
    with pytest.raises(ImproperlyConfigured, match=key):
        get_settings()


def test_every_setting_is_checked() -> None:
    from dataclasses import fields

    from deferred_sessions.conf import Settings

    assert {field.name.upper() for field in fields(Settings)} == BAD.keys()


GOOD: dict[str, list[Any]] = {
    "FLUSH_AFTER_UPDATES": [None, 2, 1000],
    "FLUSH_AFTER_REQUESTS": [None, 2],
    "DIRECTORY": [None, "/dev/shm/x", Path("/dev/shm/x")],
    "CACHE_SIZE": [0, 5],
    "WRITE_THROUGH_KEYS": [[], ("a",), ["a", "b"]],
    "TRUSTED_PROXIES": [0, 3],
    "NODE": [None, "web1", "1", "a.b-c_d"],
    "NODE_COOKIE": [None],
    "SERVERS": [["default"], ("default",), {"default": 1}, {"default": 2.5}],
    "COPIES": [1],
}


@pytest.mark.parametrize(("key", "value"), [(k, v) for k, vs in GOOD.items() for v in vs], ids=repr)
def test_good_values(settings: Any, key: str, value: Any) -> None:
    settings.DEFERRED_SESSIONS = {key: value}

    assert ids() == []
    get_settings()


def test_e004_expiry_below_twice_the_interval(settings: Any) -> None:
    """Trap 13 of the field: a session must not expire in PostgreSQL while it is in use."""
    settings.SESSION_COOKIE_AGE = 119

    assert ids() == ["deferred_sessions.E004"]
    settings.SESSION_COOKIE_AGE = 120
    assert ids() == []


def test_e005_unknown_database(settings: Any) -> None:
    settings.DEFERRED_SESSIONS = {"SERVERS": ["nosuch"]}

    assert ids() == ["deferred_sessions.E005"]


def test_e024_more_copies_than_servers(settings: Any) -> None:
    settings.DEFERRED_SESSIONS = {"COPIES": 2}
    assert ids() == ["deferred_sessions.E024"]
    with pytest.raises(ImproperlyConfigured, match="COPIES"):
        get_runtime()


def test_several_servers(settings: Any) -> None:
    """W021, that only one of them is used, has had its day."""
    settings.DEFERRED_SESSIONS = {"SERVERS": {"default": 1, "other": 2}}
    assert "deferred_sessions.W021" not in ids()
    assert get_runtime().fleet.wish.servers == (("default", 1.0), ("other", 2.0))
    assert get_settings().server_deadline == 5.0
    settings.DEFERRED_SESSIONS = {"SERVERS": ["default", "other"], "SERVER_TIMEOUT": 1.5}
    assert get_settings().server_deadline == 1.5
    settings.DEFERRED_SESSIONS = {}
    assert get_settings().server_deadline is None


def test_e041_several_servers_without_an_agent(settings: Any) -> None:
    settings.DEFERRED_SESSIONS = {"SERVERS": ["default", "other"], "AGENT": False}
    assert "deferred_sessions.E041" in ids()
    settings.DEFERRED_SESSIONS = {"AGENT": False}
    assert ids() == []


def test_w022_another_database_without_the_router(settings: Any) -> None:
    settings.DEFERRED_SESSIONS = {"SERVERS": ["other"]}
    settings.DATABASE_ROUTERS = []
    assert "deferred_sessions.W022" in ids()
    settings.DATABASE_ROUTERS = [ROUTER]
    assert "deferred_sessions.W022" not in ids()


def test_e008_exclusive_without_the_middleware(settings: Any) -> None:
    settings.DEFERRED_SESSIONS = {"LOCKING": "exclusive"}
    assert check_settings() == []
    settings.MIDDLEWARE = ["django.contrib.sessions.middleware.SessionMiddleware"]

    assert [m.id for m in check_settings()] == ["deferred_sessions.E008"]


def test_e021_a_node_without_a_name(settings: Any) -> None:
    settings.DEFERRED_SESSIONS = {"NODE_COOKIE": "sessionnode"}
    assert ids() == ["deferred_sessions.E021"]
    settings.DEFERRED_SESSIONS = {"NODE_COOKIE": "sessionnode", "NODE": "web1"}
    assert ids() == []


@pytest.mark.parametrize("name", ["sessionid", "csrftoken", "django_language", "messages"])
def test_e022_a_cookie_of_django(settings: Any, name: str) -> None:
    settings.DEFERRED_SESSIONS = {"NODE_COOKIE": name, "NODE": "web1"}
    assert ids() == ["deferred_sessions.E022"]


def test_e023_nobody_sets_the_cookie(settings: Any) -> None:
    settings.DEFERRED_SESSIONS = {"NODE_COOKIE": "sessionnode", "NODE": "web1"}
    settings.MIDDLEWARE = ["django.contrib.sessions.middleware.SessionMiddleware"]
    assert [m.id for m in check_settings()] == ["deferred_sessions.E023"]


@pytest.mark.parametrize(
    ("allowed", "host"),
    [
        ([], "localhost"),
        (["*"], "localhost"),
        (["*", "shop.example.com"], "shop.example.com"),
        ([".example.com"], "example.com"),
    ],
)
def test_the_host_that_checks_ask_for(settings: Any, allowed: list[str], host: str) -> None:
    settings.ALLOWED_HOSTS = allowed
    assert site().host == host


def test_e006_not_postgresql(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(connections["default"]), "vendor", "sqlite")

    assert ids() == ["deferred_sessions.E006"]


def test_w001_not_used(settings: Any) -> None:
    settings.SESSION_ENGINE = "django.contrib.sessions.backends.db"

    assert ids() == ["deferred_sessions.W001"]


def test_settings_are_frozen_and_follow_overrides(settings: Any) -> None:
    before = get_settings()
    assert get_settings() is before
    with pytest.raises(AttributeError):
        before.flush_interval = 3.0  # type: ignore[misc]

    settings.DEFERRED_SESSIONS = {"FLUSH_INTERVAL": 5.0}

    assert get_settings().flush_interval == 5.0


def test_all_problems_are_told_at_once(settings: Any) -> None:
    settings.DEFERRED_SESSIONS = {"NOPE": 1, "BATCH_SIZE": 0}

    with pytest.raises(ImproperlyConfigured, match=r"NOPE.*BATCH_SIZE"):
        get_settings()


def test_the_identity_survives_key_rotation_and_moves(settings: Any) -> None:
    """Neither a new SECRET_KEY nor a new release directory parts a site from its sessions."""
    before = store_identity()
    settings.SECRET_KEY = "another" * 10
    settings.BASE_DIR = Path("/srv/releases/2")

    assert store_identity() == before
    settings.ROOT_URLCONF = "another.urls"  # as tests do; the project is the same
    assert store_identity() == before
    assert before.startswith("testproject.urls@")


def test_the_identity_survives_other_session_servers(
    settings: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Unless the default database may be a file, whose path changes with each release."""
    before = store_identity()
    monkeypatch.setitem(connections.settings, "other", {**connections.settings["default"]})
    monkeypatch.setitem(connections["other"].settings_dict, "NAME", "sessions")
    try:
        settings.DEFERRED_SESSIONS = {"SERVERS": ["other"]}
        assert store_identity() == before
        monkeypatch.setattr(type(connections["default"]), "vendor", "sqlite")
        assert store_identity().endswith("/sessions")
    finally:
        del connections["other"]


def test_nothing_is_opened_by_a_check(settings: Any, directory: Path) -> None:
    check_settings()

    assert not directory.exists()


@pytest.mark.parametrize(
    "engine",
    [
        "no.such.engine",
        "deferred_sessions.backend",
        "django.contrib.sessions.backends.signed_cookies",
        "tests.unit.not_an_engine",
    ],
)
def test_e031_no_engine_to_take_over(settings: Any, engine: str) -> None:
    settings.DEFERRED_SESSIONS = {"IMPORT_ENGINE": engine}
    assert [m.id for m in check_settings()] == ["deferred_sessions.E031"]


@pytest.mark.parametrize("engine", ["db", "cache", "cached_db", "file"])
def test_the_engines_that_can_be_taken_over(settings: Any, engine: str) -> None:
    settings.DEFERRED_SESSIONS = {"IMPORT_ENGINE": f"django.contrib.sessions.backends.{engine}"}
    assert check_settings() == []
