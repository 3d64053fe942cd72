"""The journal under real processes that are killed: nothing acknowledged is lost, nothing torn.

Power loss is simulated by killing every process and removing the host store, which is what a
reboot does to shared memory. (What was not synced by then is cut off in unit/test_journal.py.)
"""

from __future__ import annotations

import logging
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from deferred_sessions.backend import SessionStore
from deferred_sessions.models import Session
from deferred_sessions.runtime import Runtime, get_runtime, reset_runtime
from tests.processes.conftest import Site, wait_until

logger = logging.getLogger(__name__)  # its figures: pytest --log-cli-level=INFO

WRITERS = 8
LOAD = 10  # seconds
LEAST_SWAPS = 8
WRITE = """
import sys
import django; django.setup()
from deferred_sessions.backend import SessionStore
number = 0
while True:
    session = SessionStore(sys.argv[1])
    session["n"] = session["n"] + 1
    session["ballast"] = "x" * (session["n"] % 3000)
    session.save()
    print(session["n"], flush=True)
"""
KEEP = """
import sys, time
import django; django.setup()
from deferred_sessions.runtime import get_runtime
swaps = 0
runtime = get_runtime()
while True:
    runtime.flusher.journal.keep_once(time.time())
    print(runtime.store.journal.position()[0], flush=True)
    time.sleep(float(sys.argv[1]))
"""

SYNC = """
import itertools, os, sys, time
import django; django.setup()
from deferred_sessions.runtime import get_runtime
real, number, calls = os.fdatasync, int(sys.argv[1]), itertools.count(1)
def fdatasync(descriptor):
    if next(calls) == number:
        print("stopped", flush=True)
        time.sleep(60)
    real(descriptor)
os.fdatasync = fdatasync
get_runtime().agent.start()
time.sleep(60)
"""
STOP = """
import itertools, os, sys, time
from pathlib import Path
import django; django.setup()
from deferred_sessions.memory import recovery
from deferred_sessions.runtime import get_runtime
recovery.PART = 1
step, number, calls = sys.argv[1], int(sys.argv[2]), itertools.count(1)
owner = {"restore": recovery.restoring, "fsync": os, "rename": Path}[step]
real = getattr(owner, step)
def stop(*arguments):
    if next(calls) == number:
        print("stopped", flush=True)
        time.sleep(60)
    return real(*arguments)
setattr(owner, step, stop)
get_runtime().store.open()
"""
STEPS = (  # of a recovery, and at which of its calls it is killed
    ("rename", 1),  # while the store is made
    ("restore", 2),  # with one of four sessions in it
    ("restore", 4),
    ("fsync", 1),  # before the new log is on disk
    ("rename", 1),  # before it is in its place
    ("fsync", 2),  # after that
)


class Writers:
    """Processes that save, and a file each in which they acknowledge it."""

    def __init__(self, site: Site, place: Path, count: int) -> None:
        self.keys: list[str] = []
        self._outputs: list[Path] = []
        self._processes: list[subprocess.Popen[bytes]] = []
        self._site = site
        for number in range(count):
            session = SessionStore()
            session["n"] = 0
            session.save()
            self.keys.append(str(session.session_key))
            self._outputs.append(place / f"writer{number}")
            self._outputs[-1].touch()

    def start(self) -> None:
        for key, output in zip(self.keys, self._outputs, strict=True):
            with output.open("ab") as file:
                file.truncate(output.read_bytes().rfind(b"\n") + 1)  # a line cut short by a kill
                self._processes.append(self._site.start("-c", WRITE, key, stdout=file, kill=True))

    def acknowledged(self) -> list[int]:
        """Return the last number that each said; a line may have been cut short."""
        lines = [output.read_bytes().rpartition(b"\n")[0].split() for output in self._outputs]
        return [int(each[-1]) if each else 0 for each in lines]

    def wait_for(self, saves: int) -> None:
        """Return when each has acknowledged so many more."""
        goal = [number + saves for number in self.acknowledged()]
        wait_until(
            lambda: all(now >= then for now, then in zip(self.acknowledged(), goal, strict=True)),
            what="saves",
        )

    def kill(self) -> None:
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.wait()
        self._processes.clear()


@pytest.fixture
def journaled(make_site: Callable[..., Site], tmp_path: Path) -> Callable[..., Site]:
    def make(**settings: Any) -> Site:
        own = {"JOURNAL_DIRECTORY": str(tmp_path / "journal"), "JOURNAL_SIZE": 1 << 20}
        return make_site(**{**own, **settings})

    return make


def lose_power(site: Site) -> Runtime:
    reset_runtime()
    shutil.rmtree(site.directory)
    return get_runtime()


def assert_nothing_is_lost(writers: Writers) -> None:
    told, found = writers.acknowledged(), []
    for key, acknowledged in zip(writers.keys, told, strict=True):
        session = SessionStore(key)
        found.append(session["n"])
        assert acknowledged <= session["n"] <= acknowledged + 1
        assert session.get("ballast", "") == "x" * (session["n"] % 3000)
    logger.info("%d saves acknowledged, %d found, none lost or torn", sum(told), sum(found))


def test_d01_writers_are_killed_and_power_is_lost(
    journaled: Callable[..., Site], tmp_path: Path
) -> None:
    """Five times over; in the end everything is in PostgreSQL."""
    site = journaled()
    writers = Writers(site, tmp_path, 3)
    for _ in range(5):
        writers.start()
        writers.wait_for(20)
        writers.kill()
        lose_power(site)
        assert_nothing_is_lost(writers)

    report = get_runtime().flusher.flush_once(time.time(), everything=True)
    assert (report.failure, report.remaining) == ("", 0)
    for key in writers.keys:
        assert Session.objects.get(pk=key).get_decoded() == SessionStore(key).load()


def test_d04_swaps_under_load(journaled: Callable[..., Site], tmp_path: Path) -> None:
    """Eight writers for ten seconds; logs of 1 MiB are swapped, flushed and reset all the time."""
    site = journaled(SYNC_INTERVAL=0.01)
    writers = Writers(site, tmp_path, WRITERS)
    output = tmp_path / "keeper"
    with output.open("wb") as file:
        keeper = site.start("-c", KEEP, "0.01", stdout=file, kill=True)
    writers.start()

    def swaps() -> int:
        lines = output.read_bytes().rpartition(b"\n")[0].split()
        return int(lines[-1]) if lines else 0

    end = time.monotonic() + LOAD
    wait_until(lambda: time.monotonic() >= end and swaps() >= LEAST_SWAPS, what="swaps")
    logger.info("%d swaps", swaps())
    keeper.kill()
    writers.kill()
    lose_power(site)
    assert_nothing_is_lost(writers)


def test_the_keeper_is_killed_in_mid_swap_and_mid_reset(
    journaled: Callable[..., Site], tmp_path: Path
) -> None:
    """At random moments, while it does nothing else; and power is lost with it."""
    site = journaled(SYNC_INTERVAL=0.001, JOURNAL_AGE=0.001)
    writers = Writers(site, tmp_path, 2)
    chance = random.Random(5)
    for turn in range(1, 9):
        writers.start()
        keeper = site.start("-c", KEEP, "0", stdout=subprocess.PIPE, kill=True)
        assert keeper.stdout is not None
        keeper.stdout.readline()
        writers.wait_for(15)
        time.sleep(chance.uniform(0, 0.02))
        keeper.kill()
        keeper.wait()
        keeper.stdout.close()
        writers.kill()
        if turn % 2:
            lose_power(site)
        assert_nothing_is_lost(writers)
    get_runtime().flusher.flush_once(time.time(), everything=True)


def wait_for_a_sync() -> None:
    """Return when what was told to the journal until now is on disk, because savers saw to it."""
    journal = get_runtime().store.journal
    assert journal is not None
    told = journal.size()
    wait_until(lambda: journal.size() - journal.unsynced() >= told, what="a sync")


def test_the_agent_is_killed_in_mid_sync(journaled: Callable[..., Site], tmp_path: Path) -> None:
    """Savers go on, and sync for themselves; and power is lost with them, too."""
    site = journaled(SYNC_INTERVAL=0.01)
    writers = Writers(site, tmp_path, 3)
    for number in (1, 2, 7):
        writers.start()
        agent = site.start("-c", SYNC, str(number), stdout=subprocess.PIPE, kill=True)
        assert agent.stdout is not None
        assert agent.stdout.readline() == b"stopped\n"
        agent.kill()
        agent.wait()
        agent.stdout.close()
        wait_for_a_sync()
        writers.kill()
        lose_power(site)
        assert_nothing_is_lost(writers)


def test_a_recovery_that_is_killed(journaled: Callable[..., Site], tmp_path: Path) -> None:
    """kill -9 at each of its steps, one after the other; it ends as if nothing had been."""
    site = journaled(JOURNAL_SIZE=16 << 20)  # nobody empties it; full, it has nothing to recover
    writers = Writers(site, tmp_path, 4)
    writers.start()
    wait_until(lambda: min(writers.acknowledged()) >= 50, what="saves")
    writers.kill()
    reset_runtime()
    shutil.rmtree(site.directory)
    for step, number in STEPS:
        process = site.start("-c", STOP, step, str(number), stdout=subprocess.PIPE, kill=True)
        assert process.stdout is not None
        assert process.stdout.readline() == b"stopped\n"
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
    assert_nothing_is_lost(writers)


def test_a_save_on_disk_is_shared_by_savers(journaled: Callable[..., Site], tmp_path: Path) -> None:
    """SYNC_INTERVAL 0: eight processes; what each was told is on disk when it is told."""
    site = journaled(SYNC_INTERVAL=0)
    writers = Writers(site, tmp_path, WRITERS)
    writers.start()
    wait_until(lambda: min(writers.acknowledged()) >= 10, what="saves")
    writers.kill()
    lose_power(site)
    assert_nothing_is_lost(writers)
