"""A configuration for nginx, the open-source one.

Called by `manage.py sessionproxy nginx`. It sets no cookie by itself and asks no health URL:
our middleware names the node in a cookie (`NODE_COOKIE`), and failed requests tell which
nodes are dead. Invariant: a visitor changes nodes only if the node cannot be reached; a
request that may have changed something is never sent twice (nginx sees to that).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from deferred_sessions.director.plan import Node, Plan

TEMPLATE: Final = """\
# Sends each visitor to the node that has the visitor's session; for nginx 1.18 or newer.
# Printed by `manage.py sessionproxy nginx`. Check it with `nginx -t -c FILE`. Where there is
# an nginx.conf already, what stands in `http {{ }}` can be a file in conf.d.
#
# Each node names itself in the cookie: DEFERRED_SESSIONS = {{
#     "NODE_COOKIE": "{cookie}", "NODE": {names}, ...}}
#
# To drain a node, print this with `--draining NAME` and reload nginx: only those who belong
# there go on using it.

worker_processes auto;

events {{
    worker_connections 4096;
}}

http {{
    map_hash_bucket_size 128;

    # Who has no cookie, or one of a node that is gone, goes to the node with the least to do.
    map $cookie_{cookie} $sessions_group {{
        default sessions_any;
{choices}
    }}

    map $http_upgrade $sessions_connection {{
        default upgrade;
        "" close;
    }}

    upstream sessions_any {{
        zone sessions_any {zone}k;
        least_conn;
{everybody}
    }}

{groups}

    server {{
        listen {listen};
        # For HTTPS: listen {https} ssl http2; ssl_certificate ...; ssl_certificate_key ...;
        client_max_body_size 100m;

        location = {health_path} {{  # for those who watch over the nodes, who ask them directly
            return 404;
        }}

        location / {{
            proxy_pass http://$sessions_group;
            proxy_http_version 1.1;
            proxy_set_header Host $http_host;
            proxy_set_header X-Forwarded-For $proxy_add_x_forwarded_for;
            proxy_set_header X-Forwarded-Proto {scheme};
            proxy_set_header Upgrade $http_upgrade;
            proxy_set_header Connection $sessions_connection;

            # A node that cannot be reached: the same request goes to another one, which gets
            # the visitor. One that dies over a request: the same, but not for POST.
            proxy_connect_timeout 2s;
            proxy_read_timeout 60s;
            proxy_next_upstream error timeout;
            proxy_next_upstream_tries 3;
            proxy_next_upstream_timeout 10s;
        }}
    }}
}}
"""
GROUP: Final = """\
    upstream sessions_node_{name} {{
        zone sessions_node_{name} {zone}k;
{servers}
    }}"""
WATCHED: Final = "max_fails=3 fail_timeout=5s"  # how soon a dead node is left alone
SMALLEST_ZONE: Final = 64  # KiB, for what nginx's processes tell each other about a group


def configuration(plan: Plan) -> str:
    """Return the whole configuration, with a line break at the end."""
    zone = max(SMALLEST_ZONE, 4 * len(plan.nodes))
    groups = (
        GROUP.format(name=node.name, zone=zone, servers=_lines(_with_heirs(node, plan)))
        for node in plan.nodes
    )
    return TEMPLATE.format(
        cookie=plan.cookie,
        names=" or ".join(f'"{node.name}"' for node in plan.nodes),
        choices=_lines(f'"{node.name}" sessions_node_{node.name};' for node in plan.nodes),
        zone=zone,
        everybody=_lines(_for_new_visitors(node, plan) for node in plan.nodes),
        groups="\n\n".join(groups),
        listen=plan.listen,
        health_path=plan.health_path,
        https=f"{plan.listen.rpartition(':')[0]}:443",
        scheme="https" if plan.secure else "$scheme",
    )


def _for_new_visitors(node: Node, plan: Plan) -> str:
    return f"server {node.address} {'down' if node.name in plan.draining else WATCHED};"


def _with_heirs(first: Node, plan: Plan) -> Iterable[str]:
    """Yield the node of a group, and who takes over: those that follow it, in a circle."""
    yield f"server {first.address} {WATCHED};"
    start = plan.nodes.index(first)
    for node in plan.nodes[start + 1 :] + plan.nodes[:start]:
        if node.name not in plan.draining:
            yield f"server {node.address} {WATCHED} backup;"


def _lines(words: Iterable[str]) -> str:
    return "\n".join(f"        {word}" for word in words)
