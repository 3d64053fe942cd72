"""The shop: a catalogue, a cart in the session, and the live figures."""

from __future__ import annotations
