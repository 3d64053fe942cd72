"""The commands of this package, one file each."""

from __future__ import annotations
