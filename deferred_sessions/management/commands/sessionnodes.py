"""`manage.py sessionnodes`: the nodes of the site, and what was refused to them."""

from __future__ import annotations

from argparse import ArgumentParser
from collections.abc import Sequence
from typing import Any, Final

from django.apps import apps
from django.core.management.base import BaseCommand
from django.utils import timezone

from deferred_sessions.runtime import get_runtime

SHOWN: Final = 4  # characters of a session key, which is a secret
LINE: Final = "{:32} {:7} {:>12} {:>9} {:>8}"


class Command(BaseCommand):
    """Lists the nodes, or the writes that came too late."""

    help = (
        "List the hosts of this site: when each was last heard of, how many sessions it has, and "
        "how many of its writes were refused because they came too late."
    )

    def add_arguments(self, parser: ArgumentParser) -> None:
        """Define the options."""
        parser.add_argument(
            "--refused", action="store_true", help="list the refused writes, latest first"
        )

    def handle(self, **options: Any) -> None:
        """Print one of the two lists."""
        aliases = [server.alias for server in get_runtime().fleet.live()]
        if options["refused"]:
            for alias in aliases:
                self._print_refused(alias)
        else:
            self._print_nodes(aliases)

    def _print_nodes(self, aliases: Sequence[str]) -> None:
        """Print each node as the server has it that heard of it last; of copies each counts."""
        now = timezone.now()
        self.stdout.write(LINE.format("node", "state", "heard of", "sessions", "refused"))
        known = [node for alias in aliases for node in _rows("Node", alias)]
        latest = {node.node: node for node in sorted(known, key=lambda node: node.beat_at)}
        for _, node in sorted(latest.items()):
            sessions = _count("Session", aliases, owner=node.node)
            refused = _count("RefusedWrite", aliases, node=node.node)
            state = "alive" if node.died_at is None else "dead"
            age = f"{(now - node.beat_at).total_seconds():.0f} s ago"
            self.stdout.write(LINE.format(str(node), state, age, sessions, refused))

    def _print_refused(self, alias: str) -> None:
        for write in _rows("RefusedWrite", alias).order_by("-refused_at", "-id").iterator():
            self.stdout.write(
                f"{write.refused_at:%Y-%m-%d %H:%M:%S}  session {write.session_key[:SHOWN]}…  by "
                f"{write.node.partition('#')[0]}, fence {write.fence}, version {write.version}; "
                f"{write.owner.partition('#')[0] or 'nobody'} has fence {write.owner_fence}; "
                f"differs in: {', '.join(write.changed_keys) or '(unreadable)'}"
            )


def _count(model: str, aliases: Sequence[str], **which: str) -> int:
    return sum(_rows(model, alias).filter(**which).count() for alias in aliases)


def _rows(model: str, alias: str) -> Any:
    return apps.get_model("deferred_sessions", model).objects.using(alias)
