"""The admin in a real browser: figures that move, alarms, revocation, and a strict policy."""

from __future__ import annotations

import os
import re
import urllib.request
from collections.abc import Callable
from pathlib import Path

import pytest
from playwright.sync_api import expect

from tests.browser.conftest import Person, Shop
from tests.processes.conftest import Visitor

pytestmark = pytest.mark.django_db(transaction=True)

LIST = "/admin/deferred_sessions/session/"
DASHBOARD = f"{LIST}dashboard/"
LOGIN = f"/admin/login/?next={DASHBOARD}"


def number(text: str) -> float:
    return float(re.sub(r"[^\d.]", "", text) or 0)


def test_the_dashboards_figures_move_under_traffic(
    person: Callable[..., Person], shop: Shop
) -> None:
    shop.start_poller()
    admin = person()
    admin.under_policy()
    page = admin.log_in("admin", LOGIN)
    page.wait_for_selector(".u-wrap canvas")
    assert page.locator(".u-wrap").count() == 6
    updates = page.locator('[data-total="UPDATES"]')
    before = number(updates.inner_text())
    visitor = Visitor()
    for _ in range(50):
        visitor.get(shop.url("/probe/count/"))
    page.wait_for_function(
        "before => Number(document.querySelector('[data-total=UPDATES]')"
        ".textContent.replace(/[^0-9]/g, '')) >= before + 49",
        arg=before,
    )
    expect(page.locator('[data-text="avoided"]')).not_to_have_text("0")
    expect(page.locator(".ds-notice")).to_contain_text("All is well")
    expect(page.locator('[data-value="requests"]')).not_to_have_text("-")
    page.get_by_role("button", name="24h").click()
    expect(page.get_by_role("button", name="24h")).to_have_attribute("aria-pressed", "true")


def test_the_dashboard_turns_red_when_the_poller_dies(
    person: Callable[..., Person], shop: Shop
) -> None:
    shop.start_poller()
    page = person().log_in("admin", LOGIN)
    expect(page.locator(".ds-notice.ds-ok")).to_contain_text("All is well")
    shop.stop_poller()
    expect(page.locator(".ds-notice.ds-error")).to_contain_text("No poller")
    expect(page.locator('[data-card="poller"]')).to_have_class(re.compile("ds-alarm"))
    shop.start_poller()
    expect(page.locator(".ds-notice.ds-ok")).to_contain_text("All is well")


def test_the_dashboard_says_so_when_the_site_does_not_answer(
    person: Callable[..., Person], shop: Shop
) -> None:
    admin = person()
    page = admin.log_in("admin", LOGIN)
    page.wait_for_selector(".u-wrap")
    admin.context.set_offline(True)
    expect(page.locator(".ds-notice.ds-error")).to_contain_text("No answer")
    expect(page.locator(".ds-board")).to_have_class(re.compile("ds-stale"))
    admin.context.set_offline(False)
    expect(page.locator(".ds-board")).not_to_have_class(re.compile("ds-stale"))
    admin.errors.clear()  # the browser calls the failed request one


def test_the_charts_follow_the_theme(person: Callable[..., Person], shop: Shop) -> None:
    page = person(color_scheme="light").log_in("admin", LOGIN)
    page.wait_for_selector(".u-wrap")
    colour = "getComputedStyle(document.querySelector('.ds-card')).backgroundColor"
    light = page.evaluate(colour)
    page.evaluate("document.querySelector('.u-wrap').dataset.old = 1")
    page.locator(".theme-toggle").first.click()
    page.locator(".theme-toggle").first.click()
    page.wait_for_function(f"{colour} !== '{light}' || document.documentElement.dataset.theme")
    page.evaluate("document.documentElement.dataset.theme = 'dark'")
    page.wait_for_function(f"{colour} !== '{light}'")
    page.wait_for_function("!document.querySelector('.u-wrap').dataset.old")


def test_revoking_in_the_admin_logs_a_customer_out(
    person: Callable[..., Person], shop: Shop
) -> None:
    customer, admin = person(), person()
    customer.log_in("ann")
    customer.page.get_by_label("Add Potted fern to the cart").click()
    page = admin.log_in("admin", f"/admin/login/?next={LIST}?q=ann")
    row = page.locator("#result_list tbody tr")
    expect(row).to_have_count(1)
    row.locator("th a").click()
    expect(page.locator(".ds-data pre")).to_contain_text("fern")
    admin.html.append(page.content())
    page.get_by_role("button", name="Revoke", exact=True).click()
    admin.html.append(page.content())
    page.get_by_role("button", name="Yes, revoke").click()
    expect(page.locator(".messagelist")).to_contain_text("1 session was revoked")
    admin.html.append(page.content())
    customer.go("/")
    expect(customer.page.get_by_role("link", name="Log in")).to_be_visible()

    keys = shop.session_keys() + [
        str(cookie["value"])
        for each in (admin, customer)
        for cookie in each.context.cookies()
        if cookie["name"] == "sessionid"
    ]
    for key in keys:
        assert not any(key[:9] in text for text in admin.html + admin.addresses)


@pytest.mark.parametrize("width", [390, 768, 1440])
def test_nothing_is_wider_than_the_screen(
    person: Callable[..., Person], shop: Shop, width: int
) -> None:
    page = person(viewport={"width": width, "height": 844}).log_in("admin", LOGIN)
    page.wait_for_selector(".u-wrap")
    assert page.evaluate("document.documentElement.scrollWidth") <= width


@pytest.mark.skipif("SCREENSHOTS" not in os.environ, reason="on demand: see tests/README.md")
def test_screenshots(person: Callable[..., Person], shop: Shop) -> None:
    """Take the pictures in docs/ of the site at SCREENSHOTS, which has been busy for a while."""
    site = os.environ["SCREENSHOTS"].rstrip("/")
    urllib.request.urlopen(site).close()
    docs = Path(__file__).parents[2] / "docs"
    for name, scheme, width, height, scale in (
        ("light", "light", 1440, 1530, 1),
        ("dark", "dark", 1440, 1530, 1),
        ("phone", "light", 390, 1700, 2),
    ):
        admin = person(
            color_scheme=scheme,
            viewport={"width": width, "height": height},
            device_scale_factor=scale,
        )
        page = admin.page
        page.goto(f"{site}{LOGIN}")
        page.fill("#id_username", "admin")
        page.fill("#id_password", "corner-shop")
        page.click("input[type=submit]")
        page.wait_for_selector(".u-wrap")
        page.get_by_role("button", name="15m").click()
        page.wait_for_load_state("networkidle")
        page.screenshot(path=docs / f"dashboard-{name}.png")
        if name == "light":
            page.set_viewport_size({"width": width, "height": 900})
            page.goto(f"{site}{LIST}")
            page.screenshot(path=docs / "sessions.png")
        admin.errors.clear()
