"""Configurations for the director: what they say, and what cannot get into them.

Whether the directors take them is tried in tests/director/, with the directors themselves.
"""

from __future__ import annotations

import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deferred_sessions.director import haproxy, nginx
from deferred_sessions.director.plan import Plan, PlanError, make_plan

KINDS = [haproxy.configuration, nginx.configuration]
NODES = ["web1=10.0.0.1:8000", "web2=10.0.0.2:8000", "web3=[::1]:8000"]


def plan(**changes: Any) -> Plan:
    words: dict[str, Any] = {
        "nodes": NODES,
        "listen": "80",
        "health_path": "/healthz",
        "cookie": "sessionnode",
        "host": "example.com",
        **changes,
    }
    return make_plan(**words)


def lines(text: str) -> list[str]:
    return [line.strip() for line in text.splitlines()]


def group(text: str, name: str) -> list[str]:
    """Return the servers of an upstream group of nginx."""
    found = re.search(rf"upstream {name} {{(.*?)\n    }}", text, re.DOTALL)
    assert found
    return [line for line in lines(found[1]) if line.startswith("server ")]


def test_haproxy_keeps_visitors_at_their_node() -> None:
    found = lines(haproxy.configuration(plan()))
    assert "server web2 10.0.0.2:8000 cookie web2" in found
    assert "server web3 [::1]:8000 cookie web3" in found
    assert 'cookie sessionnode insert indirect nocache httponly attr "SameSite=Lax"' in found
    assert "bind *:80" in found


def test_haproxy_asks_the_health_url() -> None:
    text = haproxy.configuration(plan(health_path="/up/", host="shop.example.com"))
    assert "uri /up/?draining=404 ver HTTP/1.1 hdr Host shop.example.com " in text
    assert "if { path /up/ }" in text


def test_nginx_keeps_visitors_at_their_node() -> None:
    text = nginx.configuration(plan())
    assert "map $cookie_sessionnode $sessions_group {" in text
    assert '"web2" sessions_node_web2;' in lines(text)
    assert [line.split()[1] for line in group(text, "sessions_any")] == [
        "10.0.0.1:8000",
        "10.0.0.2:8000",
        "[::1]:8000",
    ]


def test_nginx_gives_every_node_other_heirs() -> None:
    """Or all visitors of a dead node would have the same one as their next."""
    servers = group(nginx.configuration(plan()), "sessions_node_web2")
    assert [line.split()[1] for line in servers] == ["10.0.0.2:8000", "[::1]:8000", "10.0.0.1:8000"]
    assert ["backup;" in line for line in servers] == [False, True, True]


def test_a_node_that_is_drained() -> None:
    """It gets no new visitors, and inherits none; those who belong there stay."""
    drained = plan(draining=["web1"])
    assert "server web1 10.0.0.1:8000 cookie web1 weight 0" in lines(haproxy.configuration(drained))
    text = nginx.configuration(drained)
    assert group(text, "sessions_any")[0] == "server 10.0.0.1:8000 down;"
    assert "backup" not in group(text, "sessions_node_web1")[0]
    assert not any("10.0.0.1" in line for line in group(text, "sessions_node_web2"))


@pytest.mark.parametrize(("secure", "count"), [(False, 0), (True, 1)])
def test_the_cookie_of_a_site_with_https(secure: bool, count: int) -> None:
    text = haproxy.configuration(plan(secure=secure))
    assert text.count("httponly secure") == count
    assert ("https unless" in text, "http unless { ssl_fc }" in text) == (False, not secure)
    assert ("X-Forwarded-Proto https;" in nginx.configuration(plan(secure=secure))) == secure


@pytest.mark.parametrize("configuration", KINDS, ids=["haproxy", "nginx"])
def test_nothing_is_left_to_fill_in(configuration: Any) -> None:
    text = configuration(plan())
    assert text.endswith("\n")
    assert not text.endswith("\n\n")
    assert not [line for line in text.splitlines() if line != line.rstrip()]
    assert not re.search(r"\{[a-z_]+\}", text)


@pytest.mark.parametrize(
    ("given_", "understood"),
    [("80", "*:80"), (":80", "*:80"), ("*:80", "*:80"), ("[::]:8", "[::]:8"), ("a.b:1", "a.b:1")],
)
def test_where_visitors_come_in(given_: str, understood: str) -> None:
    assert plan(listen=given_).listen == understood


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"nodes": []}, "There is no node"),
        ({"nodes": ["web1"]}, "write NAME=HOST:PORT"),
        ({"nodes": ["=10.0.0.1:80"]}, "not a name"),
        ({"nodes": ["a b=10.0.0.1:80"]}, "not a name"),
        ({"nodes": [f"{'x' * 41}=h:80"]}, "not a name"),
        ({"nodes": ["a=10.0.0.1"]}, "no port"),
        ({"nodes": ["a=10.0.0.1:0"]}, "no port"),
        ({"nodes": ["a=10.0.0.1:65536"]}, "no port"),
        ({"nodes": ["a=10.0.0.1:٣"]}, "no port"),
        ({"nodes": ["a=::1:80"]}, "not an address"),
        ({"nodes": ["a=[::1%x;y]:80"]}, "not an address"),
        ({"nodes": ["a=*:80"]}, "not an address"),
        ({"nodes": ["a=:80"]}, "not an address"),
        ({"nodes": ["a=h:1", "A=h:2"]}, "Two nodes have the name a"),
        ({"nodes": ["a=h:1", "b=h:1"]}, "Two nodes have the address h:1"),
        ({"nodes": [f"n{n}=h:{n + 1}" for n in range(51)]}, "51 nodes"),
        ({"draining": ["web9"]}, "no node called web9"),
        ({"draining": ["web1", "web2", "web3"]}, "All nodes"),
        ({"listen": "http://x"}, "no port"),
        ({"health_path": "healthz"}, "not a path"),
        ({"health_path": "/a?b"}, "not a path"),
        ({"health_path": "/"}, "not a path"),
        ({"cookie": "a-b"}, "not a name for a cookie"),
        ({"cookie": "SessionID", "taken": ["sessionid"]}, "for something else"),
        ({"host": "a b"}, "not a host name"),
    ],
)
def test_what_makes_no_sense(changes: dict[str, Any], complaint: str) -> None:
    with pytest.raises(PlanError, match=complaint):
        plan(**changes)


@given(st.sampled_from(["nodes", "listen", "health_path", "cookie", "host"]), st.text())
def test_nothing_gets_out_of_its_place(what: str, text: str) -> None:
    """Whatever is accepted leaves every configuration as many lines and blocks as before."""
    try:
        made = plan(**{what: [f"web1={text}", *NODES[1:]] if what == "nodes" else text})
    except PlanError:
        return
    for configuration in KINDS:
        usual, unusual = configuration(plan()), configuration(made)
        for sign in "\n{};\"'#\\$ ":
            assert unusual.count(sign) == usual.count(sign)
