"""The site as people see it, in a real browser."""

from __future__ import annotations
