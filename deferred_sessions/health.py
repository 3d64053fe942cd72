"""The health URL of a node, for the director and for Kubernetes.

    path("healthz", deferred_sessions.health.view)

200 says: this node serves the visitors whose sessions it has, and may get new ones; 503: it
cannot, or is being drained. Invariant: PostgreSQL away is no reason for 503, because nodes
serve known sessions without it, and a director that gave up on all of them would end the
site. No key and no setting that is secret is in the answer.
"""

from __future__ import annotations

import logging
import time
from typing import Any, Final

from django.contrib.auth.decorators import login_not_required
from django.http import HttpRequest, HttpResponse, JsonResponse
from django.views.decorators.http import require_safe

from deferred_sessions.condition import Condition
from deferred_sessions.exceptions import StoreError
from deferred_sessions.runtime import get_runtime_in_use

logger = logging.getLogger(__name__)

GOOD, GONE, BAD = 200, 404, 503
DRAINING: Final = "draining"  # with `?draining=404` the status of a node that is drained is 404


@login_not_required
@require_safe
def view(request: HttpRequest) -> HttpResponse:
    """Answer how this node is. Reads memory only, within microseconds; never waits."""
    runtime = get_runtime_in_use()
    if runtime is None:
        return _answer(GOOD, {"status": "not in use"})
    name = {"node": runtime.settings.node} if runtime.settings.node else {}
    try:
        condition = runtime.condition.read(time.time())
    except StoreError as error:
        logger.error(  # noqa: TRY400 - the trace says no more
            "This node cannot serve sessions: %s", error, extra={"action": "node_unusable"}
        )
        return _answer(BAD, {"status": "unusable", **name})
    status = GOOD
    if condition.is_draining:
        # To HAProxy, 404 means that those who belong here may still come, 503 that nobody may.
        status = GONE if request.GET.get(DRAINING) == str(GONE) else BAD
    return _answer(status, {"status": _word(condition), **name, **_figures(condition)})


def _word(condition: Condition) -> str:
    if condition.is_draining:
        return "draining"
    return "degraded" if condition.troubles else "ok"


def _figures(condition: Condition) -> dict[str, Any]:
    away = condition.is_postgresql_away
    flushed_ago = condition.flushed_ago
    return {
        "draining": condition.is_draining,
        "troubles": condition.troubles,
        "postgresql": "unknown" if away is None else "away" if away else "reachable",
        "flushed_ago": None if flushed_ago is None else round(flushed_ago, 1),
        "sessions": condition.sessions,
        "dirty": condition.dirty,
        "oldest_change_age": round(condition.oldest_change_age, 1),
        "store_used": round(condition.used, 3),
        "journal_unsynced": condition.unsynced,
    }


def _answer(status: int, content: dict[str, Any]) -> HttpResponse:
    response = JsonResponse(content, status=status, headers={"Cache-Control": "no-store"})
    # Checks come every second or two. Django would log each answer of 503 as an error, and
    # send mails about it where it is told to.
    response._has_been_logged = True  # type: ignore[attr-defined]  # noqa: SLF001
    return response
