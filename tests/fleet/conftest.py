"""Three session servers and any number of nodes for the tests of this directory."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest

from tests.cluster.conftest import Host, Process
from tests.fleet.oracle import Verdict, judge
from tests.fleet.servers import Server, running
from tests.processes.conftest import Site, wait_until

QUICK = {
    "FLUSH_INTERVAL": 1.0,  # seconds, all of these; the agents flush, in the place of a poller
    "SERVER_TIMEOUT": 1.0,
    "LOCK_TIMEOUT": 10.0,
}
MIGRATE = """
import django; django.setup()
from django.core.management import call_command
for alias in "abc":
    call_command("migrate", database=alias, verbosity=0)
"""


class FleetHost(Host):
    """A node of a site with several session servers."""

    driver = "tests.fleet.driver"

    def __init__(self, directory: Path, name: str, fleet: Fleet, **settings: Any) -> None:
        super().__init__(directory, name, **{**QUICK, **fleet.settings, **settings})
        self.database = os.environ["DATABASE_URL"]  # of the rest of the site
        self.more = fleet.environment
        self.fleet = fleet
        self.diary = directory.parent / f"{name}.diary"

    def process(self, *options: str, **environment: Any) -> Process:
        """Start a process of this node; returns when the site knows how its servers stand."""
        process = super().process(*options, **environment)
        self.fleet.wait_until_known()
        return process

    def visited(self, keys: Sequence[str], visitors: int = 1, pause: float = 0.01) -> Process:
        """Start a process in which visitors use these sessions, and none else writes down."""
        process = self.process()
        names = [f"{self.name}{len(self.processes)}-{n}" for n in range(visitors)]
        process("visit", names, list(keys), str(self.diary), pause)
        return process


class Fleet:
    """The session servers, and the nodes that use them."""

    def __init__(self, servers: dict[str, Server], directory: Path) -> None:
        self.servers = servers
        self.directory = directory
        self.settings: dict[str, Any] = {"SERVERS": list(servers), "COPIES": 1}
        self.hosts: list[FleetHost] = []
        self._known: set[str] = set()

    @property
    def environment(self) -> dict[str, str]:
        urls = {alias: server.url for alias, server in self.servers.items()}
        return {"SESSION_DATABASES": json.dumps(urls)}

    def __getitem__(self, alias: str) -> Server:
        return self.servers[alias]

    def host(self, name: str, **settings: Any) -> FleetHost:
        """Make a node with this name."""
        self.hosts.append(FleetHost(self.directory / name, name, self, **settings))
        return self.hosts[-1]

    def live(self) -> list[Server]:
        return [server for server in self.servers.values() if server.is_up]

    def phases(self) -> list[dict[str, str]]:
        """Return how the servers are, as each that runs has it on record."""
        return [server.phases() for server in self.live()]

    def wait_until_known(self) -> None:
        """Wait until all servers that run know of each other: who has sessions before is old."""
        names = set(self.settings["SERVERS"])
        if names <= self._known:  # a server may be dying just now
            return
        wait_until(
            lambda: all(
                names <= server.phases().keys() for server in self.live() if server.alias in names
            ),
            what="the register of servers",
        )
        self._known |= names

    def wait_until_out(self, *aliases: str) -> None:
        """Wait until all servers that run know that these are not used."""
        wait_until(
            lambda: all(
                record.get(alias) == "out" for record in self.phases() for alias in aliases
            ),
            what=f"{aliases} to be out",
            seconds=20,
        )

    def wait_until_whole(self, seconds: float = 30) -> None:
        """Wait until every server is trusted, and no session is where it should not be."""
        wait_until(self.is_whole, what="the fleet to be repaired", seconds=seconds)

    def is_whole(self) -> bool:
        """Tell whether all servers are in, and none is still being put in order."""
        if len(self.live()) < len(self.servers):
            return False
        return all(
            not position and (phase == "in" if name else phase)
            for server in self.servers.values()
            for name, phase, position in server.ask(
                "SELECT server, phase, position FROM deferred_sessions_server"
            )
        )

    def where(self) -> dict[str, list[str]]:
        """Return which servers have each session."""
        places: dict[str, list[str]] = {}
        for alias, server in self.servers.items():
            for key in server.sessions():
                places.setdefault(key, []).append(alias)
        return places

    def sessions(self, process: Process) -> dict[str, dict[str, Any]]:
        """Return what the servers have of each session; all copies must be the same."""
        found: dict[str, str] = {}
        for server in self.servers.values():
            for key, text in server.sessions().items():
                before = found.setdefault(key, text)
                if before != text:
                    assert process("decode", before) == process("decode", text), key[:4]
        return {key: process("decode", text) for key, text in found.items()}

    def verdict(self) -> Verdict:
        """Return what the visitors of all nodes have written down."""
        return judge(*(host.diary for host in self.hosts))

    def close(self) -> None:
        for host in self.hosts:
            host.signal(signal.SIGCONT)
            host.stop()


@pytest.fixture(scope="session")
def servers() -> Iterator[dict[str, Server]]:
    """Three servers for all tests, with the tables of the sessions.

    Not in a directory of pytest's: another run that begins takes it away from other users.
    """
    with (
        TemporaryDirectory(prefix="deferred-sessions-fleet-") as place,
        running(directory := Path(place), "abc") as servers,
    ):
        site = Site(directory / "none", SERVERS=list(servers))
        site.database = os.environ["DATABASE_URL"]
        site.more = Fleet(servers, directory).environment
        site.run("-c", MIGRATE)
        yield servers


@pytest.fixture
def fleet(servers: dict[str, Server], tmp_path: Path) -> Iterator[Fleet]:
    """The three servers, all of them up and empty."""
    for server in servers.values():
        server.start()
        server.clear()
    fleet = Fleet(servers, tmp_path)
    yield fleet
    fleet.close()


@pytest.fixture
def make_host(fleet: Fleet) -> Callable[..., FleetHost]:
    """Make a node of the fleet."""
    return fleet.host
