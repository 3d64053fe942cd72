"""Customers for a running shop: real requests, each visitor with a cookie jar.

python -m testproject.visitors http://127.0.0.1:8000/ --requests 1000
"""

from __future__ import annotations

import argparse
import http.cookiejar
import json
import random
import re
import sys
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import urlencode, urljoin

from testproject.shop.catalogue import PRODUCTS

FIGURES = (
    ("requests", "requests served"),
    ("updates", "session updates"),
    ("statements", "writes to PostgreSQL"),
    ("rows", "rows written"),
)


def main() -> int:
    """Let visitors in, wait for the last one, and say what happened."""
    options = _options()
    try:
        before = figures(options.url)
    except (OSError, ValueError) as error:
        print(f"No shop at {options.url}: {error}", file=sys.stderr)
        return 1
    started = time.monotonic()
    workers = _shop(options)
    seconds = time.monotonic() - started
    after = figures(options.url)
    while after["requests"] - before["requests"] < options.requests:
        time.sleep(0.1)  # requests are counted when they have ended
        after = figures(options.url)
    print(
        f"{options.requests} requests by {options.visitors} visitors in "
        f"{seconds:.1f} s, answered by {len(workers)} workers"
    )
    for name, title in FIGURES:
        print(f"{title:>24}: {after[name] - before[name]:6}")
    print(f"{'dirty sessions now':>24}: {after['dirty']:6}")
    return 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m testproject.visitors",
        description="Send visitors into a running shop; they look, and fill their carts.",
    )
    parser.add_argument("url", help="address of the shop, such as http://127.0.0.1:8000/")
    parser.add_argument("--requests", type=int, default=1000, help="how many in all (1000)")
    parser.add_argument("--visitors", type=int, default=50, help="how many customers (50)")
    parser.add_argument("--at-once", type=int, default=8, help="how many at the same time (8)")
    return parser.parse_args()


def _shop(options: argparse.Namespace) -> set[str]:
    """Spread the requests over the visitors; return which workers answered."""
    share, rest = divmod(options.requests, options.visitors)
    shares = [share + (number < rest) for number in range(options.visitors)]
    with ThreadPoolExecutor(options.at_once) as crowd:
        return set().union(*crowd.map(Visitor(options.url).shop, shares))


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


if __name__ == "__main__":
    sys.exit(main())
