"""Runs the measurements; prints their tables, and writes them with plots to RESULTS.md.

    make bench                with all set-up; QUICK=1 for a first impression
    python -m testproject.embedded python -m benchmarks [--quick] [cycles web ...]

Works in a database and a store made for it and removed afterwards. Redis and wrk come from
the system's packages; what is missing is left out, and said.
"""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from importlib import import_module
from pathlib import Path

import django

from benchmarks.engines import missing
from benchmarks.measure import Goal, Plot, Scale, Table
from benchmarks.sessions import VISITOR
from testproject.brokers import redis
from testproject.embedded import url_of

SHARED_MEMORY = Path("/dev/shm")
BENCHMARKS = (
    "cycles",
    "alone",
    "web",
    "writes",
    "flush",
    "growth",
    "journal",
    "overlap",
    "handover",
    "placement",
    "cleanup",
    "fleet",
)
QUICK = ("cycles", "web", "writes", "flush", "growth")  # what compares engines
PACKAGES = {"redis-server": "redis-server", "wrk": "wrk"}  # command: package
HERE = Path(__file__).parent
SUMMARY = ("measure", "to reach", "reached (spread of the rounds)", "met")


def main() -> int:
    """Run what was asked for."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("what", nargs="*", help=f"{', '.join(BENCHMARKS)}; all if not given")
    parser.add_argument(
        "--quick",
        action="store_true",
        help=f"fewer rounds, and only {', '.join(QUICK)} if none is given; under two minutes",
    )
    options = parser.parse_args()
    unknown = set(options.what) - set(BENCHMARKS)
    if unknown:
        parser.error(f"there is no benchmark called {', '.join(sorted(unknown))}")
    with ExitStack() as stack:
        prepare(stack)
        what = options.what or (QUICK if options.quick else BENCHMARKS)
        found = run(what, Scale(quick=options.quick))
        if not options.what and not options.quick:
            write(found)
    return 0


def prepare(stack: ExitStack) -> None:
    """Set up Django with a store, a database and, if possible, a Redis of their own."""
    install()
    memory = SHARED_MEMORY if SHARED_MEMORY.is_dir() else None
    place = Path(tempfile.mkdtemp(prefix="deferred-sessions-benchmark-", dir=memory))
    stack.callback(shutil.rmtree, place)
    os.environ["SESSION_DIRECTORY"] = str(place / "sessions")
    if "REDIS_URL" not in os.environ and shutil.which("redis-server"):
        os.environ["REDIS_URL"] = stack.enter_context(redis(place / "redis"))
    os.environ["DJANGO_SETTINGS_MODULE"] = "benchmarks.settings"
    django.setup()

    from django.db import connection  # noqa: PLC0415 - needs Django to be set up

    name = connection.settings_dict["NAME"]
    connection.creation.create_test_db(verbosity=0, autoclobber=True, serialize=False)
    stack.callback(connection.creation.destroy_test_db, name, verbosity=0)
    os.environ["DATABASE_URL"] = url_of(connection.settings_dict)  # for other processes

    from django.contrib.auth.models import User  # noqa: PLC0415 - needs Django to be set up

    User.objects.create(pk=VISITOR)  # some engines keep a foreign key


def install() -> None:
    """Install what is missing, if this is root on Debian; say what stays out otherwise."""
    wanted = [package for command, package in PACKAGES.items() if not shutil.which(command)]
    if wanted and os.geteuid() == 0 and shutil.which("apt-get"):
        print(f"Installing {' and '.join(wanted)} …", file=sys.stderr, flush=True)
        subprocess.run(["apt-get", "update", "-qq"], check=False)
        subprocess.run(
            ["apt-get", "install", "-qq", "-y", "--no-install-recommends", *wanted],
            env={**os.environ, "DEBIAN_FRONTEND": "noninteractive"},
            stdout=subprocess.DEVNULL,
            check=False,
        )
    for command, package in PACKAGES.items():
        if not shutil.which(command):
            print(f"Left out, for want of {command}: install {package}.", file=sys.stderr)


def run(what: Sequence[str], scale: Scale) -> list[str | Plot]:
    """Print each table as soon as it is there, and what was reached at the end."""
    lines: list[str | Plot] = [*machine(), ""]
    print("\n".join(map(str, lines)), flush=True)
    for name, need in missing().items():
        print(f"Left out, for want of {need}: {name}.", file=sys.stderr)
    goals: list[Goal] = []
    for name in BENCHMARKS:
        if name in what:
            started = time.monotonic()
            for item in import_module(f"benchmarks.{name}").measure(scale):
                if isinstance(item, Goal):
                    goals.append(item)
                elif isinstance(item, Table):
                    print(f"{item}\n", flush=True)
                    lines += [str(item), ""]
                else:
                    lines.append(item)
            scale.progress(f"{name} took {time.monotonic() - started:.0f} s")
    summary = str(Table("What was to be reached", SUMMARY, [goal.row() for goal in goals]))
    print(summary)
    return [lines[0], lines[1], "", summary, "", *lines[2:]]


def write(found: list[str | Plot]) -> None:
    """Write tables and plots next to this file."""
    from benchmarks import plots  # noqa: PLC0415 - takes a second, for nothing if not written

    directory = HERE / "plots"
    directory.mkdir(exist_ok=True)
    lines = ["# Measurements", "", "Written by `make bench`.", ""]
    for item in found:
        if isinstance(item, Plot):
            path = plots.draw(item, directory)
            lines += [f"![{item.title}]({path.relative_to(HERE)})", ""]
        else:
            lines.append(item)
    (HERE / "RESULTS.md").write_text("\n".join(lines).rstrip() + "\n")
    print(f"Written to {HERE.name}/RESULTS.md, with plots.")


def machine() -> list[str]:
    """Return what the figures depend on."""
    from django.db import connection  # noqa: PLC0415 - needs Django to be set up

    with connection.cursor() as cursor:
        cursor.execute("SELECT current_setting('server_version')")
        (version,) = cursor.fetchone()
    versions = {
        "Python": platform.python_version(),
        "Django": django.__version__,
        "PostgreSQL": version.split()[0],
    }
    return [
        f"{', '.join(map(' '.join, versions.items()))}, {os.cpu_count()} cores.",
        "Medians over several rounds, in which the candidates take turns.",
    ]


if __name__ == "__main__":
    sys.exit(main())
