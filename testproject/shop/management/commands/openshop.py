"""`manage.py openshop`: make the customers that the login page promises."""

from __future__ import annotations

from typing import Any

from django.contrib.auth.models import User
from django.core.management.base import BaseCommand

CUSTOMERS = ("ann", "ben", "cleo")
PASSWORD = "corner-shop"


class Command(BaseCommand):
    """Makes the demonstration's users, if they are not there yet."""

    help = "Make the users of the demonstration: ann, ben, cleo, and the superuser admin."

    def handle(self, **_: Any) -> None:
        """Make whoever is missing."""
        for name in CUSTOMERS:
            if not User.objects.filter(username=name).exists():
                User.objects.create_user(name, password=PASSWORD)
        if not User.objects.filter(username="admin").exists():
            User.objects.create_superuser("admin", password=PASSWORD)
