"""The director: three nodes behind a real HAProxy, and behind a real nginx."""

from __future__ import annotations

import signal
import threading
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from http.client import HTTPException
from pathlib import Path
from urllib.error import HTTPError

import psutil
import pytest

from testproject.embedded import EmbeddedServer
from tests.director.conftest import COOKIE, DIRECTORS, Cluster, Director, Node, require
from tests.processes.conftest import Site, Visitor, wait_until

VISITORS = 200
REQUESTS = 6
CROWD = 8  # threads


def visits(director: Director, visitor: Visitor, count: int = 1) -> list[str]:
    return [director.visit(visitor) for _ in range(count)]


def test_e01_every_request_of_a_visitor_reaches_one_node(
    cluster: Cluster, director: Director
) -> None:
    """E01: 200 visitors with cookie jars; nobody changes nodes, nobody's session does."""
    visitors = [Visitor() for _ in range(VISITORS)]

    def visit(visitor: Visitor) -> tuple[set[str], list[int]]:
        answers = [visitor.get(director.url("/probe/count/")) for _ in range(REQUESTS)]
        return {cluster.who(each["pid"]) for each in answers}, [each["value"] for each in answers]

    with ThreadPoolExecutor(CROWD) as crowd:
        found = list(crowd.map(visit, visitors))

    assert [values for _, values in found] == [list(range(1, REQUESTS + 1))] * VISITORS
    assert [len(nodes) for nodes, _ in found] == [1] * VISITORS
    shares = Counter(name for nodes, _ in found for name in nodes)
    assert set(shares) == {"web1", "web2", "web3"}
    assert min(shares.values()) > VISITORS * 0.2
    for visitor, (nodes, _) in zip(visitors, found, strict=True):
        cookies = {cookie.name: cookie.value for cookie in visitor.cookies}
        assert cookies == {"sessionid": visitor.key, "sessionnode": nodes.pop()}


class Load:
    """Visitors who read their sessions again and again."""

    def __init__(self, director: Director, visitors: list[Visitor]) -> None:
        self.errors: list[Exception] = []
        self._director = director
        self._served = Counter(dict.fromkeys(visitors, 0))
        self._is_over = threading.Event()
        shares = [visitors[number::CROWD] for number in range(CROWD)]
        self._threads = [threading.Thread(target=self._browse, args=[share]) for share in shares]

    def wait_for_more(self, count: int) -> None:
        """Wait until every visitor has been served so many times more."""
        goal = max(self._served.values()) + count
        wait_until(lambda: min(self._served.values()) >= goal, what="requests")

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over.set()
        for thread in self._threads:
            thread.join()

    def _browse(self, visitors: list[Visitor]) -> None:
        while not self._is_over.is_set():
            for visitor in visitors:
                try:
                    visitor.get(self._director.url("/probe/read/"))
                except (OSError, HTTPException, ValueError) as error:  # answered, or cut short
                    self.errors.append(error)
                self._served[visitor] += 1


def test_e05_a_dead_node_is_replaced_by_another(cluster: Cluster, director: Director) -> None:
    """E05, the routing of it: `kill -9` under load; visitors are sent on, and stay there."""
    dead, *living = cluster.nodes
    visitors = [Visitor() for _ in range(30)]
    homes = {visitor: visits(director, visitor)[0] for visitor in visitors}
    orphans = [visitor for visitor in visitors if homes[visitor] == dead.name]
    assert orphans
    with Load(director, visitors) as load:
        load.wait_for_more(5)
        dead.kill()
        load.wait_for_more(5)

    # What was under way there was only reading, so it was sent on, too; but not where the
    # answer had begun to come.
    assert len(load.errors) <= CROWD, load.errors
    now = {visitor: visits(director, visitor, 3) for visitor in visitors}
    assert all(len(set(nodes)) == 1 for nodes in now.values())
    assert {now[visitor][0] for visitor in orphans} <= {node.name for node in living}
    others = [visitor for visitor in visitors if visitor not in orphans]
    assert all(now[visitor][0] == homes[visitor] for visitor in others)

    dead.start()
    wait_until(lambda: visits(director, Visitor()) == [dead.name], what="its return")
    assert {visitor: visits(director, visitor, 3) for visitor in visitors} == now


@pytest.mark.parametrize("director", ["haproxy"], indirect=True)
def test_a_node_that_hangs_is_left_alone(cluster: Cluster, director: Director) -> None:
    """It takes connections and never answers; only the health URL can tell."""
    visitors = [Visitor() for _ in range(9)]
    homes = {visitor: visits(director, visitor)[0] for visitor in visitors}
    hung = cluster.nodes[0]
    hung.freeze()
    wait_until(lambda: "web1 is DOWN" in director.log(), what="HAProxy to notice")
    for visitor, home in homes.items():
        found = visits(director, visitor, 2)
        assert found == [home] * 2 if home != hung.name else hung.name not in found

    hung.thaw()
    wait_until(lambda: "web1 is UP" in director.log(), what="HAProxy to notice")
    wait_until(lambda: visits(director, Visitor()) == [hung.name], what="new visitors")


@pytest.mark.parametrize(("data", "is_repeated"), [(b"x=1", False), (None, True)])
def test_a_request_that_may_have_changed_something_is_sent_once(
    cluster: Cluster, director: Director, data: bytes | None, is_repeated: bool
) -> None:
    """The node dies over a POST: the visitor is told, and no other node gets it."""
    visitor = Visitor()
    home = visits(director, visitor)[0]
    with pytest.raises(HTTPError, match="502"):
        visitor.get(director.url("/probe/die/"), data=data)

    def died() -> list[str]:
        return [node.name for node in cluster.nodes for pid in node.pids if not is_alive(pid)]

    if is_repeated:  # and here every node dies over it
        wait_until(lambda: len(set(died())) > 1, what="the end of workers")
    else:
        wait_until(died, what="the end of the worker")
        assert died() == [home]


def is_alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_a_node_is_drained(cluster: Cluster, director: Director) -> None:
    """New visitors go elsewhere; those who belong there stay, and lose nothing."""
    drained = cluster.nodes[0]
    natives = [
        visitor
        for visitor in [Visitor() for _ in range(12)]
        if visits(director, visitor) == [drained.name]
    ]
    assert natives
    begin, end = how_to_drain(director, drained.name, drained.command)
    begin()

    def is_avoided() -> bool:
        return drained.name not in {visits(director, Visitor())[0] for _ in range(6)}

    wait_until(is_avoided, what="the director to notice")
    assert all(is_avoided() for _ in range(3))
    values = [visitor.get(director.url("/probe/count/")) for visitor in natives for _ in range(4)]
    assert {cluster.who(answer["pid"]) for answer in values} == {drained.name}
    assert [answer["value"] for answer in values] == [2, 3, 4, 5] * len(natives)

    end()
    wait_until(lambda: visits(director, Visitor()) == [drained.name], what="new visitors")
    drained.kill()
    assert {visits(director, visitor)[0] for visitor in natives} <= {"web2", "web3"}


def how_to_drain(
    director: Director, name: str, command: Callable[..., str]
) -> tuple[Callable[[], object], Callable[[], object]]:
    """HAProxy asks the node for its health; nginx has to be told."""
    if director.kind == "haproxy":
        return (
            lambda: command("sessionproxy", "drain"),
            lambda: command("sessionproxy", "resume"),
        )

    def tell(*options: str) -> None:
        director.configure(*options)
        director.check()
        director.reload()

    return (lambda: tell(f"--draining={name}")), tell


@pytest.mark.parametrize("kind", DIRECTORS)
def test_nodes_without_postgresql_are_not_given_up(
    kind: str, make_site: Callable[..., Site], tmp_path: Path
) -> None:
    """They serve the sessions they have; a director that left them would end the site."""
    require(kind)
    with EmbeddedServer(tmp_path / "postgres") as server, ExitStack() as stack:
        nodes = []
        for name in ("web1", "web2"):
            settings = {"NODE": name, "NODE_COOKIE": COOKIE, "FLUSH_INTERVAL": 0.5}
            site = make_site(tmp_path / name, **settings)
            site.database = server.url
            site.run("manage.py", "migrate", "--verbosity=0")
            nodes.append(Node(name, site))
            stack.callback(site.stop)
        director = Director(kind, Cluster(nodes), tmp_path)
        stack.callback(director.stop)
        visitors = [Visitor() for _ in range(10)]
        homes = [visits(director, visitor, 2)[0] for visitor in visitors]
        server.kill(signal.SIGQUIT)

        def is_known(node: Node) -> bool:
            for visitor in visitors:
                director.visit(visitor)
            return Visitor().get(node.web.url("/healthz"))["postgresql"] == "away"

        for node in nodes:
            wait_until(partial(is_known, node), what="a flush that failed")
            assert Visitor().get(node.web.url("/healthz"))["status"] == "degraded"
        assert [visits(director, visitor)[0] for visitor in visitors] == homes
        assert "DOWN" not in director.log()


def test_visitors_do_not_see_the_health_of_nodes(cluster: Cluster, director: Director) -> None:
    assert Visitor().get(cluster.nodes[0].web.url("/healthz"))["status"] == "ok"
    with pytest.raises(HTTPError, match="404"):
        Visitor().get(director.url("/healthz"))


@pytest.mark.parametrize("kind", DIRECTORS)
@pytest.mark.parametrize(
    "options",
    [
        ["--node=a=127.0.0.1:8001"],
        ["--node=a=127.0.0.1:8001", "--node=b.c-d_e=[::1]:8002", "--draining=a", "--secure"],
        ["--node=a=localhost:1", "--listen=[::1]:8080", "--health-path=/h", "--cookie=N"],
        [f"--node={n:02}{'x' * 38}=10.0.0.{n}:65535" for n in range(50)],
    ],
    ids=["one", "all kinds", "edges", "many"],
)
def test_the_directors_accept_what_is_printed(
    kind: str, options: list[str], tmp_path: Path
) -> None:
    require(kind)
    director = Director.__new__(Director)
    director.kind = kind
    director._directory = tmp_path
    director._file = tmp_path / "file"
    text = printed(kind, *options)
    director._file.write_text(text)
    director.check()


def printed(kind: str, *options: str) -> str:
    from io import StringIO

    from django.core.management import call_command

    output = StringIO()
    call_command("sessionproxy", kind, *options, stdout=output)
    return output.getvalue()
