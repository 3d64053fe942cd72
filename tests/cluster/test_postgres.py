"""Nodes while their PostgreSQL is away, hangs, or stands behind a pooler."""

from __future__ import annotations

import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import unquote, urlsplit

import psycopg
import pytest

from testproject.brokers import free_port, running
from testproject.embedded import EmbeddedServer
from tests.cluster.conftest import QUICK, Host, Process
from tests.processes.conftest import wait_until

TIMEOUT = QUICK["NODE_TIMEOUT"]


@pytest.fixture
def server(tmp_path: Path) -> Iterator[EmbeddedServer]:
    """A PostgreSQL to be killed."""
    with EmbeddedServer(tmp_path / "postgres") as server:
        yield server


@pytest.fixture
def hosts(make_host: Callable[..., Host], server: EmbeddedServer) -> list[Host]:
    """Three nodes on that server."""
    hosts = [make_host(name) for name in ("a", "b", "c")]
    for host in hosts:
        host.database = server.url
    hosts[0].run("manage.py", "migrate", "--verbosity=0")
    return hosts


def leases(server: EmbeddedServer) -> dict[str, tuple[str, int]]:
    """Return owner and fence of each session, and fail if any node was found dead."""
    with psycopg.connect(server.url) as connection:
        assert not connection.execute(
            "SELECT node FROM deferred_sessions_node WHERE died_at IS NOT NULL"
        ).fetchall()
        rows = connection.execute("SELECT session_key, owner, fence FROM deferred_sessions_session")
        return {key: (owner, fence) for key, owner, fence in rows.fetchall()}


def all_beat(server: EmbeddedServer) -> bool:
    with psycopg.connect(server.url) as connection:
        found = connection.execute("SELECT count(*) FROM deferred_sessions_node WHERE beat > 2")
        return found.fetchone() == (3,)


@contextmanager
def killed(server: EmbeddedServer) -> Iterator[None]:
    server.kill(signal.SIGQUIT)
    try:
        yield
    finally:
        server.start()


@contextmanager
def paused(server: EmbeddedServer) -> Iterator[None]:
    """Stop all of its processes, as a virtual machine that is moved."""
    main = server._server.get_postmaster_info().process
    processes = [main, *main.children(recursive=True)]
    try:
        for process in processes:
            process.suspend()
        yield
    finally:
        for process in reversed(processes):
            process.resume()


@pytest.mark.parametrize("trouble", [killed, paused])
def test_an_outage_kills_no_node(
    hosts: list[Host],
    nodes: list[Process],
    server: EmbeddedServer,
    trouble: Callable[..., contextmanager[None]],
) -> None:
    """Longer than NODE_TIMEOUT, with all nodes alive: no lease changes hands."""
    keys = [node("create", {"n": 0}) for node in nodes]
    wait_until(lambda: all_beat(server), what="heartbeats")
    before = leases(server)
    with trouble(server):
        until = time.monotonic() + 2.5 * TIMEOUT
        turn = 0
        while time.monotonic() < until:
            turn += 1
            for node, key in zip(nodes, keys, strict=True):
                node("change", key, "n", turn)  # known sessions are served all the while
    until = time.monotonic() + 1.5 * TIMEOUT
    while time.monotonic() < until:
        for node, key in zip(nodes, keys, strict=True):
            assert node("load", key) == {"n": turn}
        assert leases(server) == before
    for node in nodes:
        wait_until(lambda node=node: not node("flush"), what="PostgreSQL")
    assert nodes[1]("load", keys[0]) == {"n": turn}


def pgbouncer_of(server: EmbeddedServer, directory: Path) -> tuple[list[str], int]:
    """Return the command of a pooler of transactions in front of `server`, and its port."""
    directory.mkdir()
    url, port = urlsplit(server.url), free_port()
    socket = unquote(url.hostname or "") or unquote(url.netloc.partition("@")[2])
    (directory / "users").write_text('"postgres" ""\n')
    (directory / "pgbouncer.ini").write_text(
        f"[databases]\npostgres = host={socket} user=postgres\n"
        f"[pgbouncer]\nlisten_addr = 127.0.0.1\nlisten_port = {port}\nunix_socket_dir =\n"
        f"auth_type = any\nauth_file = {directory / 'users'}\npool_mode = transaction\n"
        "default_pool_size = 4\nmax_client_conn = 500\nignore_startup_parameters = options\n"
    )
    command = ["pgbouncer", str(directory / "pgbouncer.ini")]
    if os.geteuid() == 0:  # which it refuses to run as
        for path in (directory, directory.parent, directory.parents[1], directory.parents[2]):
            path.chmod(path.stat().st_mode | 0o055)
        command += ["-u", Path(socket).owner()]
    return command, port


@pytest.fixture
def pooler(server: EmbeddedServer, tmp_path: Path) -> Iterator[str]:
    """Run pgbouncer in transaction mode; yield the URL to connect to."""
    if shutil.which("pgbouncer") is None and not os.environ.get("CI"):
        pytest.skip("pgbouncer is not installed")
    command, port = pgbouncer_of(server, tmp_path / "pgbouncer")
    with running(command, tmp_path, port):
        yield f"postgresql://postgres@127.0.0.1:{port}/postgres"


@pytest.mark.parametrize("listen", [None, "direct"], ids=["pooled", "listening past it"])
def test_behind_a_pooler(
    make_host: Callable[..., Host], server: EmbeddedServer, pooler: str, listen: str | None
) -> None:
    """Pgbouncer in transaction mode; LISTEN past it is optional."""
    hosts = [make_host(name, LISTEN=listen) for name in ("a", "b", "c")]
    for host in hosts:
        host.database = pooler
    hosts[0].run(
        "manage.py",
        "migrate",
        "--verbosity=0",
        env={"DATABASE_URL": server.url, "DIRECT_URL": server.url},
    )
    nodes = [host.process(env={"DIRECT_URL": server.url}) for host in hosts]
    key = nodes[0]("create")
    for number, node in enumerate(nodes):
        node.ask("add_in_threads", key, [f"{number}.0", "n"], 20, "lock")
    for node in nodes:
        node.answer()
    print(f"behind a pooler, {listen}: {[round(node.seconds, 2) for node in nodes]} s")
    assert nodes[1]("load", key) == {"n": 60, "0.0": 20, "1.0": 20, "2.0": 20}


def test_w036_the_pooler_is_noticed(
    make_host: Callable[..., Host], server: EmbeddedServer, pooler: str
) -> None:
    """By `check --deploy`, unless there is a way past it."""
    migrate = ("manage.py", "migrate", "--verbosity=0")
    for listen, url, is_told in (
        (None, pooler, True),
        ("direct", pooler, False),
        (None, server.url, False),
    ):
        host = make_host("a", LISTEN=listen)
        host.database = url
        past = {"DATABASE_URL": server.url, "DIRECT_URL": server.url}
        host.run(*migrate, env=past)
        found = host.run("-c", CHECK, env={"DIRECT_URL": server.url}).split()
        assert "deferred_sessions.W037" not in found
        assert ("deferred_sessions.W036" in found) == is_told


CHECK = """
import django; django.setup()
from deferred_sessions.checks import check_deployment
print(*(message.id for message in check_deployment()))
"""
