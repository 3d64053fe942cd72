"""Tests with real subprocesses."""

from __future__ import annotations
