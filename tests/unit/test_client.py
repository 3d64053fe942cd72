"""Where a request came from, behind proxies and with what people send."""

from __future__ import annotations

import pytest

from deferred_sessions.client import KEY, Client, client_of


@pytest.mark.parametrize(
    ("proxies", "forwarded", "address"),
    [
        (0, None, "192.0.2.1"),
        (0, "203.0.113.9", "192.0.2.1"),  # anybody can say that
        (1, "203.0.113.9", "203.0.113.9"),
        (1, "198.51.100.66, 203.0.113.9", "203.0.113.9"),  # the first is the visitor's invention
        (2, "198.51.100.66, 203.0.113.9, 10.0.0.1", "203.0.113.9"),
        (2, "10.0.0.1", "192.0.2.1"),  # it came past the outer proxy
        (1, None, ""),
        (1, "203.0.113.9:4711", "203.0.113.9"),
        (1, "[2001:db8::1]:4711", "2001:db8::1"),
        (1, "2001:DB8::1", "2001:db8::1"),
        (1, "<script>", ""),
        (1, "unknown", ""),
    ],
)
def test_the_address(proxies: int, forwarded: str | None, address: str) -> None:
    headers = {"REMOTE_ADDR": "192.0.2.1"}
    if forwarded is not None:
        headers["HTTP_X_FORWARDED_FOR"] = forwarded
    assert client_of(headers, proxies).address == address


def test_the_browser_is_cut_and_cleaned() -> None:
    agent = client_of({"HTTP_USER_AGENT": "A\n\x1b[31m" + "b" * 1000}, 0).agent
    assert agent == ("A[31m" + "b" * 1000)[:200]


@pytest.mark.parametrize("client", [Client("192.0.2.1", "Mozilla/5.0 (X11)"), Client("", "")])
def test_it_comes_back_from_a_session(client: Client) -> None:
    assert Client.of({KEY: client.text()}) == client


def test_a_session_may_have_none() -> None:
    assert Client.of({}) is None
    assert Client.of({KEY: ["odd"]}) is None
