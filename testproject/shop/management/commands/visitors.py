"""`manage.py visitors URL`: send customers into a running shop."""

from __future__ import annotations

import http.cookiejar
import json
import random
import re
import time
import urllib.request
from argparse import ArgumentParser
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import urlencode, urljoin

from django.core.management.base import BaseCommand, CommandError

from testproject.shop.catalogue import PRODUCTS


class Command(BaseCommand):
    """Real requests by many visitors at once, each with a cookie jar of its own."""

    help = "Send visitors into a running shop; they look, and put things into their carts."

    def add_arguments(self, parser: ArgumentParser) -> None:
        """Define the options."""
        parser.add_argument("url", help="address of the shop, such as http://127.0.0.1:8000/")
        parser.add_argument("--requests", type=int, default=1000, help="how many in all")
        parser.add_argument("--visitors", type=int, default=50, help="how many customers")
        parser.add_argument("--at-once", type=int, default=8, help="how many at the same time")

    def handle(self, **options: Any) -> None:
        """Let them in, wait for the last one, and say what happened."""
        url = options["url"]
        try:
            before = figures(url)
        except OSError as error:
            raise CommandError(f"No shop at {url}: {error}") from error
        started = time.monotonic()
        shares = [options["requests"] // options["visitors"]] * options["visitors"]
        for number in range(options["requests"] % options["visitors"]):
            shares[number] += 1
        with ThreadPoolExecutor(options["at_once"]) as crowd:
            workers = set().union(*crowd.map(Visitor(url).shop, shares))
        seconds = time.monotonic() - started
        after = figures(url)
        while after["requests"] - before["requests"] < options["requests"]:
            time.sleep(0.1)  # requests are counted when they have ended
            after = figures(url)
        self.stdout.write(
            f"{options['requests']} requests by {options['visitors']} visitors in "
            f"{seconds:.1f} s, answered by {len(workers)} workers"
        )
        for name, title in (
            ("requests", "requests served"),
            ("updates", "session updates"),
            ("statements", "writes to PostgreSQL"),
            ("rows", "rows written"),
        ):
            self.stdout.write(f"{title:>24}: {after[name] - before[name]:6}")
        self.stdout.write(f"{'dirty sessions now':>24}: {after['dirty']:6}")


class Visitor:
    """Somebody who goes shopping."""

    def __init__(self, url: str) -> None:
        self._url = url

    def shop(self, requests: int) -> set[str]:
        """Make so many requests with a new cookie jar; return which workers answered."""
        jar = http.cookiejar.CookieJar()
        browser = urllib.request.build_opener(
            urllib.request.HTTPCookieProcessor(jar), NoRedirects()
        )
        workers: set[str] = set()
        token = ""
        for number in range(requests):
            if number % 5 == 0 or not token:
                with browser.open(self._url, timeout=30) as page:
                    text = page.read().decode()
                token = re.findall(r'name="csrfmiddlewaretoken" value="(\w+)"', text)[0]
                workers.update(re.findall(r'data-worker="(\d+)"', text))
            else:
                slug = random.choice(PRODUCTS).slug
                data = urlencode({"csrfmiddlewaretoken": token}).encode()
                with browser.open(urljoin(self._url, f"add/{slug}/"), data, timeout=30):
                    pass
        return workers


class NoRedirects(urllib.request.HTTPRedirectHandler):
    """Takes a redirect for an answer, so that a request is one request."""

    def http_error_302(self, *arguments: Any) -> Any:
        """Return the redirect itself: the second argument."""
        return arguments[1]


def figures(url: str) -> dict[str, Any]:
    """Return the live figures of the shop."""
    with urllib.request.urlopen(urljoin(url, "figures.json"), timeout=30) as answer:
        return dict(json.loads(answer.read()))
