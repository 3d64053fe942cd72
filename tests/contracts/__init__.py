"""What Django expects of a session engine."""

from __future__ import annotations
