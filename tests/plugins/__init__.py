"""What pytest needs before it reads the settings."""

from __future__ import annotations
