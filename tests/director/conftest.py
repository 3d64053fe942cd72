"""Nodes behind a real director: HAProxy or nginx, with the configuration that is printed."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path

import pytest

from testproject.brokers import free_port, is_listening
from tests.processes.conftest import Site, Visitor, Web, make_site, wait_until

__all__ = ["make_site"]

DIRECTORS = ("haproxy", "nginx")
COOKIE = "sessionnode"


WORKERS = ("--workers=2", "--threads=8")  # a request that waits for a dead node holds up no other
QUICK = {"HEARTBEAT_INTERVAL": 0.2, "NODE_TIMEOUT": 2.0}  # seconds


class Node:
    """A host of the site as the director sees it: a name, an address, a store of its own."""

    def __init__(self, name: str, site: Site) -> None:
        self.name = name
        self.site = site
        self.web: Web = site.web(*WORKERS)
        self.pids = set(self.web.workers())

    @property
    def option(self) -> str:
        return f"--node={self.name}=127.0.0.1:{self.web.port}"

    def kill(self) -> None:
        """End all of its processes at once."""
        os.killpg(self.web.process.pid, signal.SIGKILL)
        self.web.process.wait()

    def freeze(self) -> None:
        """Stop all of its processes: they still take connections, and never answer."""
        os.killpg(self.web.process.pid, signal.SIGSTOP)

    def thaw(self) -> None:
        os.killpg(self.web.process.pid, signal.SIGCONT)

    def start(self) -> None:
        """Start it again, at the same address."""
        self.web = self.site.web(*WORKERS, port=self.web.port)
        self.pids = set(self.web.workers())

    def command(self, *words: str) -> str:
        return self.site.run("manage.py", *words)


class Cluster:
    """Nodes, and how to tell them apart."""

    def __init__(self, nodes: Sequence[Node]) -> None:
        self.nodes = nodes

    def who(self, pid: int) -> str:
        """Return the name of the node that `pid` works for."""
        return next(node.name for node in self.nodes if pid in node.pids)

    def configuration(self, director: str, *options: str) -> str:
        """Return what the command prints for these nodes."""
        places = [node.option for node in self.nodes]
        return self.nodes[0].command("sessionproxy", director, *places, *options)


class Director:
    """HAProxy or nginx, running with a configuration that was printed."""

    def __init__(self, kind: str, cluster: Cluster, directory: Path) -> None:
        self.kind = kind
        self.port = free_port()
        self._cluster = cluster
        self._directory = directory
        self._file = directory / f"{kind}.cfg"
        self._log = directory / f"{kind}.log"
        self.configure()
        self.check()
        with self._log.open("wb") as output:
            self._process = subprocess.Popen(
                self._command(), stdout=output, stderr=output, start_new_session=True
            )
        wait_until(self._is_ready, what=f"{kind} to listen")

    def url(self, path: str) -> str:
        return f"http://127.0.0.1:{self.port}{path}"

    def configure(self, *options: str) -> None:
        """Write the configuration that the command prints."""
        listen = f"--listen=127.0.0.1:{self.port}"
        text = self._cluster.configuration(self.kind, listen, *options)
        self._file.write_text(private(text, self._directory) if self.kind == "nginx" else text)

    def reload(self) -> None:
        """Have nginx use the configuration that was written."""
        self._process.send_signal(signal.SIGHUP)

    def check(self) -> None:
        """Have the director itself look at the configuration; it must not even warn."""
        flags = ["-c"] if self.kind == "haproxy" else ["-t"]
        done = subprocess.run(
            self._command(*flags), capture_output=True, text=True, check=False, timeout=30
        )
        assert done.returncode == 0, done.stdout + done.stderr
        assert "warn" not in (done.stdout + done.stderr).lower(), done.stdout + done.stderr

    def visit(self, visitor: Visitor, path: str = "/probe/count/") -> str:
        """Return the name of the node that answers."""
        return self._cluster.who(visitor.get(self.url(path))["pid"])

    def log(self) -> str:
        """Return what it has said so far."""
        return self._log.read_text()

    def stop(self) -> None:
        if self._process.poll() is None:
            self._process.terminate()
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(10)
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def _is_ready(self) -> bool:
        assert self._process.poll() is None, self.log()
        return is_listening(self.port)

    def _command(self, *flags: str) -> list[str]:
        if self.kind == "haproxy":
            return ["haproxy", *(flags or ["-db"]), "-f", str(self._file)]
        globals_ = [f"pid {self._directory}/nginx.pid", f"error_log {self._directory}/error.log"]
        if not flags:
            globals_.append("daemon off")
        if os.geteuid() == 0:
            globals_.append("user root")  # others cannot enter the directory
        words = "; ".join([*globals_, ""])
        return ["nginx", *flags, "-p", str(self._directory), "-c", str(self._file), "-g", words]


def private(text: str, directory: Path) -> str:
    """Keep nginx out of the places of the system's own."""
    kinds = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    places = "".join(f"    {kind}_temp_path {directory}/{kind};\n" for kind in kinds)
    assert text.count("\nhttp {\n") == 1
    return text.replace("\nhttp {\n", f"\nhttp {{\n    access_log off;\n{places}")


def require(command: str) -> None:
    """Skip without the director's package; in CI there must be one."""
    if shutil.which(command) is None:
        if os.environ.get("CI"):
            pytest.fail(f"{command} is not installed, but CI must test this director.")
        pytest.skip(f"needs {command} of the system's packages")


@pytest.fixture
def cluster(make_site: Callable[..., Site], tmp_path: Path) -> Cluster:
    """Three nodes of one site."""
    return Cluster(
        [
            Node(name, make_site(tmp_path / name, NODE=name, NODE_COOKIE=COOKIE, **QUICK))
            for name in ("web1", "web2", "web3")
        ]
    )


@pytest.fixture(params=DIRECTORS)
def director(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Director]:
    """A director in front of the nodes."""
    require(request.param)
    director = Director(request.param, request.getfixturevalue("cluster"), tmp_path)
    yield director
    director.stop()
