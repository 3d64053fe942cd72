"""The Django app: connects signals and checks when Django starts.

Invariant: starting a process opens nothing; the first session does.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Final

from django.apps import AppConfig
from django.core.checks import Tags, register
from django.core.handlers.asgi import ASGIHandler
from django.core.handlers.wsgi import WSGIHandler
from django.core.signals import request_finished, request_started
from django.utils.translation import gettext_lazy as _

if TYPE_CHECKING:
    from deferred_sessions.memory.pulse import Pulse
    from deferred_sessions.memory.store import HostStore
    from deferred_sessions.runtime import Runtime

SERVERS: Final = (WSGIHandler, ASGIHandler)
"""Who sends requests of real visitors. (Not the test client: an agent's connection would
keep test databases from being removed; so would one under a live server for tests, which is
known by Django's outbox.)"""


class DeferredSessionsConfig(AppConfig):
    """`INSTALLED_APPS += ["deferred_sessions"]`."""

    name = "deferred_sessions"
    verbose_name = _("Deferred sessions")
    default_auto_field = "django.db.models.BigAutoField"

    def ready(self) -> None:
        """Register the checks and listen for the ends of requests."""
        from deferred_sessions.checks import (  # noqa: PLC0415 - apps first
            check_deployment,
            check_settings,
        )
        from deferred_sessions.identity import project  # noqa: PLC0415

        project()

        tag = Tags.sessions if hasattr(Tags, "sessions") else Tags.security
        register(check_settings, tag)
        register(check_deployment, tag, deploy=True)
        request_started.connect(_on_request_started, dispatch_uid="deferred_sessions")
        request_finished.connect(_on_request_finished, dispatch_uid="deferred_sessions")


@functools.cache
def _runtime_in_use() -> Callable[[], Runtime | None]:
    """Return what needs apps that are loaded; to import it for each request costs more than it."""
    from deferred_sessions.runtime import get_runtime_in_use  # noqa: PLC0415

    return get_runtime_in_use


def _on_request_started(sender: type[object] | None, **_: Any) -> None:
    if (runtime := _runtime_in_use()()) is not None:
        runtime.request_end.begin()
        agent = runtime.agent
        if agent.is_started or sender not in SERVERS:
            return
        from deferred_sessions.conf import is_under_test  # noqa: PLC0415

        if is_under_test():
            return
        if runtime.settings.agent:
            agent.start()
            if sender is ASGIHandler:
                _note_asgi(runtime.store)
        else:
            _expect_beats(runtime.pulse)


def _expect_beats(pulse: Pulse) -> None:
    """Have requests ask in the place of an agent whether this node is taken to be alive."""
    from deferred_sessions.exceptions import StoreError  # noqa: PLC0415

    with suppress(StoreError, OSError):  # the request itself will say so
        pulse.expect()


def _note_asgi(store: HostStore) -> None:
    """Leave word for `check --deploy`."""
    from deferred_sessions.deployment import ASGI  # noqa: PLC0415
    from deferred_sessions.exceptions import StoreError  # noqa: PLC0415

    with suppress(StoreError):  # the request itself will say so
        store.set_note(ASGI, b"1")


def _on_request_finished(**_: Any) -> None:
    if (runtime := _runtime_in_use()()) is not None:
        runtime.request_end.finish(time.time())
