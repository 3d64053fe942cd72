"""System checks: what `manage.py check` says about the settings.

Registered by `apps`. Ids are documented in the README and never used for anything
else, also when a check is gone. Invariant: a check opens no file and no connection.
"""

from __future__ import annotations

from typing import Any

from django.core import checks

from deferred_sessions.conf import Problem, problems, raw_settings, relations


def check_settings(**_: Any) -> list[checks.CheckMessage]:
    """Return a message for each problem of `settings.DEFERRED_SESSIONS`."""
    found = list(problems(raw_settings())) or list(relations())
    return [_message(problem) for problem in found]


def _message(problem: Problem) -> checks.CheckMessage:
    kind = checks.Error if problem.code.startswith("E") else checks.Warning
    return kind(problem.message, hint=problem.hint, id=f"deferred_sessions.{problem.code}")
