"""A headless Chromium of the system's packages, driven by Playwright."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from typing import Any

import psycopg
import pytest
from playwright.sync_api import Browser, BrowserContext, Page, expect, sync_playwright

from tests.plugins.postgres import database_url
from tests.processes.conftest import Site, Web, make_site

__all__ = ["make_site"]

CHROMIUM = ("chromium", "chromium-browser", "google-chrome")
FLAGS = (
    "--headless",
    "--no-sandbox",  # Chromium refuses to run as root with one
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
PATIENCE = 30_000.0  # milliseconds; only a failure waits that long
PASSWORD = "corner-shop"
POLICY = "default-src 'self'; script-src 'self'; style-src 'self'; img-src 'self' data:"
expect.set_options(timeout=PATIENCE)


@pytest.fixture(scope="session")
def chromium() -> str:
    """Where the browser is; in CI a missing one is a failure."""
    found = next(filter(None, map(shutil.which, CHROMIUM)), None)
    if found is None and "CI" in os.environ:
        pytest.fail("There is no Chromium. Install the system's package `chromium`.")
    if found is None:
        pytest.skip("There is no Chromium.")
    return found


@pytest.fixture
def browser(chromium: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Browser]:
    """A browser without any cookies."""
    # Playwright has an event loop in this thread, which Django would take for async code.
    monkeypatch.setenv("DJANGO_ALLOW_ASYNC_UNSAFE", "1")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=list(FLAGS))
        yield browser
        browser.close()


@pytest.fixture
def person(browser: Browser, shop: Shop) -> Iterator[Callable[..., Person]]:
    """Somebody with a browser of their own; whatever breaks in it fails the test."""
    people: list[Person] = []

    def make(**options: Any) -> Person:
        people.append(Person(browser.new_context(**options), shop))
        return people[-1]

    yield make
    for person in people:
        person.context.unroute_all(behavior="ignoreErrors")  # figures may be on their way
        person.context.close()
        assert not person.errors


@pytest.fixture
def shop(make_site: Callable[..., Site]) -> Shop:
    """The shop, open: three workers, and an agent in one of them."""
    site = make_site(FLUSH_INTERVAL=1.0, RECORD_CLIENT=True)
    site.run("manage.py", "openshop")
    return Shop(site, site.web("--workers", "3"))


class Shop:
    """A running shop."""

    def __init__(self, site: Site, web: Web) -> None:
        self.site = site
        self._web = web
        self.poller: Any = None

    def url(self, path: str) -> str:
        return self._web.url(path)

    def start_poller(self, tick: float = 0.2) -> None:
        self.poller = self.site.start("manage.py", "flushsessions", "--loop", str(tick), kill=True)

    def stop_poller(self) -> None:
        self.poller.kill()
        self.poller.wait()

    def session_keys(self) -> list[str]:
        """Return all session keys, as PostgreSQL has them."""
        with psycopg.connect(database_url()) as connection:
            rows = connection.execute("SELECT session_key FROM deferred_sessions_session")
            return [key for (key,) in rows.fetchall()]


class Person:
    """A browser window of somebody's."""

    def __init__(self, context: BrowserContext, shop: Shop) -> None:
        self.context = context
        self.shop = shop
        self.errors: list[str] = []
        self.html: list[str] = []
        self.addresses: list[str] = []
        self.page: Page = context.new_page()
        self.page.set_default_timeout(PATIENCE)
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("console", self._listen)
        self.page.on("request", lambda request: self.addresses.append(request.url))

    def under_policy(self) -> None:
        """Have each page come with a strict Content-Security-Policy."""

        def serve(route: Any) -> None:
            response = route.fetch()
            headers = {**response.headers, "content-security-policy": POLICY}
            route.fulfill(response=response, headers=headers)

        self.context.route("**/*", serve)

    def go(self, path: str) -> Page:
        self.page.goto(self.shop.url(path))
        self.html.append(self.page.content())
        return self.page

    def log_in(self, name: str, path: str = "/login/") -> Page:
        page = self.go(path)
        page.get_by_label("Name", exact=False).first.fill(name) if path == "/login/" else (
            page.fill("#id_username", name)
        )
        page.fill("input[type=password]", PASSWORD)
        page.locator("main button, input[type=submit]").first.click()
        page.wait_for_load_state()
        return page

    def _listen(self, message: Any) -> None:
        if message.type == "error" and "favicon" not in message.location.get("url", ""):
            self.errors.append(f"{message.text} {message.location}")
