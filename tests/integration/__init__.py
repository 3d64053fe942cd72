"""Tests on real PostgreSQL."""

from __future__ import annotations
