"""Runs the measurements and prints their tables.

    python -m benchmarks                          with DATABASE_URL and REDIS_URL
    python -m testproject.embedded python -m benchmarks    with a PostgreSQL of its own

Works in a database and a store made for it and removed afterwards. Without REDIS_URL
it starts a Redis server, if one is installed.
"""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from importlib import import_module
from pathlib import Path

import django

from testproject.brokers import redis
from testproject.embedded import url_of

BENCHMARKS = ("engines", "flush", "overlap")
SHARED_MEMORY = Path("/dev/shm")


def main() -> int:
    """Run what was asked for."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("what", nargs="*", help=f"{', '.join(BENCHMARKS)}; all if not given")
    parser.add_argument("--write", type=Path, metavar="FILE", help="write the tables to FILE, too")
    options = parser.parse_args()
    unknown = set(options.what) - set(BENCHMARKS)
    if unknown:
        parser.error(f"there is no benchmark called {', '.join(sorted(unknown))}")
    with ExitStack() as stack:
        prepare(stack)
        report(options.what or BENCHMARKS, options.write)
    return 0


def prepare(stack: ExitStack) -> None:
    """Set up Django with a store, a database and, if possible, a Redis of their own."""
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


def report(what: Sequence[str], file: Path | None) -> None:
    """Print each table as soon as it is there; write all to `file` at the end."""
    lines = [*machine(), ""]
    print("\n".join(lines), flush=True)
    for name in BENCHMARKS:
        if name in what:
            for table in import_module(f"benchmarks.{name}").measure():
                print(f"{table}\n", flush=True)
                lines += [table, ""]
    if "REDIS_URL" not in os.environ and "engines" in what:
        print("Redis is missing: set REDIS_URL, or install redis-server.", file=sys.stderr)
    if file is not None:
        file.write_text("\n".join(["# Measurements", "", *lines]))


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
