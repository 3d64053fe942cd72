"""Runs Django's own tests that use sessions, with this engine.

    python -m testproject.embedded python -m tests.contracts.django_suites [label ...]

Fetches the source distribution of the Django that is installed, because wheels come
without the tests. `EXCLUDED` lists what is left out, and why.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import django

ROOT = Path(__file__).parents[2]
SUITES = (
    "auth_tests",
    "messages_tests",
    "test_client",
    "test_client_regress",
    "csrf_tests",
    "sessions_tests",
)
EXCLUDED = {
    "sessions_tests/tests.py": {
        "test_empty_session_saved": "looks for the row in the table of Django's db engine",
    },
    "auth_tests/test_middleware.py": {
        "test_protected_view_logged_in_performance": "counts a query for the session (6.1)",
    },
}
"""File of Django's tests -> test -> why it is left out, where the Django that is installed has it.

Tests that name another engine run with that one.
"""

SETTINGS = """
import dj_database_url
database = dj_database_url.parse({url!r})
DATABASES = {{"default": database, "other": {{**database, "TEST": {{"NAME": "test_other"}}}}}}
SECRET_KEY = "django_tests_secret_key"
PASSWORD_HASHERS = ["django.contrib.auth.hashers.MD5PasswordHasher"]
DEFAULT_AUTO_FIELD = "django.db.models.AutoField"
USE_TZ = False
SESSION_ENGINE = "deferred_sessions.backend"
DEFERRED_SESSIONS = {{"DIRECTORY": {directory!r}, "STORE_SIZE": 16 << 20}}
"""


def main(labels: list[str]) -> int:
    """Run `labels`, or all suites; return the exit status of Django's runner."""
    with tempfile.TemporaryDirectory(prefix="django-suites-") as place:
        tests = fetch(Path(place)) / "tests"
        runner = tests / "runtests.py"
        app = '"django.contrib.sessions",'
        source = runner.read_text()
        runner.write_text(source.replace(app, f'{app}\n    "deferred_sessions",', 1))
        directory = str(Path(place) / "sessions")
        settings = SETTINGS.format(url=os.environ["DATABASE_URL"], directory=directory)
        (tests / "deferred_settings.py").write_text(settings)
        exclude(tests)
        return subprocess.run(
            [
                *(sys.executable, runner, "--settings=deferred_settings", "--parallel=1"),
                *("--noinput", "--exclude-tag=selenium", *(labels or SUITES)),
            ],
            cwd=tests,
            env={**os.environ, "PYTHONPATH": f"{tests}{os.pathsep}{ROOT}"},
            check=False,
        ).returncode


def exclude(tests: Path) -> None:
    """Have Django's runner not find what is excluded; say so."""
    for name, excluded in EXCLUDED.items():
        source = (tests / name).read_text()
        for test, why in excluded.items():
            if f"def {test}(" in source:
                source = source.replace(f"def {test}(", f"def excluded_{test}(")
                sys.stdout.write(f"Excluded: {name} {test}, which {why}.\n")
            sys.stdout.flush()
        (tests / name).write_text(source)


def fetch(place: Path) -> Path:
    """Unpack the source distribution of the installed Django in `place`."""
    version = django.get_version()
    subprocess.run(
        [
            *(sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"),
            *("--no-binary=:all:", f"--dest={place}", f"Django=={version}"),
        ],
        check=True,
    )
    archive = next(place.glob("*.tar.gz"))
    with tarfile.open(archive) as file:
        file.extractall(place, filter="data")
    return next(path for path in place.iterdir() if path.is_dir())


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
