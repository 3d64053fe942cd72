"""Copying rows from one session server to another while both are in use."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

import psycopg
import pytest
from django.db import connections

from deferred_sessions.exceptions import RowLockedError, ServerUnavailableError
from deferred_sessions.models import Session
from deferred_sessions.servers import repair_sql
from deferred_sessions.servers import shelf as shelves
from deferred_sessions.servers.mender import Mender, Tally
from deferred_sessions.servers.shelf import Shelf
from deferred_sessions.servers.standing import FILLING, IN, ORDER, Standing
from deferred_sessions.servers.view import View
from tests.integration.fleets import (
    ALIASES,
    Servers,
    _databases,  # noqa: F401 - a fixture
    _fleet,  # noqa: F401 - a fixture
    created_at,
    place,
    servers,  # noqa: F401 - a fixture
)

pytestmark = pytest.mark.django_db(transaction=True)
A, B, C = ALIASES


def mender(servers: Servers, *, filling: str = C) -> Mender:  # noqa: F811
    """Return one that fills a server."""
    fleet, now = servers.runtime.fleet, time.time()
    phases = {alias: FILLING if alias == filling else IN for alias in ALIASES}
    standings = {alias: Standing(alias, 1, phase, now) for alias, phase in phases.items()}
    order = Standing(ORDER, 1, fleet.wish.kept().encoded(), now)
    return Mender(rows(servers), View(wish=fleet.wish, standings={**standings, ORDER: order}))


def rows(servers: Servers) -> Mapping[str, Shelf]:  # noqa: F811
    return {server.alias: Shelf(server) for server in servers.runtime.fleet.servers}


def misplaced(servers: Servers, count: int) -> list[str]:  # noqa: F811
    """Return keys of sessions that belong on C, and are on A: two at least."""
    keys: list[str] = []
    ranked = servers.runtime.fleet.view().placement.ranked

    def of_a() -> list[str]:  # A is the authority of those that it comes before B for
        return sorted(key for key in keys if ranked(key).index(A) < ranked(key).index(B))

    while len(keys) < count or len(of_a()) < 2:
        session = created_at(servers, C, n=1)
        row = servers.row(session.session_key, C)
        assert row is not None
        row.save(using=A, force_insert=True)
        keys.append(str(session.session_key))
    Session.objects.using(C).all().delete()
    with connections[C].cursor() as cursor:
        cursor.execute("DELETE FROM deferred_sessions_revocation")
    return of_a()


def meanwhile(patch: pytest.MonkeyPatch, work: Callable[[], object]) -> None:
    """Have this done while the first page is on its way, before the second is read."""
    read = Shelf.page

    def page(shelf: Shelf, after: str) -> Any:
        if after:
            work()
        return read(shelf, after)

    patch.setattr(Shelf, "page", page)


@pytest.mark.parametrize("most", [1, 2, 50])
def test_pages_are_read_ahead(servers: Servers, monkeypatch: Any, most: int) -> None:  # noqa: F811
    """However many at a time: all rows arrive, each page is looked at once, and the end is seen."""
    keys = misplaced(servers, 12)
    monkeypatch.setattr(shelves, "PART", 2)
    after, tally, is_last = "", Tally(), False
    while not is_last:
        page = mender(servers).fill(A, C, after, most)
        after, tally, is_last = str(page.after), tally + page.tally, page.is_last

    assert [key for key in keys if servers.row(key, C)] == keys
    assert tally == Tally(servers.counts(A)[0], len(keys), 0)


def test_what_is_there_already_is_left_alone(servers: Servers) -> None:  # noqa: F811
    """A page that is done twice copies nothing, nor does an older row replace a newer one."""
    keys = misplaced(servers, 6)
    mender(servers).fill(A, C, "")
    Session.objects.using(C).filter(pk=keys[0]).update(version=99)
    with connections[C].cursor() as cursor:
        cursor.execute("DELETE FROM deferred_sessions_revocation")

    assert mender(servers).fill(A, C, "").tally.copied == 0
    assert Session.objects.using(C).get(pk=keys[0]).version == 99


def test_what_is_deleted_on_the_way_is_removed_where_it_arrives(
    servers: Servers,  # noqa: F811
    monkeypatch: Any,
) -> None:
    keys = misplaced(servers, 6)
    first = Session.objects.using(A).filter(pk=keys[0])
    meanwhile(monkeypatch, first.delete)
    page = mender(servers).fill(A, C, "", 2)

    assert servers.row(keys[0], C) is None
    assert page.tally.copied == len(keys) - 1


def test_a_row_that_somebody_holds_is_said(servers: Servers) -> None:  # noqa: F811
    """The page fails and may be repeated; the connection is good for the next one."""
    keys = misplaced(servers, 6)
    mender(servers).fill(A, C, "")
    Session.objects.using(A).filter(pk=keys[0]).update(version=9)
    settings = place(C)
    options = {name.lower(): settings[name] for name in ("HOST", "PORT", "USER", "PASSWORD")}
    with psycopg.connect(dbname=settings["NAME"], **options) as holder:
        holder.execute(
            "SELECT 1 FROM deferred_sessions_session WHERE session_key = %s FOR UPDATE", keys[:1]
        )
        with pytest.raises(RowLockedError):
            mender(servers).fill(A, C, "")

    assert mender(servers).fill(A, C, "").tally.copied == 1


def test_who_fails_meanwhile_leaves_no_statement_under_way(
    servers: Servers,  # noqa: F811
    monkeypatch: Any,
) -> None:
    keys = misplaced(servers, 6)

    def fail() -> None:
        raise ServerUnavailableError("gone")

    with monkeypatch.context() as patch:
        meanwhile(patch, fail)
        with suppress(ServerUnavailableError):
            mender(servers).fill(A, C, "", 2)

    assert servers.counts(C)[0] in (0, len(keys))  # it answers, whether the first page got through
    mender(servers).fill(A, C, "")
    assert servers.counts(C)[0] == len(keys)


def test_rows_that_cannot_be_streamed_are_put_with_care(
    servers: Servers,  # noqa: F811
    monkeypatch: Any,
) -> None:
    """What is wrong with a row is said as everywhere."""
    misplaced(servers, 6)
    monkeypatch.setattr(repair_sql, "PUT", repair_sql.PUT.replace("excluded.", "exclude."))
    with pytest.raises(ServerUnavailableError):
        mender(servers).fill(A, C, "")
