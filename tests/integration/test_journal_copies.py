"""The journal of a site with several session servers."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from deferred_sessions.runtime import get_runtime, reset_runtime
from tests.integration.conftest import change, created
from tests.integration.fleets import (
    ALIASES,
    Servers,
    _databases,  # noqa: F401
    _fleet,  # noqa: F401
    _is_impatient,  # noqa: F401
    loaded,
    servers,  # noqa: F401
)

pytestmark = pytest.mark.django_db(transaction=True)


@pytest.mark.parametrize("copies", [1, 2])
def test_a_recovered_session_while_a_server_is_away(
    servers: Servers,  # noqa: F811
    tmp_path: Path,
    copies: int,
) -> None:
    """The one that decides has judged it; that a copy is still missing logs nobody out."""
    directory = str(tmp_path / "journal")
    servers.tune(COPIES=copies, JOURNAL_DIRECTORY=directory, JOURNAL_SIZE=1 << 20)
    session = created(_auth_user_id="7")
    change(session, n=1)
    homes = [server.alias for server in servers.runtime.fleet.homes(str(session.session_key))]
    place = servers.runtime.store.directory
    reset_runtime()
    shutil.rmtree(place)
    servers.runtime = get_runtime()
    servers.runtime.store.open()
    strangers = [alias for alias in ALIASES if alias not in homes]
    servers.stop(homes[-1] if copies == 2 else strangers[0])
    for _ in range(2):
        assert loaded(session) == {"_auth_user_id": "7", "n": 1}
