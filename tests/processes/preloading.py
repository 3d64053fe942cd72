"""An application that uses sessions before its server forks."""

from __future__ import annotations

from importlib import import_module

from testproject.wsgi import application

__all__ = ["application"]

_session = import_module("deferred_sessions.backend").SessionStore()
_session["used"] = "before the fork"
_session.save()
