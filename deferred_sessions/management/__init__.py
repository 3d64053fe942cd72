"""Django's place for commands."""

from __future__ import annotations
