"""A configuration for HAProxy.

Called by `manage.py sessionproxy haproxy`. Invariant: a visitor changes nodes only if the
node cannot be reached; a request that may have changed something is never sent twice.
"""

from __future__ import annotations

from typing import Final

from deferred_sessions.director.plan import Node, Plan

TEMPLATE: Final = """\
# Sends each visitor to the node that has the visitor's session; for HAProxy 2.4 or newer.
# Printed by `manage.py sessionproxy haproxy`. Check it with `haproxy -c -f FILE`.

global
    log stdout format raw local0 notice

defaults
    mode http
    log global
    timeout http-request 10s        # for the visitor to send the head of a request
    timeout client 30s              # silence of a visitor
    timeout http-keep-alive 10s     # between two requests of a visitor
    timeout connect 2s              # for a node to accept a connection
    timeout queue 5s
    timeout server 60s              # for a node to answer; no less than gunicorn's --timeout
    timeout check 2s
    timeout tunnel 1h               # WebSockets

frontend visitors
    bind {listen}
    # For HTTPS: bind {https} ssl crt /etc/haproxy/site.pem alpn h2,http/1.1
    option forwardfor
{scheme}
    # For those who watch over the nodes, who ask them directly.
    http-request return status 404 if {{ path {health_path} }}
    default_backend nodes

backend nodes
    # A visitor without the cookie goes to the node with the least to do, and stays there.
    balance leastconn
    cookie {cookie} insert indirect nocache httponly{secure} attr "SameSite=Lax"

    # A node that cannot be reached: the same request goes to another one, which gets the
    # visitor. One that dies over a request: the same, but only for GET and HEAD.
    option redispatch 1
    retries 3
    retry-on conn-failure empty-response
    http-request disable-l7-retry unless METH_GET
    # A connection for each request: a node may close one that is kept just as it is used again.
    option http-server-close

    # 200: well. 404: draining, so only those who belong here. Anything else: dead.
    option httpchk
    http-check send meth GET uri {health_path}?draining=404 ver HTTP/1.1 hdr Host {host} \
hdr X-Forwarded-Proto https
    http-check expect status 200
    http-check disable-on-404
    default-server check inter 2s fastinter 500ms fall 2 rise 2 observe layer4 error-limit 3

{servers}
"""
SCHEME: Final = """\
    http-request set-header X-Forwarded-Proto https if { ssl_fc }
    http-request set-header X-Forwarded-Proto http unless { ssl_fc }"""
SECURE_SCHEME: Final = "    http-request set-header X-Forwarded-Proto https"


def configuration(plan: Plan) -> str:
    """Return the whole configuration, with a line break at the end."""
    return TEMPLATE.format(
        listen=plan.listen,
        https=f"{plan.listen.rpartition(':')[0]}:443",
        scheme=SECURE_SCHEME if plan.secure else SCHEME,
        cookie=plan.cookie,
        secure=" secure" if plan.secure else "",
        health_path=plan.health_path,
        host=plan.host,
        servers="\n".join(_server(node, plan) for node in plan.nodes),
    )


def _server(node: Node, plan: Plan) -> str:
    drained = " weight 0" if node.name in plan.draining else ""
    return f"    server {node.name} {node.address} cookie {node.name}{drained}"
