"""Tests without I/O, or with nothing but files."""

from __future__ import annotations
