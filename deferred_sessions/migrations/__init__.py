"""The schema of the session table, step by step."""

from __future__ import annotations
