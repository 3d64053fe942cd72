"""Prices for people."""

from __future__ import annotations

from django import template

register = template.Library()


@register.filter
def euros(cents: int) -> str:
    """Return 1250 as "12.50 €"."""
    return f"{cents / 100:.2f}\N{NO-BREAK SPACE}€"
