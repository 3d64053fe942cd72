"""`manage.py sessionproxy`: the director's configuration, and nodes that are drained."""

from __future__ import annotations

import time
from argparse import ArgumentParser
from typing import Any, Final

from django.core.management.base import BaseCommand, CommandError, CommandParser

from deferred_sessions.director import haproxy, nginx
from deferred_sessions.director.plan import Plan, PlanError, make_plan
from deferred_sessions.exceptions import DeferredSessionsError
from deferred_sessions.runtime import Runtime, get_runtime

CONFIGURATIONS: Final = {"haproxy": haproxy.configuration, "nginx": nginx.configuration}
COOKIE: Final = "sessionnode"
HEALTH_PATH: Final = "/healthz"


class Command(BaseCommand):
    """Prints a configuration, or has this node drained."""

    help = (
        "Print a configuration for the proxy that sends each visitor to the node that has the "
        "visitor's session; or have this node drained."
    )

    def add_arguments(self, parser: CommandParser) -> None:
        """Define what can be done, and the options of each."""
        actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
        for name, title in (("haproxy", "HAProxy"), ("nginx", "nginx")):
            text = f"print a complete configuration for {title}"
            _add_options(actions.add_parser(name, help=text, description=f"{text.capitalize()}."))
        actions.add_parser(
            "drain",
            help="have new visitors sent to other nodes than this one",
            description="The health URL of this node says from now on that it is drained.",
        )
        actions.add_parser(
            "resume",
            help="have new visitors again",
            description="The health URL of this node says that all is well again.",
        )

    def handle(self, **options: Any) -> None:
        """Print, or take note."""
        runtime = get_runtime()
        action = options["action"]
        if action in CONFIGURATIONS:
            self.stdout.write(CONFIGURATIONS[action](_plan(runtime, options)), ending="")
        else:
            self.stdout.write(_drain(runtime) if action == "drain" else _resume(runtime))


def _add_options(parser: ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "--node",
        action="append",
        default=[],
        metavar="NAME=HOST:PORT",
        help="a node: its short public name, and where its web processes listen; repeat for each",
    )
    add(
        "--listen", default="*:80", metavar="[HOST:]PORT", help="for visitors; default: %(default)s"
    )
    add(
        "--health-path",
        default=HEALTH_PATH,
        metavar="PATH",
        help="where `deferred_sessions.health.view` is in the URLs; default: %(default)s",
    )
    add(
        "--cookie",
        metavar="NAME",
        help=f"the cookie that names the node; default: NODE_COOKIE, or else {COOKIE}",
    )
    add("--host", metavar="NAME", help="the Host header of checks; default: from ALLOWED_HOSTS")
    add(
        "--draining",
        action="append",
        default=[],
        metavar="NAME",
        help="a node that gets no new visitors; may be repeated",
    )
    add(
        "--secure",
        action="store_true",
        help="visitors come by HTTPS alone; whoever ends it, here or in front",
    )


def _plan(runtime: Runtime, options: dict[str, Any]) -> Plan:
    site = runtime.site()
    try:
        return make_plan(
            nodes=options["node"],
            listen=options["listen"],
            health_path=options["health_path"],
            cookie=options["cookie"] or runtime.settings.node_cookie or COOKIE,
            host=options["host"] or site.host,
            draining=options["draining"],
            secure=options["secure"],
            taken=site.cookies,
        )
    except PlanError as error:
        raise CommandError(str(error)) from error


def _drain(runtime: Runtime) -> str:
    _require_store(runtime)
    try:
        runtime.condition.drain(time.time())
    except DeferredSessionsError as error:
        raise CommandError(str(error)) from error
    return "This node gets no new visitors as soon as the director has asked for its health."


def _resume(runtime: Runtime) -> str:
    _require_store(runtime)
    try:
        runtime.condition.resume()
    except DeferredSessionsError as error:
        raise CommandError(str(error)) from error
    return "This node gets new visitors as soon as the director has asked for its health."


def _require_store(runtime: Runtime) -> None:
    """Make no store for the sake of it: it would belong to whoever runs the command."""
    if not runtime.store.exists():
        raise CommandError("This host has no sessions in memory, as far as this user can see.")
